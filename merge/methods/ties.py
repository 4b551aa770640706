"""TIES: trim each delta to its largest magnitudes, elect a sign for each element, merge the deltas that agree.

Source: Yadav et al., "TIES-merging", 2023 (arXiv 2306.01708).

``density`` keeps the ``int(density * n)`` largest magnitudes of a tensor's n elements. The threshold comes from the
catalog's histogram, so one pass over the blocks is enough; magnitudes are compared at its resolution (the upper 16 bits
of a float32, which is a bfloat16's precision), and all that are equal to the threshold are kept.
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
    """``base + lambda * mean of the agreeing, trimmed, weighted deltas`` (their sum where not normalized)."""
    kernels.keep_largest(experts, coefficients.thresholds)
    kernels.elect_and_merge(base, experts, coefficients.weights, coefficients.scale, coefficients.normalize, out)


TIES: Final = Method(
    name="ties",
    version=1,
    summary="trimmed deltas, merged where their signs agree",
    source="Yadav et al. 2023, arXiv 2306.01708",
    parameters=(
        WEIGHT,
        Parameter(
            "density", 1.0, "share of each tensor's largest changes to keep",
            minimum=0.0, maximum=1.0, above=True, per_expert=True,
        ),
        LAMBDA,
        Parameter("normalize", True, "divide by the sum of the weights that agreed"),
    ),
    takes="deltas",
    error="consensus",
    apply=apply,
    thresholds=True,
)  # fmt: skip
