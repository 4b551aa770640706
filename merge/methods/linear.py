"""The weighted average of the experts' weights.

Source: Wortsman et al., "Model soups", 2022 (arXiv 2203.05482).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import kernels
from mergepipe.merge.method import WEIGHT, Coefficients, Method, Parameter


def apply(
    base: NDArray[np.float32],  # noqa: ARG001  # one signature for all methods
    experts: NDArray[np.float32],
    coefficients: Coefficients,
    out: NDArray[np.float32],
) -> None:
    """``sum_k w_k * x_k``, over ``sum_k w_k`` where normalized."""
    kernels.weighted_sum(experts, coefficients.weights, coefficients.divisor, out)


LINEAR: Final = Method(
    name="linear",
    version=1,
    summary="weighted average of the experts' weights",
    source="Wortsman et al. 2022, arXiv 2203.05482",
    parameters=(WEIGHT, Parameter("normalize", True, "divide by the sum of the weights")),
    takes="weights",
    error="additive",
    apply=apply,
)
