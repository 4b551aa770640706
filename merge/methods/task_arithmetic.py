"""The base plus the weighted sum of the experts' deltas (task vectors).

Source: Ilharco et al., "Editing models with task arithmetic", 2023 (arXiv 2212.04089).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import LAMBDA, WEIGHT, Coefficients, Float32, Method, Parameter, Problem, Stack, Tile
from mergepipe.merge.methods.task_vectors import mix_coefficients

_NO_EFFECT: Final = "taken as mergekit takes it, with no effect: nothing is made sparse"


def start(problem: Problem) -> Coefficients:
    """``weights`` (K,), ``scale`` and ``divisor``, float32."""
    found = mix_coefficients(problem, consensus=False)
    return {name: found[name] for name in ("weights", "scale", "divisor")}


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """``base + lambda * sum_k w_k * delta_k``, the sum over ``sum_k w_k`` where normalized."""
    from mergepipe.merge import kernels

    scale, divisor = coefficients["scale"][()], coefficients["divisor"][()]
    kernels.add_weighted(tile.base, tile.experts, coefficients["weights"], scale, divisor, out)


def apply_stack(stack: Stack, coefficients: Coefficients, out: NDArray[np.uint16]) -> None:
    """The same on a whole bfloat16 block."""
    from mergepipe.merge import tile_kernels

    scale, divisor = coefficients["scale"][()], coefficients["divisor"][()]
    weights = coefficients["weights"]
    tile_kernels.add_weighted_stack(stack.blocks, stack.present, stack.base, stack.looks, weights, scale, divisor, out)


def reach(_: Problem, coefficients: Coefficients) -> NDArray[np.float64]:
    """The result is linear in the deltas."""
    scale = float(coefficients["scale"]) / float(coefficients["divisor"])
    return np.asarray(coefficients["weights"].astype(np.float64) * scale)


TASK_ARITHMETIC: Final = Method(
    name="task_arithmetic",
    version=1,
    summary="base plus the weighted sum of the experts' deltas",
    source="Ilharco et al. 2023, arXiv 2212.04089",
    parameters=(
        WEIGHT,
        Parameter("density", 1.0, _NO_EFFECT, minimum=0.0, maximum=1.0, above=True, per_expert=True),
        LAMBDA,
        Parameter("normalize", False, "divide by the sum of the weights"),
        Parameter("rescale", False, _NO_EFFECT),
    ),
    start=start,
    apply=apply,
    takes="deltas",
    error="linear",
    reach=reach,
    apply_stack=apply_stack,
)
