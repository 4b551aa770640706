"""The base plus the weighted sum of the experts' deltas (task vectors).

Source: Ilharco et al., "Editing models with task arithmetic", 2023 (arXiv 2212.04089).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import kernels
from mergepipe.merge.method import LAMBDA, WEIGHT, Coefficients, Method, Parameter


def apply(
    base: NDArray[np.float32],
    experts: NDArray[np.float32],
    coefficients: Coefficients,
    out: NDArray[np.float32],
) -> None:
    """``base + lambda * sum_k w_k * delta_k``, the sum over ``sum_k w_k`` where normalized."""
    kernels.add_weighted(base, experts, coefficients.weights, coefficients.scale, coefficients.divisor, out)


TASK_ARITHMETIC: Final = Method(
    name="task_arithmetic",
    version=1,
    summary="base plus the weighted sum of the experts' deltas",
    source="Ilharco et al. 2023, arXiv 2212.04089",
    parameters=(WEIGHT, LAMBDA, Parameter("normalize", False, "divide by the sum of the weights")),
    takes="deltas",
    error="additive",
    apply=apply,
)
