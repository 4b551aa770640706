"""The weighted average of the experts' weights.

Source: Wortsman et al., "Model soups", 2022 (arXiv 2203.05482).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import WEIGHT, Coefficients, Float32, Method, Parameter, Problem, Stack, Tile, scalar
from mergepipe.store.errors import UsageError

_CANCELLED: Final = 2.0**-20  # weights that sum to less of their magnitudes are 0.1 + 0.2 - 0.3 in float32: rounding


def start(problem: Problem) -> Coefficients:
    """``weights`` (K,) and ``divisor``, float32; raises UsageError for weights that sum to zero and are normalized."""
    weights = problem.own("weight").astype(np.float32)
    divisor = 1.0
    if problem.flag("normalize"):
        divisor = math.fsum(weights)
        if abs(divisor) <= _CANCELLED * math.fsum(abs(weights)):
            raise UsageError(
                "the weights sum to zero and are to be normalized", hint="Change a weight, or set normalize=false."
            )
        if divisor > float(np.finfo(np.float32).max):
            raise UsageError("the weights are too large together", hint="Results are computed in float32.")
    return {"weights": weights, "divisor": scalar(divisor)}


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """``sum_k w_k * x_k``, over ``sum_k w_k`` where normalized."""
    from mergepipe.merge import kernels

    kernels.weighted_sum(tile.experts, coefficients["weights"], coefficients["divisor"][()], out)


def apply_stack(stack: Stack, coefficients: Coefficients, out: NDArray[np.uint16]) -> None:
    """The same on a whole bfloat16 block."""
    from mergepipe.merge import tile_kernels

    weights, divisor = coefficients["weights"], coefficients["divisor"][()]
    tile_kernels.weighted_sum_stack(stack.blocks, stack.present, stack.base, stack.looks, weights, divisor, out)


def reach(_: Problem, coefficients: Coefficients) -> NDArray[np.float64]:
    """The result is linear in the weights, so in their deltas."""
    return np.asarray(coefficients["weights"].astype(np.float64) / float(coefficients["divisor"]))


def keeps(problem: Problem, _: Coefficients) -> bool:
    """Where all inputs are equal, the result is theirs if the weights sum to one."""
    return problem.flag("normalize") or math.fsum(problem.own("weight")) == 1.0


LINEAR: Final = Method(
    name="linear",
    version=1,
    summary="weighted average of the experts' weights",
    source="Wortsman et al. 2022, arXiv 2203.05482",
    parameters=(WEIGHT, Parameter("normalize", True, "divide by the sum of the weights")),
    start=start,
    apply=apply,
    takes="weights",
    error="linear",
    reach=reach,
    apply_stack=apply_stack,
    keeps=keeps,
    base="unused",
)
