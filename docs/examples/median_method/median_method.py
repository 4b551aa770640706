"""The base plus the elementwise median of the experts' deltas: one expert's outlier does not move it."""

import numpy as np

from mergepipe.merge.method import LAMBDA, Method, scalar


def start(problem):
    """What apply needs of the parameters."""
    return {"scale": scalar(problem.number("lambda"))}


def apply(tile, coefficients, out):
    """``base + lambda * median_k(delta_k)``; the mean of the two in the middle where K is even."""
    np.multiply(np.median(tile.experts, axis=0, overwrite_input=True), coefficients["scale"], out=out)
    out += tile.base


def reach(problem, coefficients):
    """A place is read of all experts or of none, and no median is larger than the largest delta."""
    return np.full(len(problem.experts), abs(float(coefficients["scale"])) * (1 + 2.0**-18))  # float32 rounds


MEDIAN = Method(
    name="median",
    version=1,
    summary="base plus the median of the experts' deltas",
    source="coordinate-wise median; Yin et al. 2018, arXiv 1803.01498",
    parameters=(LAMBDA,),
    start=start,
    apply=apply,
    takes="deltas",
    error="whole",
    reach=reach,
)
