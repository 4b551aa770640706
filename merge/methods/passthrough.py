"""One input as it is, or scaled: for stacks of layers from several models.

Source: the ``passthrough`` method of mergekit.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Coefficients, Float32, Method, Parameter, Problem, Tile


def start(problem: Problem) -> Coefficients:
    """``scale`` (1,) float32."""
    return {"scale": problem.own("scale").astype(np.float32)}


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """``scale * x``."""
    from mergepipe.merge import kernels

    kernels.scaled(tile.experts[0], coefficients["scale"][0], out)


def reach(_: Problem, coefficients: Coefficients) -> NDArray[np.float64]:
    """A multiple of the one input."""
    return np.asarray(coefficients["scale"].astype(np.float64))


def keeps(_: Problem, coefficients: Coefficients) -> bool:
    """An input that equals the base is the base unless it is scaled."""
    return bool(coefficients["scale"][0] == 1)


PASSTHROUGH: Final = Method(
    name="passthrough",
    version=1,
    summary="one input unchanged, or scaled",
    source="mergekit",
    parameters=(Parameter("scale", 1.0, "multiplies the weights", per_expert=True),),
    start=start,
    apply=apply,
    takes="weights",
    error="linear",
    reach=reach,
    keeps=keeps,
    base="unused",
    experts=(1, 1),
)
