"""Arcee Fusion: take the expert's weights where the change is important.

Source: the ``arcee_fusion`` method of mergekit (https://arcee.ai).

An element's importance is its change's magnitude times the Kullback-Leibler divergence between the softmaxes of its
row, after and before. Those are taken that reach the median plus 1.5 times the distance between the quartiles, of all
elements; mergekit estimates them from a sample of a million where there are more.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Coefficients, Float32, Method, Pass, Problem, Tile, scalar
from mergepipe.merge.methods.order_statistics import BINS, LOW_HALVES, NO_BIN, find_bin, find_low_half, is_refinable


def start(_: Problem) -> Coefficients:
    """Nothing is known yet."""
    return {}


def histogram_state(_: Problem) -> NDArray[Any]:
    """(32768,) int64."""
    return np.zeros(BINS, np.int64)


def add_histogram(tile: Tile, _: Coefficients, histogram: NDArray[Any]) -> None:
    """Count a tile's importances that are not zero."""
    from mergepipe.merge import row_kernels

    row_kernels.count_not_zero(_importances(tile), histogram)


def settle_bins(problem: Problem, coefficients: Coefficients, histogram: NDArray[Any]) -> Coefficients:
    """``quartiles`` (3,) float32 to their bins' lowest value, their ``bins`` uint32 and ``ranks`` in them uint64.

    Elements that were not counted are zero.
    """
    last = problem.elements - 1
    found = [find_bin(histogram, problem.elements - last * quarter // 4) for quarter in (1, 2, 3)]
    ranks = [problem.elements - last * quarter // 4 - found[quarter - 1][1] for quarter in (1, 2, 3)]
    numbers = np.array([number for number, _ in found], np.uint32)
    bins = np.array([number if is_refinable(number) else NO_BIN for number, _ in found], np.uint32)
    quartiles = (numbers << np.uint32(16)).view(np.float32)
    return {**coefficients, "quartiles": quartiles, "bins": bins, "ranks": np.array(ranks, np.uint64)}


def count_state(_: Problem) -> NDArray[Any]:
    """(3, 65536) int64."""
    return np.zeros((3, LOW_HALVES), np.int64)


def add_counts(tile: Tile, coefficients: Coefficients, counts: NDArray[Any]) -> None:
    """Count a tile's importances within the quartiles' bins."""
    from mergepipe.merge import mask_kernels

    mask_kernels.count_low_halves(_importances(tile)[None], coefficients["bins"][None], counts[None])


def settle_threshold(_: Problem, coefficients: Coefficients, counts: NDArray[Any]) -> Coefficients:
    """The exact ``quartiles``, and ``threshold``, float32."""
    patterns = coefficients["quartiles"].view(np.uint32).copy()
    for number, (chosen, rank) in enumerate(zip(coefficients["bins"], coefficients["ranks"], strict=True)):
        if chosen != NO_BIN:
            patterns[number] |= np.uint32(find_low_half(counts[number], int(rank))[0])
    first, median, third = patterns.view(np.float32)
    threshold = median + np.float32(1.5) * (third - first)
    return {**coefficients, "quartiles": patterns.view(np.float32), "threshold": scalar(threshold)}


_PASSES: Final = (
    Pass("importances", histogram_state, add_histogram, settle_bins),
    Pass("importances within the quartiles' bins", count_state, add_counts, settle_threshold, uses=("bins",)),
)


def passes(_: Problem) -> tuple[Pass, ...]:
    """Two, for exact quartiles."""
    return _PASSES


def _importances(tile: Tile) -> Float32:
    from mergepipe.merge import row_kernels

    found = np.empty_like(tile.base)
    row_kernels.importances(tile.experts[0], tile.base, tile.row, found)
    return found


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """The expert's weight where the importance reaches the threshold, the base's elsewhere."""
    from mergepipe.merge import row_kernels

    row_kernels.importances(tile.experts[0], tile.base, tile.row, out)
    row_kernels.fuse(tile.base, tile.experts[0], coefficients["threshold"][()], out)


def reach(_: Problem, __: Coefficients) -> NDArray[np.float64]:
    """An element is the base's or the expert's."""
    return np.ones(1)


ARCEE_FUSION: Final = Method(
    name="arcee_fusion",
    version=1,
    summary="the expert's weights where the change is important",
    source="Arcee, mergekit (arcee.ai)",
    parameters=(),
    start=start,
    apply=apply,
    takes="weights",
    error="whole",
    reach=reach,
    passes=passes,
    experts=(1, 1),
    rows=True,
    pinned=("threshold",),
)
