"""Spherical interpolation between the base and one expert.

Source: Shoemake, "Animating rotation with quaternion curves", 1985 (doi:10.1145/325334.325242).

Nearly parallel and nearly opposite tensors (``|cos|`` above 0.9995) are interpolated on the straight line. The norms
and the product are float64 sums of exact products, so the angle is good to all digits of a float32 where it is used.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import gram
from mergepipe.merge.method import Coefficients, Method, Parameter, Pass, Problem, Tile, scalar
from mergepipe.merge.span import combine, final, keeps, reach


def start(problem: Problem) -> Coefficients:
    return {"t": scalar(problem.number("t"), np.float64)}


def _state(_: Problem) -> NDArray[np.float64]:
    return np.zeros((2, 2))


def _add(tile: Tile, _: Coefficients, state: NDArray[Any]) -> None:
    from mergepipe.merge import gram_kernels

    gram_kernels.add_pair_gram(tile.base, tile.experts[0], state)


def settle(_: Problem, coefficients: Coefficients, state: NDArray[Any]) -> Coefficients:
    """The factors of the base and of the expert, from their three inner products."""
    factors = gram.slerp(state[0, 0], state[0, 1], state[1, 1], float(coefficients["t"]))
    return final(factors[1:], float(factors[0]))


def passes(_: Problem) -> tuple[Pass, ...]:
    return (Pass("gram_with_base", _state, _add, settle),)


SLERP: Final = Method(
    name="slerp",
    version=1,
    summary="along the arc between the base and one expert",
    source="Shoemake 1985, doi:10.1145/325334.325242",
    parameters=(Parameter("t", None, "how far to go from the base (0) to the expert (1)"),),
    start=start,
    passes=passes,
    apply=combine,
    takes="weights",
    error="linear",
    reach=reach,
    keeps=keeps,
    idempotent=True,
    experts=(1, 1),
)
