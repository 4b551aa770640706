"""How far results are from mergekit's, the oracle: the same inputs and parameters through both, in float32.

`python bench/parity.py` prints two tables; `--write docs/methods.md` puts them between that file's marks. Methods with
random masks get the same random numbers on both sides: mergekit's draws are answered with the bits that ours hash from
each element's index. The methods on inner products have a table of their own (`parity_gram.py`).

A deviation is measured in units in the last place (ulps) of the sum of the magnitudes that went into an element, its
base's and its weighted inputs', or of its result where that is larger. Where large numbers cancel, a sum has no more
digits than they had. With K experts both sides add K products, each with an error of half a unit, and torch fuses some
multiplications with the additions; so K units are what to expect at most, and a few more where a norm over the whole
tensor is a factor, which mergekit sums in float32.

Arcee Fusion is compared with mergekit in float64: its divergences are small differences of large sums, of which float32
leaves three digits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import BatchedMergeMethod, GroupMergeMethod, PerInputValues, TensorBatch, TensorGroup
from numpy.typing import NDArray

from mergepipe.merge import mask_kernels, row_kernels
from mergepipe.merge.method import Method, Value
from mergepipe.merge.methods import find_method

HERE: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent / "tests") if str(path) not in sys.path]
import parity_cases  # noqa: E402  # found by the path above

from support.methods import coefficients_of, problem_of, run_method  # noqa: E402  # found by the path above

Floats = NDArray[np.float32]
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
EXPERT: Final = {"weight", "density", "gamma", "epsilon", "scale"}


@dataclass(frozen=True)
class Case:
    """One merge: a method, the merge's parameters, each expert's own, and the data."""

    method: str
    own: tuple[Mapping[str, Value], ...] = ({}, {}, {})
    parameters: Mapping[str, Value] = field(default_factory=dict)
    shape: tuple[int, ...] = (61, 67)
    data: str = "normal"
    seed: int = 0
    based: bool = True

    def __str__(self) -> str:
        settings = [f"{name}={value:g}" for name, value in self.parameters.items()]
        settings += [f"{name}={'/'.join(f'{each[name]:g}' for each in self.own)}" for name in self.own[0]]
        size = "x".join(map(str, self.shape))
        return "-".join([self.method, f"K{len(self.own)}", size, self.data, *settings])


@dataclass(frozen=True)
class Row:
    """One method's greatest deviations over its cases, in ulps of float32 and, rounded to it, of bfloat16.

    ``differing``: the share of elements that differ after they were rounded to bfloat16. ``explained``: elements left
    out, because their magnitudes are equal to a threshold, where mergekit keeps some and this project all.
    """

    method: str
    cases: int
    elements: int
    float32_ulps: float
    bfloat16_ulps: float
    differing: float
    explained: int


def inputs_of(case: Case) -> tuple[Floats, list[Floats]]:
    """A base, and an expert for each of the case's, by its kind of data."""
    generator = np.random.default_rng(case.seed)
    base = (generator.standard_normal(case.shape) * 0.05).astype(np.float32)
    if case.data in ("full", "tied"):
        base *= 0  # so that a delta has all of its digits, or just those that it is given
    experts = []
    for _ in case.own:
        delta = (generator.standard_normal(case.shape) * 10.0 ** -generator.uniform(1.5, 3)).astype(np.float32)
        if case.data in ("sparse", "tied"):
            delta[generator.random(case.shape) < 0.6] = 0
        if case.data == "tied":
            delta = (np.sign(delta) * 2.0 ** generator.integers(-9, -4, case.shape)).astype(np.float32)
            experts.append(delta)
            continue
        experts.append(base + delta)
    return base, experts


def ours(case: Case) -> Floats:
    """The result of this project's method."""
    method = find_method(case.method)
    base, experts = inputs_of(case)
    result: Floats = run_method(method, _base_of(method, case, base), experts, case.parameters, case.own)
    return result


