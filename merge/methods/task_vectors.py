"""What the methods on task vectors share: ``base + lambda * mix(weight_k * sparse(delta_k))``.

They differ in how a delta is made sparse, and in whether the mix is a sum or a consensus of signs (TIES).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import LAMBDA, WEIGHT, Coefficients, Parameter, Pass, Problem, Tile, scalar
from mergepipe.merge.mix import LANES, Mix
from mergepipe.store.errors import UsageError

ROUNDING: Final = 1 + 2.0**-18  # bounds are for exact arithmetic; float32 may be off by this
DENSITY: Final = Parameter(
    "density", 1.0, "share of each tensor's delta to keep", minimum=0.0, maximum=1.0, above=True, per_expert=True
)
_SMALLEST_SUM: Final = 1e-8
_SMALLEST_NORM: Final = 1e-7


def parameters(*own: Parameter, consensus: bool, normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
    """Those of all such methods, with these defaults, and a method's own."""
    by = "the sum of the weights that agreed" if consensus else "the sum of the weights"
    return (
        WEIGHT,
        DENSITY,
        *own,
        LAMBDA,
        Parameter("normalize", normalize, f"divide by {by}"),
        Parameter("rescale", rescale, "multiply what is kept so that a delta's L1 norm stays as it was"),
    )


def mix_coefficients(problem: Problem, *, consensus: bool) -> dict[str, NDArray[Any]]:
    """``weights`` (K,), ``scale``, ``divisor`` float32 and ``normalize`` uint32.

    Weights that cancel to less than 1e-8 divide by 1. ``factors`` (K,) are there where nothing is rescaled.
    """
    weights = problem.own("weight").astype(np.float32)
    normalize = problem.flag("normalize")
    total = math.fsum(weights)
    if normalize and math.fsum(abs(weights)) > float(np.finfo(np.float32).max):
        raise UsageError("the weights are too large together", hint="Results are computed in float32.")
    divided = normalize and not consensus and abs(total) >= _SMALLEST_SUM
    found = {
        "weights": weights,
        "scale": scalar(problem.number("lambda")),
        "divisor": scalar(total if divided else 1.0),
        "normalize": scalar(normalize, np.uint32),
    }
    if not rescales(problem):
        found["factors"] = np.ones(len(weights), np.float32)
    return found


def mix_of(coefficients: Coefficients, *, consensus: bool) -> Mix:
    """The coefficients as the kernels take them."""
    return Mix(
        coefficients["weights"],
        coefficients["factors"],
        np.float32(coefficients["scale"]),
        np.float32(coefficients["divisor"]),
        consensus,
        bool(coefficients["normalize"]),
    )


def rescales(problem: Problem) -> bool:
    """Whether norms have to be known: something is left out, and what is kept is to make up for it."""
    return problem.flag("rescale") and any(0 < density < 1 for density in problem.own("density"))


def rescale_pass(name: str, add: Callable[[Tile, Coefficients, NDArray[Any]], None], uses: tuple[str, ...]) -> Pass:
    """The pass that sums magnitudes before and after a mask: ``add`` fills lanes, (K, 2, 64) float64."""
    return Pass(name, _lanes, add, _settle_factors, uses)


def _lanes(problem: Problem) -> NDArray[Any]:
    return np.zeros((len(problem.experts), 2, LANES), np.float64)


def _settle_factors(problem: Problem, coefficients: Coefficients, lanes: NDArray[Any]) -> Coefficients:
    """``factors`` (K,) float32: the L1 norm before over that after, 1 where either is nearly zero."""
    before, after = lanes.sum(axis=2).T
    whole = problem.own("density") >= 1
    small = whole | (before < _SMALLEST_NORM) | (after < _SMALLEST_NORM)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        factors = np.where(small, 1.0, before / np.where(small, 1.0, after))
        return {**coefficients, "factors": factors.astype(np.float32)}


def additive_reach(_: Problem, coefficients: Coefficients) -> NDArray[np.float64]:
    """Each expert adds its masked delta, times its factor and weight."""
    scale = abs(float(coefficients["scale"]) / float(coefficients["divisor"]))
    return np.asarray(_factors(coefficients) * np.abs(coefficients["weights"].astype(np.float64)) * scale * ROUNDING)


def consensus_reach(_: Problem, coefficients: Coefficients) -> NDArray[np.float64]:
    """With weights of one sign, normalized, an element is a weighted mean of some deltas: no larger than the largest,
    so its square is at most the sum of theirs. Not normalized it is at most ``sum_k |w_k d_k|``, whose square is at
    most K times the sum of the squares (Cauchy and Schwarz). With weights of both signs the divisor may vanish.
    """
    weights = coefficients["weights"].astype(np.float64)
    scale = abs(float(coefficients["scale"])) * ROUNDING
    if not bool(coefficients["normalize"]):
        return np.asarray(_factors(coefficients) * np.abs(weights) * scale * math.sqrt(len(weights)))
    if bool((weights < 0).any()):
        return np.full(len(weights), math.inf)
    return np.asarray(np.where(weights == 0, 0.0, _factors(coefficients)) * scale)


def _factors(coefficients: Coefficients) -> NDArray[np.float64]:
    """Infinite before the pass that finds them."""
    factors = coefficients.get("factors")
    if factors is None:
        return np.full(len(coefficients["weights"]), math.inf)
    return np.asarray(factors.astype(np.float64))
