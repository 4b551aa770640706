"""The weighted mean of the experts' directions, or of their deltas', at the weighted average of their lengths.

Source: Goddard, "Multi-SLERP", 2025 (https://goddard.blog/posts/multislerp-wow-what-a-cool-idea).

A tensor that is zero in all experts stays zero. Where the weighted directions of more than two experts cancel out they
have no mean, which is an error; those of two are then mixed linearly.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import gram
from mergepipe.merge.method import WEIGHT, Coefficients, Method, Parameter, Pass, Problem, scalar
from mergepipe.merge.span import based_factor, combine, final, gram_pass, keeps_on_base, reach
from mergepipe.store.errors import UsageError


def start(problem: Problem) -> Coefficients:
    weights = problem.own("weight")
    if len(weights) == 1:
        return final(np.ones(1), based_factor(problem))
    if problem.flag("normalize_weights"):
        total = float(np.sum(weights))
        if total == 0:
            raise UsageError(
                "multislerp: the weights sum to 0, so they cannot be normalized",
                hint="Give other weights, or normalize_weights=false.",
            )
        weights = weights / total
    return {"weights": weights, "eps": scalar(problem.number("eps"), np.float64)}


def passes(problem: Problem) -> tuple[Pass, ...]:
    return (gram_pass(settle, deltas=problem.based),) if len(problem.experts) > 1 else ()


def settle(problem: Problem, coefficients: Coefficients, state: NDArray[Any]) -> Coefficients:
    """The experts' factors; raises UsageError where there is no mean."""
    weights = coefficients["weights"]
    factors = gram.multislerp(gram.mirrored(state), weights, float(coefficients["eps"]))
    if factors is None and (len(weights) == 2 or not state.any()):
        factors = weights
    if factors is None:
        raise UsageError(
            "multislerp: the weighted directions of the experts cancel out, so they have no mean",
            hint="Give other weights, or merge these tensors by another method.",
        )
    return final(factors, based_factor(problem))


MULTISLERP: Final = Method(
    name="multislerp",
    version=1,
    summary="mean direction of the experts or of their deltas, at their mean length",
    source="Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    parameters=(
        WEIGHT,
        Parameter("normalize_weights", True, "divide the weights by their sum"),
        Parameter("eps", 1e-8, "added to each norm before it divides", minimum=0.0),
    ),
    start=start,
    passes=passes,
    apply=combine,
    takes="either",
    error="linear",
    reach=reach,
    keeps=keeps_on_base,
    base="optional",
)
