"""The methods against plain float32 torch, written from the published formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergepipe.store import Store
from support.family import Weights
from support.merges import NUMPY, bits, ingest_family, merge, weights_of

SHAPES = {"model.layers.0.w.weight": (96, 70), "model.layers.1.w.weight": (33, 129), "model.norm.weight": (50,)}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def as_torch(array: NDArray[np.generic]) -> torch.Tensor:
    """As float32, which holds every bfloat16 and float16 exactly."""
    return torch.from_numpy(np.asarray(array).astype(np.float32))


def rounded(result: torch.Tensor, dtype: str) -> bytes:
    """The bytes of a float32 result in its output type, as torch rounds it."""
    return result.to(TORCH[dtype]).contiguous().view(torch.uint8).numpy().tobytes()


def models(base_type: str, expert_types: Sequence[str], seed: int = 0) -> tuple[Weights, dict[str, Weights]]:
    """A base, and an expert of each type: some deltas large, some tiny, many equal in magnitude, some zero."""
    generator = np.random.default_rng(seed)

    def tensor(shape: tuple[int, ...], scale: float, dtype: str) -> NDArray[np.float32]:
        values = (generator.standard_normal(shape) * scale).astype(np.float32)
        return values.astype(NUMPY[dtype]).astype(np.float32)

    plain = {name: tensor(shape, 0.02, base_type) for name, shape in SHAPES.items()}
    experts: dict[str, Weights] = {}
    for number, dtype in enumerate(expert_types):
        weights: Weights = {}
        for name, values in plain.items():
            delta = tensor(values.shape, 10.0 ** -generator.integers(2, 5), "F32")
            delta[generator.random(delta.shape) < 0.2] = 0
            delta[generator.random(delta.shape) < 0.2] = np.float32(2.0**-9)  # many magnitudes at one place
            weights[name] = (values + delta).astype(NUMPY[dtype])
        experts[f"expert{number}"] = weights
    return {name: values.astype(NUMPY[base_type]) for name, values in plain.items()}, experts


@dataclass(frozen=True)
class Case:
    """One merge: its types, its weights, and the method's parameters."""

    base: str = "BF16"
    experts: tuple[str, ...] = ("BF16", "BF16", "BF16")
    dtype: str | None = None
    weights: tuple[float, ...] = (0.6, 0.4, 0.25)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    densities: tuple[float, ...] = ()

    @property
    def out(self) -> str:
        return self.dtype or self.base

    def __str__(self) -> str:
        settings = "-".join(f"{name}={value:g}" for name, value in self.parameters.items())
        types = "+".join(self.experts)
        return f"{self.base}-{types}-{self.out}-{'_'.join(map(str, self.weights))}-{settings}"


TYPES = [
    Case(),
    Case(dtype="F32"),
    Case("F16", ("F16", "F16", "F16")),
    Case("F16", ("F16", "F16", "F16"), "BF16"),
    Case("F32", ("F32", "F32", "F32")),
    Case("F32", ("F32", "F32", "F32"), "BF16"),
    Case("BF16", ("F16", "F32", "BF16"), "F32"),
    Case("F32", ("BF16", "F16", "F32")),
    Case("F16", ("F32", "BF16", "F16"), "F16"),
]


def run(
    shared_store: Store, folder: Path, case: Case, method: str, reference: Callable[..., torch.Tensor]
) -> dict[str, tuple[NDArray[np.generic], torch.Tensor]]:
    """Merge for real and by the reference; for each tensor the result as stored, and the reference in float32."""
    base, experts = models(case.base, case.experts)
    ingest_family(shared_store, folder, base, experts)
    settings: dict[str, dict[str, float]] = {}
    for number, name in enumerate(experts):
        settings[name] = {"weight": case.weights[number]}
        if method == "ties":
            settings[name]["density"] = case.densities[number] if case.densities else 1.0
    merge(shared_store, method, settings, dtype=case.dtype, **case.parameters)
    results = weights_of(shared_store, "merged")
    found = {}
    for name in base:
        inputs = [as_torch(weights[name]) for weights in experts.values()]
        found[name] = (results[name], reference(as_torch(base[name]), inputs, case))
        assert results[name].dtype == NUMPY[case.out]
    return found


def linear(base: torch.Tensor, experts: list[torch.Tensor], case: Case) -> torch.Tensor:
    total = torch.zeros_like(base)
    for weight, expert in zip(case.weights, experts, strict=True):
        total = total + torch.tensor(weight) * expert
    if case.parameters.get("normalize", True):
        total = total / torch.tensor(case.weights).sum()
    return total


