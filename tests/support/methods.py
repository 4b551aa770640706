"""Runs a method on arrays as the engine does: a problem, its passes over blocks and tiles, then the result by tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Coefficients, Float32, Method, Problem, Tile, Value
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.norms import HISTOGRAM_BINS
from mergepipe.store.statistics import block_statistics

Own = Sequence[Mapping[str, Value]]


def problem_of(
    method: Method,
    base: Float32 | None,
    experts: Sequence[Float32],
    parameters: Mapping[str, Value] | None = None,
    own: Own | None = None,
    *,
    keys: Sequence[int] | None = None,
) -> Problem:
    """What the engine tells a method of one tensor; ``own`` are the parameters of each expert."""
    settled = [method.settle(each, "an expert", per_expert=True) for each in own or [{} for _ in experts]]
    histograms: list[NDArray[np.int64] | None] = [None for _ in experts]
    if method.histograms:
        assert base is not None
        histograms = [histogram_of(expert, base) for expert in experts]
    return Problem(
        shape=experts[0].shape,
        parameters=method.settle(parameters or {}, "the merge", per_expert=False),
        experts=tuple(settled),
        based=base is not None,
        keys=tuple(keys or [1000 + number for number in range(len(experts))]),
        histograms=tuple(histograms),
    )


def histogram_of(expert: Float32, base: Float32) -> NDArray[np.int64] | None:
    """Magnitudes of the delta as ingest counts them; None where there is none."""
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    new, old = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (expert, base))
    statistics = block_statistics(new, old, DTYPES["F32"], DTYPES["F32"], histogram)
    return histogram if statistics.changed else None


def run_method(
    method: Method,
    base: Float32 | None,
    experts: Sequence[Float32],
    parameters: Mapping[str, Value] | None = None,
    own: Own | None = None,
    *,
    tile: int | Sequence[int] = 4096,
    block: int | None = None,
    keys: Sequence[int] | None = None,
) -> Float32:
    """The merged array, with ``tile`` elements at a time (or those numbers of them in turn).

    Passes go over blocks of ``block`` elements, each with a state of its own.
    """
    problem = problem_of(method, base, experts, parameters, own, keys=keys)
    coefficients = coefficients_of(method, problem, base, experts, tile=tile, block=block)
    out = np.empty(problem.elements, np.float32)
    for piece in tiles_of(method, problem, base, experts, 0, problem.elements, tile):
        start, stop = piece.start, piece.start + piece.base.size
        method.apply(piece, coefficients, out[start:stop])
    return out.reshape(problem.shape)


def coefficients_of(
    method: Method,
    problem: Problem,
    base: Float32 | None,
    experts: Sequence[Float32],
    *,
    tile: int | Sequence[int] = 4096,
    block: int | None = None,
) -> Coefficients:
    """What is known of a tensor once its passes are done."""
    coefficients = method.start(problem)
    step = _whole_rows(method, problem, block or max(problem.elements, 1))
    for reading in method.passes(problem):
        seen = {name: coefficients[name] for name in reading.uses}
        total = reading.state(problem)
        for begin in range(0, problem.elements, step):
            state = reading.state(problem)
            end = min(begin + step, problem.elements)
            for piece in tiles_of(method, problem, base, experts, begin, end, tile):
                reading.add(piece, seen, state)
            total += state
        coefficients = reading.settle(problem, coefficients, total)
    return coefficients


def tiles_of(
    method: Method,
    problem: Problem,
    base: Float32 | None,
    experts: Sequence[Float32],
    start: int,
    stop: int,
    sizes: int | Sequence[int],
) -> Iterator[Tile]:
    """Copies of a run of the inputs, cut into tiles."""
    turn = itertools.cycle([sizes] if isinstance(sizes, int) else sizes)
    flat: list[NDArray[Any]] = [np.ascontiguousarray(expert).reshape(-1) for expert in experts]
    under = np.zeros(problem.elements, np.float32) if base is None else np.ascontiguousarray(base).reshape(-1)
    while start < stop:
        end = min(start + _whole_rows(method, problem, next(turn)), stop)
        rows = np.stack([expert[start:end] for expert in flat])
        if method.takes_deltas(based=base is not None):
            rows -= under[start:end]
        yield Tile(under[start:end].copy(), rows, start, problem.row_elements)
        start = end


def _whole_rows(method: Method, problem: Problem, elements: int) -> int:
    if not method.rows:
        return elements
    row = max(problem.row_elements, 1)
    return max(elements // row, 1) * row
