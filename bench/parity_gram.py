"""How far slerp, nuslerp, multislerp, karcher and model_stock are from mergekit's functions run in float64.

These methods take sums over whole tensors. mergekit's float32 is itself off by what such sums lose, and by the rounding
of each step, so the reference is the same function in float64, on the deltas as float32 has them; the table shows
mergekit's own float32 beside ours. `parity.py` prints and writes both tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from support.gram import CASES, KINDS, SHAPES, Case, exact, make, ours, summands, theirs, unit

HEAD: Final = """\
| method | cases | float32, ulps | bfloat16, ulps | mergekit's float32, ulps |
|---|---|---|---|---|"""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class GramRow:
    """Greatest deviations from the float64 result, in ulps of the largest summand; the last is mergekit's float32."""

    method: str
    cases: int
    float32_ulps: float
    bfloat16_ulps: float
    their_ulps: float


def measure() -> list[GramRow]:
    """A row for each method."""
    return [_row(method) for method in dict.fromkeys(case.method for case in CASES)]


def _row(method: str) -> GramRow:
    found = np.array(list(_deviations(method)))
    return GramRow(method, len(found), *found.max(axis=0))


def _deviations(method: str) -> Iterator[tuple[float, float, float]]:
    """For each case, kind of data and shape: ours in float32 and in bfloat16, theirs in float32."""
    for case in CASES:
        for kind in KINDS if case.method == method else ():
            for number, shape in enumerate(SHAPES):
                base, experts = make(kind, case.experts, shape, number)
                try:
                    wanted = exact(case, base, experts)
                except ValueError:  # mergekit has no result: more than two deltas, all of them zero
                    continue
                yield _deviation(case, base, experts, wanted)


def _deviation(case: Case, base: Any, experts: Any, wanted: Array) -> tuple[float, float, float]:
    mine, _, reach = ours(case, base, experts)
    scale = summands(case, base, experts, wanted, reach)
    narrow = np.abs(_narrow(mine) - _narrow(wanted)) / unit(scale, "bfloat16")
    single = np.abs(theirs(case, base, experts) - wanted) / unit(scale)
    return float(np.max(np.abs(mine - wanted) / unit(scale))), float(narrow.max()), float(single.max())


def _narrow(values: NDArray[Any]) -> Array:
    return np.asarray(torch.from_numpy(values).float().bfloat16().double().numpy(), np.float64)


def table(rows: Callable[[], list[GramRow]] = measure) -> str:
    """The rows in Markdown."""
    lines = [
        f"| `{row.method}` | {row.cases} | {row.float32_ulps:.2g} | {row.bfloat16_ulps:.2g} | {row.their_ulps:.2g} |"
        for row in rows()
    ]
    return "\n".join([HEAD, *lines])