def task_arithmetic(base: torch.Tensor, experts: list[torch.Tensor], case: Case) -> torch.Tensor:
    mixed = torch.zeros_like(base)
    for weight, expert in zip(case.weights, experts, strict=True):
        mixed = mixed + torch.tensor(weight) * (expert - base)
    if case.parameters.get("normalize", False):
        mixed = mixed / torch.tensor(case.weights).sum()
    return base + torch.tensor(float(case.parameters.get("lambda", 1.0))) * mixed


@pytest.mark.parametrize(
    "case",
    [
        *TYPES,
        Case(weights=(0.6, 0.4, 0.0), dtype="F32"),
        Case(weights=(1.5, -0.5, 0.25), dtype="F32"),
        Case(parameters={"normalize": False}),
        Case(parameters={"normalize": False}, dtype="F32", weights=(0.5, 0.25, -0.125)),
        Case("F32", ("BF16", "F16", "F32"), parameters={"normalize": False}),
        Case("F16", ("F16",), weights=(0.3,)),
    ],
    ids=str,
)
def test_linear_is_the_weighted_average(shared_store: Store, tmp_path: Path, case: Case) -> None:
    for name, (result, expected) in run(shared_store, tmp_path, case, "linear", linear).items():
        assert bits(result) == rounded(expected, case.out), name


@pytest.mark.parametrize(
    "case",
    [
        *TYPES,
        Case(weights=(1.0, -1.0, 0.5), dtype="F32"),
        Case(weights=(0.0, 1.0, 0.0)),
        Case(parameters={"lambda": 0.3}, dtype="F32"),
        Case(parameters={"lambda": -2.5}),
        Case("F32", ("F32",), weights=(-1.0,)),
        Case(parameters={"normalize": True}),
        Case(parameters={"normalize": True, "lambda": 0.7}, dtype="F32"),
        Case(parameters={"normalize": True, "lambda": 0.7}, dtype="F32", weights=(1.5, -0.5, 0.25)),
        Case(parameters={"normalize": True}, dtype="F32", weights=(-0.5, -0.5, -1.0)),
    ],
    ids=str,
)
def test_task_arithmetic_adds_the_weighted_deltas(shared_store: Store, tmp_path: Path, case: Case) -> None:
    for name, (result, expected) in run(shared_store, tmp_path, case, "task_arithmetic", task_arithmetic).items():
        assert bits(result) == rounded(expected, case.out), name


def trimmed(delta: torch.Tensor, threshold: float) -> torch.Tensor:
    return torch.where(delta.abs() >= threshold, delta, torch.zeros_like(delta))


def kept_count(delta: torch.Tensor, density: float) -> int:
    return max(int(density * delta.numel()), 1)


def kth_largest(delta: torch.Tensor, density: float) -> float:
    return float(torch.topk(delta.abs().flatten(), kept_count(delta, density)).values[-1])


def elect_and_merge(base: torch.Tensor, deltas: list[torch.Tensor], case: Case) -> torch.Tensor:
    """Steps 2 and 3 of TIES on trimmed deltas: elect the sign of the larger weighted sum (0 is +), mix what agrees."""
    weighted = [torch.tensor(weight) * delta for weight, delta in zip(case.weights, deltas, strict=True)]
    total = torch.zeros_like(base)
    for part in weighted:
        total = total + part
    sign = torch.where(total >= 0, torch.ones_like(total), -torch.ones_like(total))
    mixed, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for weight, part in zip(case.weights, weighted, strict=True):
        agrees = torch.sign(part) == sign
        mixed = mixed + torch.where(agrees, part, torch.zeros_like(part))
        divisor = divisor + torch.where(agrees, torch.tensor(weight), torch.tensor(0.0))
    if case.parameters.get("normalize", True):
        mixed = mixed / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return base + torch.tensor(float(case.parameters.get("lambda", 1.0))) * mixed


def ties(base: torch.Tensor, experts: list[torch.Tensor], case: Case) -> torch.Tensor:
    """TIES, where all magnitudes equal to the k-th largest are kept; all in its bin, where it is not to be exact."""
    deltas = []
    for number, expert in enumerate(experts):
        delta = expert - base
        density = case.densities[number] if case.densities else 1.0
        if density < 1:
            floor = torch.tensor([kth_largest(delta, density)])
            if not case.parameters.get("exact", True):
                floor = (floor.view(torch.int32) >> 16 << 16).view(torch.float32)
            delta = trimmed(delta, float(floor))
        deltas.append(delta)
    return elect_and_merge(base, deltas, case)


