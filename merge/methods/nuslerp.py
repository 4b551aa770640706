"""Spherical interpolation between two experts, or between their deltas where there is a base.

Source: mergekit's ``nuslerp`` (Goddard et al., "Arcee's MergeKit", 2024, arXiv 2403.13257).

The arc is that of the whole tensor (``nuslerp_flatten``, the default), of each row, or of each column
(``nuslerp_row_wise``, whose name is mergekit's). Only tensors whose cosine is 1 or -1 to a float32 count as collinear
and are interpolated on the straight line. Tensors that are nearly opposite have factors as large as the inverse of
the angle's sine, and float32 inputs do not determine them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import gram
from mergepipe.merge.method import WEIGHT, Coefficients, Float32, Method, Parameter, Pass, Problem, Tile, scalar
from mergepipe.merge.span import based_factor, combine, combine_rows, final, gram_pass, keeps_on_base, reach


def start(problem: Problem) -> Coefficients:
    first, second = problem.own("weight")
    total = first + second
    return {
        "t": scalar(0.5 if abs(total) < 1e-6 else second / total, np.float64),
        "base_factor": scalar(based_factor(problem), np.float64),
    }


def passes(problem: Problem) -> tuple[Pass, ...]:
    """None where rows have arcs of their own: a tile has whole ones."""
    if problem.flag("nuslerp_flatten"):
        return (gram_pass(settle, deltas=problem.based),)
    if problem.flag("nuslerp_row_wise") and len(problem.shape) > 1:
        name = "columns_of_deltas" if problem.based else "columns_of_weights"
        return (Pass(name, _column_state, _add_columns, settle_columns),)
    return ()


def settle(_: Problem, coefficients: Coefficients, state: NDArray[Any]) -> Coefficients:
    factors = gram.nuslerp(state[0, 0], state[0, 1], state[1, 1], float(coefficients["t"]))
    return final(factors, float(coefficients["base_factor"]))


def _column_state(problem: Problem) -> NDArray[np.float64]:
    return np.zeros((3, problem.elements // max(problem.shape[0], 1)))


def _add_columns(tile: Tile, _: Coefficients, state: NDArray[Any]) -> None:
    from mergepipe.merge import gram_kernels

    gram_kernels.add_columns(tile.experts, tile.start, state)


def settle_columns(_: Problem, coefficients: Coefficients, state: NDArray[Any]) -> Coefficients:
    factors = gram.nuslerp(state[0], state[1], state[2], float(coefficients["t"]))
    return final(factors, float(coefficients["base_factor"]))


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """``base + (sin((1 - t) angle) * x_1 + sin(t angle) * x_2) / sin(angle)``, the base where there is one."""
    from mergepipe.merge import gram_kernels

    base_factor = float(coefficients["base_factor"])
    factors = coefficients.get("factors")
    if factors is None:
        combine_rows(tile, base_factor, partial(_of_rows, t=float(coefficients["t"])), out)
    elif factors.ndim == 1:
        combine(tile, coefficients, out)
    else:
        gram_kernels.combine_columns(tile.base, tile.experts, tile.start, base_factor, factors, out)


def _of_rows(grams: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    return gram.nuslerp(grams[0, 0], grams[0, 1], grams[1, 1], t)


NUSLERP: Final = Method(
    name="nuslerp",
    version=1,
    summary="along the arc between two experts, or between their deltas",
    source="mergekit; Goddard et al. 2024, arXiv 2403.13257",
    parameters=(
        WEIGHT,
        Parameter("nuslerp_flatten", True, "one angle for the whole tensor"),
        Parameter("nuslerp_row_wise", False, "without flatten: an angle for each column, not for each row"),
    ),
    start=start,
    passes=passes,
    apply=apply,
    takes="either",
    error="linear",
    reach=reach,
    keeps=keeps_on_base,
    idempotent=True,
    base="optional",
    experts=(2, 2),
    rows=True,
    previews=lambda problem: problem.flag("nuslerp_flatten"),
)
