"""slerp, nuslerp, multislerp, karcher and model_stock beside mergekit's own functions: cases, inputs, both results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from mergekit.merge_methods import merge_tensors
from numpy.typing import NDArray

import support.methods
from mergepipe.merge.method import Coefficients, Problem, Value
from mergepipe.merge.methods import METHODS
from support.methods import coefficients_of, run_method

Float32 = NDArray[np.float32]
SHAPES: Final = [(33,), (64, 48), (1, 7), (130, 129), (5, 3, 4, 4)]
KINDS: Final = ("family", "apart", "parallel", "angles", "same", "coarse")


@dataclass(frozen=True)
class Case:
    """A method's question: how many experts, its parameters, and whether there is a base."""

    method: str
    experts: int
    parameters: Mapping[str, Value] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    based: bool = True

    def __str__(self) -> str:
        settings = "-".join(f"{name}={value:g}" for name, value in self.parameters.items())
        return f"{self.method}-{self.experts}-{settings}-{self.weights}-{'based' if self.based else 'alone'}"


def _cases() -> Iterator[Case]:
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        yield Case("slerp", 1, {"t": t})
    for weights in ((1.0, 1.0), (0.3, 0.7), (1.0, 0.0), (2.0, -0.5), (1.0, -1.0)):
        for flatten, columns in ((True, False), (False, False), (False, True)):
            for based in (True, False):
                given = {"nuslerp_flatten": flatten, "nuslerp_row_wise": columns}
                yield Case("nuslerp", 2, given, weights, based)
    for count in (1, 2, 3, 5, 8):
        weights = tuple(0.2 + number / 10 for number in range(count))
        for normalize in (True, False):
            for based in (True, False):
                yield Case("multislerp", count, {"normalize_weights": normalize}, weights, based)
        yield Case("karcher", count, based=False)
        yield Case("karcher", count, {"max_iter": 2.0, "tol": 1e-3}, based=False)
        if count > 1:
            yield Case("model_stock", count)
            yield Case("model_stock", count, {"filter_wise": True})


CASES: Final = tuple(_cases())


def make(kind: str, count: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Float32, list[Float32]]:
    """A base, and experts of it: of a family, unrelated, parallel, at all angles, the same, or in bfloat16."""
    generator = np.random.default_rng(seed)

    def normal(scale: float) -> NDArray[np.float64]:
        return generator.standard_normal(shape) * scale

    base = normal(0.02).astype(np.float32)
    made = {
        "apart": lambda _: normal(0.02),
        "parallel": lambda number: base * (1 + 0.3 * number) + normal(1e-7),
        "angles": lambda _: base * generator.uniform(-0.7, 0.7) + normal(0.02),
        "same": lambda _: base,
    }.get(kind, lambda _: base + normal(10 ** -generator.uniform(2.5, 4)))
    results = [made(number).astype(np.float32) for number in range(count)]
    if kind == "coarse":
        base, *results = (torch.from_numpy(x).bfloat16().float().numpy() for x in (base, *results))
    return base, results


def problem_of(case: Case, shape: tuple[int, ...]) -> Problem:
    """What the engine would tell the method."""
    some = np.zeros(shape, np.float32)
    experts = [some] * case.experts
    return support.methods.problem_of(
        METHODS[case.method], some if case.based else None, experts, case.parameters, _own(case)
    )


def _own(case: Case) -> list[dict[str, Value]] | None:
    return None if case.weights is None else [{"weight": weight} for weight in case.weights]


def ours(
    case: Case, base: Float32, experts: Sequence[Float32], rows: int = 20
) -> tuple[Float32, Coefficients, NDArray[np.float64]]:
    """The result by tiles of so many rows, with its coefficients and their reach."""
    method, problem, under = METHODS[case.method], problem_of(case, base.shape), base if case.based else None
    tile = rows * base.shape[-1]
    found = run_method(method, under, experts, case.parameters, _own(case), tile=tile)
    coefficients = coefficients_of(method, problem, under, experts, tile=tile)
    return found, coefficients, method.reach(problem, coefficients)


def theirs(
    case: Case, base: Float32, experts: Sequence[Float32], dtype: torch.dtype = torch.float32, out: str = "float32"
) -> NDArray[np.float64]:
    """mergekit's result."""
    parameters: dict[str, object] = dict(case.parameters)
    if "max_iter" in parameters:
        parameters["max_iter"] = int(float(str(parameters["max_iter"])))
    if case.weights is not None:
        parameters["weight"] = list(case.weights)
    tensors = [torch.from_numpy(x) for x in ([base] if case.based else []) + list(experts)]
    found = merge_tensors(
        tensors, case.method, parameters=parameters, base_index=0 if case.based else None, dtype=dtype,
        out_dtype=torch.bfloat16 if out == "bfloat16" else None,
    )  # fmt: skip
    return np.asarray(found.double().numpy(), np.float64)


def exact(case: Case, base: Float32, experts: Sequence[Float32]) -> NDArray[np.float64]:
    """mergekit's result in float64; deltas are those of float32."""
    if not METHODS[case.method].takes_deltas(based=case.based):
        return theirs(case, base, experts, torch.float64)
    deltas = [expert - base for expert in experts]
    return base.astype(np.float64) + theirs(case, np.zeros_like(base), deltas, torch.float64)


def summands(
    case: Case, base: Float32, experts: Sequence[Float32], wanted: NDArray[np.float64], reach: NDArray[np.float64]
) -> Float32:
    """The largest summand for each element. Where rows have own factors, these are had from the result's length."""
    is_delta = METHODS[case.method].takes_deltas(based=case.based)
    inputs = np.abs(np.stack([expert - base if is_delta else expert for expert in experts])).astype(np.float64)
    factors = np.ones(inputs.shape)
    if np.isfinite(reach).all():
        factors *= np.abs(reach).reshape(-1, *[1] * base.ndim)
    elif case.method == "model_stock":
        mean = np.mean([expert - base for expert in experts], axis=0, dtype=np.float64)
        ratio = np.linalg.norm(wanted - base, axis=-1) / np.maximum(np.linalg.norm(mean, axis=-1), 1e-30)
        factors *= ratio[..., None] / case.experts
    parts = [np.abs(wanted), *(inputs * factors), *([np.abs(base)] if case.based else [])]
    return np.asarray(np.max(parts, axis=0), np.float32)


def unit(scale: Float32, dtype: str = "float32") -> NDArray[np.float64]:
    """The unit in the last place of numbers of that size."""
    return np.spacing(np.maximum(scale, np.float32(1e-30))).astype(np.float64) * (65536 if dtype == "bfloat16" else 1)