TIES = [
    *(Case(c.base, c.experts, c.dtype, densities=(0.3, 0.5, 0.2)) for c in TYPES),
    *(Case(c.base, c.experts, c.dtype) for c in TYPES[:3]),
    Case(dtype="F32", densities=(0.01, 0.999, 1.0)),
    Case(dtype="F32", densities=(1e-9, 1e-9, 1e-9)),
    Case(weights=(1.0, 0.0, 2.0), dtype="F32", densities=(0.5, 0.5, 0.5)),
    Case(weights=(1.0, -0.5, -0.25), dtype="F32", densities=(0.5, 0.5, 0.5)),
    Case(parameters={"normalize": False}, dtype="F32", densities=(0.3, 0.5, 0.2)),
    Case(parameters={"normalize": False, "lambda": -0.5}, weights=(1.0, -1.0, 0.5)),
    Case(parameters={"lambda": 1.7}, dtype="F32", densities=(0.3, 0.5, 0.2)),
    Case("F16", ("F16",), weights=(2.0,), densities=(0.4,)),
    Case(parameters={"exact": False}, dtype="F32", densities=(0.3, 0.5, 0.2)),
    Case("F32", ("BF16", "F16", "F32"), parameters={"exact": False}, densities=(0.3, 0.01, 1.0)),
]


@pytest.mark.parametrize("case", TIES, ids=str)
def test_ties_trims_elects_and_merges(shared_store: Store, tmp_path: Path, case: Case) -> None:
    for name, (result, expected) in run(shared_store, tmp_path, case, "ties", ties).items():
        assert bits(result) == rounded(expected, case.out), name


def test_ties_elects_plus_where_the_sum_is_zero(shared_store: Store, tmp_path: Path) -> None:
    """Two experts that pull exactly as far in both directions: the positive one wins, in either order."""
    base = {"w": np.zeros((2, 4), np.float32)}
    up = {"w": np.array([[1, 0, 0.5, -0.0], [2, 1, 1, 0]], np.float32)}
    down = {"w": np.array([[-1, 0, -0.5, 0], [-2, 1, -2, 0]], np.float32)}
    ingest_family(shared_store, tmp_path, base, {"up": up, "down": down})
    expected = np.array([[1, 0, 0.5, 0], [2, 1, -2, 0]], np.float32)
    for order in (["up", "down"], ["down", "up"]):
        merge(shared_store, "ties", {name: {"density": 1.0} for name in order})
        np.testing.assert_array_equal(weights_of(shared_store, "merged")["w"], expected)


def test_ties_divides_by_the_weights_that_agree(shared_store: Store, tmp_path: Path) -> None:
    """A mean over those that agree, 1 where none does; and their sum without ``normalize``."""
    base = {"w": np.full((1, 3), 10, np.float32)}
    first = {"w": np.array([[14, 10, 12]], np.float32)}
    second = {"w": np.array([[9, 10, 16]], np.float32)}
    ingest_family(shared_store, tmp_path, base, {"first": first, "second": second})
    experts = {"first": {"weight": 3.0, "density": 1.0}, "second": {"density": 1.0}}
    merge(shared_store, "ties", experts)
    np.testing.assert_array_equal(weights_of(shared_store, "merged")["w"], [[14, 10, 10 + (3 * 2 + 6) / 4]])
    merge(shared_store, "ties", experts, normalize=False)
    np.testing.assert_array_equal(weights_of(shared_store, "merged")["w"], [[22, 10, 22]])


def test_float64_weights_are_subtracted_before_they_are_rounded(shared_store: Store, tmp_path: Path) -> None:
    """In float32 these weights are equal to the base's, and their delta would be zero."""
    base = {"w": np.array([1.0, 2.0, 3.0])}
    ingest_family(shared_store, tmp_path, base, {"tuned": {"w": base["w"] + [1e-9, 0, -2e-9]}})
    merge(shared_store, "task_arithmetic", {"tuned": 1e6})
    delta = ((base["w"] + [1e-9, 0, -2e-9]) - base["w"]).astype(np.float32)
    expected = base["w"].astype(np.float32) + np.float32(1e6) * delta
    np.testing.assert_array_equal(weights_of(shared_store, "merged")["w"], expected.astype(np.float64))


def test_a_method_takes_equal_bits_of_two_types_for_what_they_are(shared_store: Store, tmp_path: Path) -> None:
    """A block's id says nothing of its type: the same bytes as bfloat16 and as float16 are read once, and differ."""
    base = {"w": np.zeros((8, 8), np.float32).astype(NUMPY["BF16"])}
    pattern = np.arange(64, dtype=np.uint16).reshape(8, 8) + 0x3C00
    experts = {"bf16": {"w": pattern.view(NUMPY["BF16"])}, "f16": {"w": pattern.view(np.float16)}}
    ingest_family(shared_store, tmp_path, base, experts)
    result = merge(shared_store, "linear", {"bf16": 1.0, "f16": 1.0}, normalize=False, dtype="F32")
    expected = pattern.view(NUMPY["BF16"]).astype(np.float32) + pattern.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(weights_of(shared_store, "merged")["w"], expected)
    assert (
        result.expert_bytes_read
        == shared_store.reader.read_header(shared_store.snapshot("f16").entry("w").blocks[0]).stored_bytes
    )
