"""SCE: select the elements where the experts differ most, weigh experts by their energy, erase minority signs.

Source: Wan et al., "FuseChat", 2024 (arXiv 2408.07990).

The variance over the experts of their deltas selects: ``select_topk`` of those elements where it is not zero, and all
that are equal to the smallest selected. An expert's weight is the mean square of its selected deltas.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Coefficients, Float32, Method, Parameter, Pass, Problem, Tile, scalar
from mergepipe.merge.methods.order_statistics import BINS, LOW_HALVES, NO_BIN, find_bin, find_low_half, is_refinable
from mergepipe.merge.methods.task_vectors import ROUNDING
from mergepipe.merge.mix import LANES, NOTHING

_LEAST_ENERGY: Final = 1e-6


def start(problem: Problem) -> Coefficients:
    """``floor``, the variance's bit pattern, ``bin`` and ``rank`` of the smallest that is selected, uint32 and uint64.

    Until the passes say better, all is selected.
    """
    floor = NOTHING if problem.number("select_topk") <= 0 else 0
    return {"floor": scalar(floor, np.uint32), "bin": scalar(NO_BIN, np.uint32), "rank": scalar(0, np.uint64)}


def histogram_state(_: Problem) -> NDArray[Any]:
    """(32768,) int64."""
    return np.zeros(BINS, np.int64)


def add_variances(tile: Tile, _: Coefficients, histogram: NDArray[Any]) -> None:
    """Count a tile's variances that are not zero."""
    from mergepipe.merge import choice_kernels

    choice_kernels.count_variances(tile.experts, histogram)


def settle_bin(problem: Problem, coefficients: Coefficients, histogram: NDArray[Any]) -> Coefficients:
    """``bin`` of the k-th largest variance, ``rank`` within it, and the bin's ``floor``.

    k is a product in float32, as in mergekit.
    """
    kept = int(np.float32(histogram.sum()) * np.float32(problem.number("select_topk")))
    if kept == 0:
        return {**coefficients, "floor": scalar(NOTHING, np.uint32)}
    found, above = find_bin(histogram, kept)
    return {
        "floor": scalar(max(found << 16, 1), np.uint32),
        "bin": scalar(found if is_refinable(found) else NO_BIN, np.uint32),
        "rank": scalar(kept - above, np.uint64),
    }


def count_state(_: Problem) -> NDArray[Any]:
    """(65536,) int64."""
    return np.zeros(LOW_HALVES, np.int64)


def add_counts(tile: Tile, coefficients: Coefficients, counts: NDArray[Any]) -> None:
    """Count a tile's variances within the bin."""
    from mergepipe.merge import choice_kernels

    if coefficients["bin"] != NO_BIN:
        choice_kernels.count_variances_within(tile.experts, np.uint32(coefficients["bin"]), counts)


def settle_floor(_: Problem, coefficients: Coefficients, counts: NDArray[Any]) -> Coefficients:
    """The exact ``floor``."""
    if coefficients["bin"] == NO_BIN:
        return coefficients
    half, _reaching, _above = find_low_half(counts, int(coefficients["rank"]))
    return {**coefficients, "floor": scalar((int(coefficients["bin"]) << 16) | half, np.uint32)}


def energy_state(problem: Problem) -> NDArray[Any]:
    """(K, 64) float64: lanes of each delta's squares."""
    return np.zeros((len(problem.experts), LANES), np.float64)


def add_energies(tile: Tile, coefficients: Coefficients, lanes: NDArray[Any]) -> None:
    """Add the squares of what is selected in a tile."""
    from mergepipe.merge import choice_kernels

    choice_kernels.add_squares(tile.experts, tile.start, np.uint32(coefficients["floor"]), lanes)


def settle_weights(problem: Problem, coefficients: Coefficients, lanes: NDArray[Any]) -> Coefficients:
    """``weights`` (K,) float32: shares of the selected energy, equal ones where there is nearly none."""
    energies = lanes.sum(axis=1) / max(problem.elements, 1)
    total = energies.sum()
    weights = np.full(len(energies), 1 / len(energies)) if total < _LEAST_ENERGY else energies / total
    return {**coefficients, "weights": weights.astype(np.float32)}


_SELECT: Final = (
    Pass("variances", histogram_state, add_variances, settle_bin),
    Pass("variances within the floor's bin", count_state, add_counts, settle_floor, uses=("bin",)),
)
_WEIGH: Final = Pass("energies of what is selected", energy_state, add_energies, settle_weights, uses=("floor",))


def passes(problem: Problem) -> tuple[Pass, ...]:
    """For the weights, and before it for the selection."""
    return (*_SELECT, _WEIGH) if 0 < problem.number("select_topk") < 1 else (_WEIGH,)


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """The base plus, where the variance reaches the floor, the weighted mean of the deltas with their sum's sign."""
    from mergepipe.merge import choice_kernels

    floor = np.uint32(coefficients["floor"])
    choice_kernels.merge_selected(tile.base, tile.experts, coefficients["weights"], floor, out)


def reach(problem: Problem, _: Coefficients) -> NDArray[np.float64]:
    """An element is a weighted mean of some deltas, with weights of one sign: no larger than the largest."""
    return np.full(len(problem.experts), ROUNDING)


SCE: Final = Method(
    name="sce",
    version=1,
    summary="where the experts differ most, merged by energy where their signs agree",
    source="Wan et al. 2024, arXiv 2408.07990",
    parameters=(
        Parameter("select_topk", 1.0, "share of the elements to select, by variance", minimum=0.0, maximum=1.0),
    ),
    start=start,
    apply=apply,
    takes="deltas",
    error="whole",
    reach=reach,
    passes=passes,
    pinned=("floor", "weights"),
)
