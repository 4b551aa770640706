"""Masks that keep a range of ranks of a delta's magnitudes: the largest for TIES, those after them for breadcrumbs.

A range of ranks becomes a range of magnitudes, from a floor to a ceiling, both float32 bit patterns. All elements that
are equal to one of them are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Apply, Coefficients, Float32, Parameter, Pass, Problem, Stack, Tile
from mergepipe.merge.methods.order_statistics import LOW_HALVES, NO_BIN, find_bin, find_low_half, is_refinable
from mergepipe.merge.methods.task_vectors import mix_coefficients, mix_of, rescale_pass, rescales
from mergepipe.merge.mix import MAGNITUDE, NOTHING

EXACT: Final = Parameter(
    "exact",
    True,
    "cut at exactly the k-th largest magnitude; false: at the resolution of the catalog's histogram, which needs no "
    "reading before",
)

Range = tuple[int, int]
"""The first and the last rank that are kept, counted from 1 for the largest; none are where the last is less."""

Ranges = Callable[[Problem], list[Range]]


@dataclass(frozen=True, slots=True)
class Cut:
    """One expert's floor and ceiling as they are known, how many it keeps, and the bins that a count refines."""

    floor: int = 0
    ceiling: int = MAGNITUDE
    kept: int = 0
    floor_bin: int = NO_BIN
    ceiling_bin: int = NO_BIN


def cut_at_bins(histogram: NDArray[Any] | None, ranks: Range, elements: int) -> Cut:
    """As far as the histogram tells: the floor is its bin's lowest magnitude, the ceiling its bin's highest."""
    first, last = ranks
    if last < first:
        return Cut(floor=NOTHING)
    if histogram is None or (first <= 1 and last >= elements):
        return Cut(kept=elements)
    low, above_low = find_bin(histogram, last)
    high, above_high = find_bin(histogram, first) if first > 1 else (NO_BIN, 0)
    reaching = elements if low == 0 else above_low + int(histogram[low])
    capped = is_refinable(high) or high == 0
    return Cut(
        floor=low << 16,
        ceiling=(high << 16) | 0xFFFF if capped else MAGNITUDE,
        kept=reaching - (above_high if capped else 0),
        floor_bin=low if is_refinable(low) else NO_BIN,
        ceiling_bin=high if is_refinable(high) else NO_BIN,
    )


def start(problem: Problem, ranges: list[Range], *, consensus: bool) -> dict[str, NDArray[Any]]:
    """The mix's coefficients, and those of the cuts.

    ``thresholds`` and ``ceilings`` (K,) and ``bins`` (K, 1 or 2) are uint32, ``kept`` (K,) is uint64. Thresholds are
    those of the bins; ``bins`` has those of both that a pass over the tensor makes exact.
    """
    cuts = _cuts(problem, ranges)
    found = mix_coefficients(problem, consensus=consensus)
    found["thresholds"] = np.array([cut.floor for cut in cuts], np.uint32)
    found["ceilings"] = np.array([cut.ceiling for cut in cuts], np.uint32)
    found["kept"] = np.array([cut.kept for cut in cuts], np.uint64)
    found["bins"] = _bins(cuts)
    return found


def _bins(cuts: list[Cut]) -> NDArray[Any]:
    """Each expert's bins to refine: its floor's, and its ceiling's where any has one."""
    columns = 2 if any(cut.ceiling_bin != NO_BIN for cut in cuts) else 1
    return np.array([(cut.floor_bin, cut.ceiling_bin)[:columns] for cut in cuts], np.uint32)


def _cuts(problem: Problem, ranges: list[Range]) -> list[Cut]:
    each = zip(problem.histograms, ranges, strict=True)
    return [cut_at_bins(histogram, ranks, problem.elements) for histogram, ranks in each]


def passes(problem: Problem, ranges: Ranges) -> tuple[Pass, ...]:
    """A count within the thresholds' bins where they are to be exact, and norms where they are to be kept."""
    found: list[Pass] = []
    bins = _bins(_cuts(problem, ranges(problem)))
    if problem.flag("exact") and bool((bins != NO_BIN).any()):
        found.append(_count_pass(ranges, bins.shape[1]))
    if rescales(problem):
        found.append(_NORMS)
    return tuple(found)


def _count_pass(ranges: Ranges, columns: int) -> Pass:
    def state(problem: Problem) -> NDArray[Any]:
        return np.zeros((len(problem.experts), columns, LOW_HALVES), np.int64)

    def settle(problem: Problem, coefficients: Coefficients, counts: NDArray[Any]) -> Coefficients:
        return _settle_counts(problem, coefficients, counts, ranges(problem))

    return Pass("magnitudes within the thresholds' bins", state, _count, settle, uses=("bins",), add_stack=_count_stack)


def _count(tile: Tile, coefficients: Coefficients, counts: NDArray[Any]) -> None:
    from mergepipe.merge import mask_kernels

    mask_kernels.count_low_halves(tile.experts, coefficients["bins"], counts)


def _count_stack(stack: Stack, coefficients: Coefficients, counts: NDArray[Any]) -> None:
    from mergepipe.merge import tile_kernels

    tile_kernels.count_low_halves_stack(stack.blocks, stack.present, stack.base, coefficients["bins"], counts)


def _settle_counts(
    problem: Problem, coefficients: Coefficients, counts: NDArray[Any], ranges: list[Range]
) -> Coefficients:
    """Exact ``thresholds``, ``ceilings`` and ``kept``."""
    floors, ceilings = coefficients["thresholds"].copy(), coefficients["ceilings"].copy()
    kept = coefficients["kept"].copy()
    for k, (histogram, (first, last)) in enumerate(zip(problem.histograms, ranges, strict=True)):
        low, high = [*(int(number) for number in coefficients["bins"][k]), NO_BIN][:2]
        if histogram is not None and low != NO_BIN:
            _, above = find_bin(histogram, last)
            half, reaching, _ = find_low_half(counts[k, 0], last - above)
            kept[k] -= np.uint64(int(histogram[low]) - reaching)
            floors[k] |= np.uint32(half)
        if histogram is not None and high != NO_BIN:
            _, above = find_bin(histogram, first)
            half, _, over = find_low_half(counts[k, 1], first - above)
            kept[k] -= np.uint64(over)
            ceilings[k] = np.uint32((high << 16) | half)
    return {**coefficients, "thresholds": floors, "ceilings": ceilings, "kept": kept}


def _add_norms(tile: Tile, coefficients: Coefficients, lanes: NDArray[Any]) -> None:
    from mergepipe.merge import mask_kernels

    floors, ceilings = coefficients["thresholds"], coefficients["ceilings"]
    mask_kernels.add_between(tile.experts, tile.start, floors, ceilings, lanes)


_NORMS: Final = rescale_pass("norms between thresholds", _add_norms, uses=("thresholds", "ceilings"))


def apply_with(*, consensus: bool) -> Apply:
    """The function over tiles, for a sum or a consensus of signs."""

    def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
        from mergepipe.merge import mask_kernels

        floors, ceilings = coefficients["thresholds"], coefficients["ceilings"]
        mix = mix_of(coefficients, consensus=consensus)
        mask_kernels.merge_between(tile.base, tile.experts, floors, ceilings, mix, out)

    return apply