def oracle(case: Case, dtype: torch.dtype = torch.float32) -> NDArray[Any]:
    """mergekit's result for the same inputs."""
    method = find_method(case.method)
    base, experts = inputs_of(case)
    tensors = [torch.from_numpy(expert).to(dtype) for expert in experts]
    theirs = registry.get(case.method)
    with _same_random_numbers(method, case):
        if isinstance(theirs, BatchedMergeMethod):
            result = _run_batched(theirs, method, case, tensors)
        else:
            assert isinstance(theirs, GroupMergeMethod)
            based = method.base == "needed" or (method.base == "optional" and case.based)
            inputs = [torch.from_numpy(base).to(dtype), *tensors] if based else tensors
            group = TensorGroup.from_tensors(inputs, base_index=0 if based else None)
            result = theirs.merge_group(group, **_parameters(theirs, method, case, first=int(based)))
    return np.asarray(result.numpy())


def _base_of(method: Method, case: Case, base: Floats) -> Floats | None:
    return base if method.base == "needed" or case.based else None


def _settled(method: Method, case: Case) -> tuple[dict[str, Value], list[dict[str, Value]]]:
    own = [method.settle(each, "an expert", per_expert=True) for each in case.own]
    return method.settle(case.parameters, "the merge", per_expert=False), own


def _parameters(theirs: Any, method: Method, case: Case, first: int) -> dict[str, Any]:
    """Ours by mergekit's names, those of experts by the inputs' numbers."""
    merge, own = _settled(method, case)
    found: dict[str, Any] = {"int8_mask": False}
    for spec in theirs.spec.parameters:
        if spec.name in merge:
            found[spec.name] = merge[spec.name]
        elif own and spec.name in own[0]:
            each = {number + first: values[spec.name] for number, values in enumerate(own)}
            found[spec.name] = PerInputValues(each)
    return {spec.name: found[spec.name] for spec in theirs.spec.parameters}


