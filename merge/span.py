"""What the methods share whose result is a linear combination of its inputs: one pass for the inner products, one sum.

The coefficients of a tensor are ``factors`` (K,), and ``base_factor``; where each row or column of a tensor has its
own, there is no bound for what is not read. All are rounded to 32 bits (:func:`gram.firm`).
The kernels are imported where they run: declaring methods takes no compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import gram
from mergepipe.merge.method import Coefficients, Float32, Pass, Problem, Tile, scalar

Float64 = NDArray[np.float64]
Settle = Callable[[Problem, Coefficients, NDArray[Any]], Coefficients]


def gram_pass(settle: Settle, *, deltas: bool) -> Pass:
    """The pass for the experts' Gram matrix, a state that all methods share which take the same of the experts."""
    return Pass("gram_of_deltas" if deltas else "gram_of_weights", _state, _add, settle)


def _state(problem: Problem) -> Float64:
    return np.zeros((len(problem.experts), len(problem.experts)))


def _add(tile: Tile, _: Coefficients, state: NDArray[Any]) -> None:
    from mergepipe.merge import gram_kernels

    gram_kernels.add_gram(tile.experts, state)


def final(factors: Float64, base_factor: float) -> Coefficients:
    """The coefficients of the combination, ``base_factor * base + sum_k factors[k] * expert_k``."""
    return {
        "factors": gram.firm(np.ascontiguousarray(factors, np.float64)),
        "base_factor": gram.firm(scalar(base_factor, np.float64)),
    }


def based_factor(problem: Problem) -> float:
    """The base's factor where the experts are deltas if there is a base, and weights if not."""
    return 1.0 if problem.based else 0.0


def combine(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """The linear combination, rounded once."""
    from mergepipe.merge import gram_kernels

    base_factor, factors = float(coefficients["base_factor"]), coefficients["factors"]
    gram_kernels.combine(tile.base, tile.experts, base_factor, factors, out)


def combine_rows(tile: Tile, base_factor: float, factors_of: Callable[[Float64], Float64], out: Float32) -> None:
    """The combination with factors (K, rows) for each row, from the rows' Gram matrices (K, K, rows)."""
    from mergepipe.merge import gram_kernels

    if not out.size:
        return
    count = len(tile.experts)
    grams = np.empty((count, count, out.size // tile.row))
    gram_kernels.row_grams(tile.experts, tile.row, grams)
    factors = np.ascontiguousarray(gram.firm(factors_of(grams)))
    gram_kernels.combine_rows(tile.base, tile.experts, base_factor, factors, out)


def reach(problem: Problem, coefficients: Coefficients) -> Float64:
    """The factors, with their signs; without limit before the pass, and where rows or columns have their own."""
    factors = coefficients.get("factors")
    if factors is None or factors.ndim != 1:
        return np.full(len(problem.experts), np.inf)
    return np.asarray(factors, np.float64)


def keeps(_: Problem, coefficients: Coefficients) -> bool:
    """Whether places in which no expert differs stay: where the factors sum to 1, not known before the pass."""
    factors = coefficients.get("factors")
    if factors is None or factors.ndim != 1:
        return False
    whole = float(np.sum(factors)) + float(coefficients["base_factor"])
    return abs(whole - 1) <= gram.BLUR / 4


def keeps_on_base(problem: Problem, coefficients: Coefficients) -> bool:
    """:func:`keeps` where experts are deltas if there is a base: zeros then, whatever the factors are."""
    return problem.based or keeps(problem, coefficients)
