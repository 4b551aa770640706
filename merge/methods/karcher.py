"""The Karcher mean of the experts' directions: the point of the sphere with the least sum of squared angles to them.

Source: Karcher, "Riemannian center of mass and mollifier smoothing", 1977 (doi:10.1002/cpa.3160300502); for models,
arXiv 2603.04972.

The iteration never leaves the span of the experts, so it runs on their inner products. An expert whose direction is
opposite to the mean does not pull it, as no way there is the nearest.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import gram
from mergepipe.merge.method import Coefficients, Method, Parameter, Pass, Problem, scalar
from mergepipe.merge.span import combine, final, gram_pass, keeps, reach


def start(problem: Problem) -> Coefficients:
    if len(problem.experts) == 1:
        return final(np.ones(1), 0.0)
    return {
        "max_iter": scalar(problem.number("max_iter"), np.int64),
        "tol": scalar(problem.number("tol"), np.float64),
    }


def passes(problem: Problem) -> tuple[Pass, ...]:
    return (gram_pass(settle, deltas=False),) if len(problem.experts) > 1 else ()


def settle(_: Problem, coefficients: Coefficients, state: NDArray[Any]) -> Coefficients:
    """The experts' factors, by the iteration on their Gram matrix."""
    factors = gram.karcher(gram.mirrored(state), int(coefficients["max_iter"]), float(coefficients["tol"]))
    return final(factors, 0.0)


KARCHER: Final = Method(
    name="karcher",
    version=1,
    summary="Riemannian mean of the experts' directions, at their mean length",
    source="Karcher 1977, doi:10.1002/cpa.3160300502; arXiv 2603.04972",
    parameters=(
        Parameter("max_iter", 10.0, "steps of the iteration, at most", minimum=0, maximum=10_000, whole=True),
        Parameter("tol", 1e-5, "a step that is shorter is the last; inputs no longer do not count", minimum=0.0),
    ),
    start=start,
    passes=passes,
    apply=combine,
    takes="weights",
    error="linear",
    reach=reach,
    keeps=keeps,
    idempotent=True,
    base="unused",
)