def _run_batched(theirs: Any, method: Method, case: Case, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    merge, own = _settled(method, case)
    each = {name: torch.tensor([[values[name] for values in own]]) for name in own[0]}
    batch = TensorBatch(tuple(tensor[None] for tensor in tensors))
    return torch.as_tensor(theirs.merge_batch(batch, **merge, **each)[0])


@contextmanager
def _same_random_numbers(method: Method, case: Case) -> Iterator[None]:
    """mergekit's Bernoulli draws, expert by expert, come from the bits that our masks have."""
    if all(parameter.name != "seed" for parameter in method.parameters):
        yield
        return
    base, experts = inputs_of(case)
    keys = method.start(problem_of(method, base, experts, case.parameters, case.own))["keys"]
    drawing = [key for key, each in zip(keys, case.own, strict=True) if 0 < float(each.get("density", 1.0)) < 1]
    queue = iter(drawing)

    def draw(chances: torch.Tensor) -> torch.Tensor:
        bits = random_bits(next(queue), chances.numel()) >> 1
        return (torch.from_numpy(bits / 2.0**31).reshape(chances.shape) < chances.double()).to(chances.dtype)

    with mock.patch("torch.bernoulli", draw):
        yield


def random_bits(key: int, count: int) -> NDArray[np.uint32]:
    """The 32 bits of each of a tensor's elements under a key."""
    pairs = np.empty(count // 2 + 1, np.uint64)
    mask_kernels.hash_elements(np.uint64(key), 0, count, pairs)
    return pairs.view(np.uint32)[:count]


def magnitudes(case: Case, result: Floats) -> Floats:
    """For each element the sum of the magnitudes that went into it, or its result where that is larger."""
    method = find_method(case.method)
    base, experts = inputs_of(case)
    under = _base_of(method, case, base)
    deltas = method.takes_deltas(based=under is not None)
    problem = problem_of(method, under, experts, case.parameters, case.own)
    found = coefficients_of(method, problem, under, experts)
    gains = np.asarray(found.get("weights", np.ones(len(experts), np.float32)), np.float64)
    gains = gains * np.asarray(found.get("factors", 1.0), np.float64) / _number(found, "divisor")
    gains = np.abs(gains * _number(found, "scale"))
    total = np.abs(base).astype(np.float64) * (deltas or method.base == "needed")
    for gain, expert in zip(gains, experts, strict=True):
        inner = np.abs(expert.astype(np.float64) - base if deltas else expert)
        total += gain * inner
    return np.maximum(total, np.abs(result)).astype(np.float32)


def _number(coefficients: Mapping[str, NDArray[Any]], name: str) -> float:
    return float(np.ravel(coefficients.get(name, np.ones(())))[0])


def at_threshold(case: Case) -> NDArray[np.bool_]:
    """Elements where some expert's delta is as large as a threshold, so that which are kept is open."""
    method = find_method(case.method)
    base, experts = inputs_of(case)
    if case.method == "arcee_fusion":
        return near_threshold(base, experts[0], 2e-7)
    problem = problem_of(method, base, experts, case.parameters, case.own)
    found = coefficients_of(method, problem, base, experts)
    open_ones = np.zeros(case.shape, np.bool_)
    for name in ("thresholds", "ceilings"):
        for limit, expert in zip(found.get(name, ()), experts, strict=name in found):
            open_ones |= (np.abs(expert - base).view(np.uint32) == limit) & (limit > 0)
    return open_ones


def near_threshold(base: Floats, expert: Floats, share: float) -> NDArray[np.bool_]:
    """Elements whose importance, for Arcee Fusion, is off the threshold by less than this share of it."""
    method = find_method("arcee_fusion")
    found = coefficients_of(method, problem_of(method, base, [expert]), base, [expert])
    importance = np.empty(base.size, np.float32)
    row_kernels.importances(expert.reshape(-1), base.reshape(-1), base.shape[-1], importance)
    threshold = float(found["threshold"])
    return np.asarray(np.abs(importance - threshold) < share * threshold).reshape(base.shape)


def to_bfloat16(values: Floats) -> Floats:
    return np.asarray(torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy())


def deviations(case: Case) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """In ulps, of float32 and of bfloat16 after rounding, and which elements stand at a threshold."""
    wide_enough = torch.float64 if case.method == "arcee_fusion" else torch.float32
    mine, theirs = ours(case), oracle(case, wide_enough).astype(np.float32)
    ulp = np.spacing(np.maximum(magnitudes(case, theirs), np.float32(1e-30))).astype(np.float64)
    wide = np.abs(mine.astype(np.float64) - theirs) / ulp
    narrow = np.abs(to_bfloat16(mine).astype(np.float64) - to_bfloat16(theirs)) / (ulp * 65536)
    return wide, narrow, at_threshold(case)


def deviation(method: str, cases: Sequence[Case] | None = None) -> Row:
    """One method's row of the table."""
    chosen = [case for case in (cases or all_cases()) if case.method == method]
    elements = explained = differing = 0
    wide = narrow = 0.0
    for case in chosen:
        all_wide, all_narrow, open_ones = deviations(case)
        elements += all_wide.size
        explained += int((open_ones & (all_wide > 1)).sum())
        differing += int((all_narrow[~open_ones] > 0).sum())
        wide = max(wide, float(all_wide[~open_ones].max(initial=0)))
        narrow = max(narrow, float(all_narrow[~open_ones].max(initial=0)))
    return Row(method, len(chosen), elements, wide, narrow, differing / max(elements, 1), explained)


def measure() -> list[Row]:
    """A row for each method, in the order of the cases."""
    cases = all_cases()
    return [deviation(method, cases) for method in dict.fromkeys(case.method for case in cases)]


def all_cases() -> list[Case]:
    """Those of ``parity_cases``."""
    found: list[Case] = parity_cases.cases(Case)
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| method | cases | float32, ulps | bfloat16, ulps | differ in bfloat16 |", "|---|---|---|---|---|"]
    for row in rows:
        share = f"{row.differing:.4%}" if row.differing else "none"
        lines.append(f"| `{row.method}` | {row.cases} | {row.float32_ulps:.2g} | {row.bfloat16_ulps:.2g} | {share} |")
    return "\n".join(lines)


def main() -> None:

    parser = argparse.ArgumentParser(description="deviation from mergekit, method by method")
    parser.add_argument("--write", type=Path, help="a Markdown file with the marks that the table goes between")
    options = parser.parse_args()
    text = f"{table(measure())}\n\n{__import__('parity_gram').table()}"
    print(text)
    if options.write:
        page = options.write.read_text()
        if BEGIN not in page or END not in page:
            raise SystemExit(f"{options.write} has no {BEGIN} and {END}")
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        options.write.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    main()
