"""NearSwap: take the expert's weight where it is near the base's, and the less of it the farther it is.

Source: alchemonaut, QuartetAnemoi-70B-t0.0001, 2024 (https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Coefficients, Float32, Method, Parameter, Problem, Tile, scalar


def start(problem: Problem) -> Coefficients:
    """``t``, float32."""
    return {"t": scalar(problem.number("t"))}


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """``s * x + (1 - s) * base`` with ``s = t / |x - base|``, within 0 and 1, for each element."""
    from mergepipe.merge import kernels

    kernels.swap_near(tile.base, tile.experts[0], coefficients["t"][()], out)


def reach(_: Problem, __: Coefficients) -> NDArray[np.float64]:
    """A result lies between the base and the expert, so it is no farther from the base than the expert."""
    return np.ones(1)


NEARSWAP: Final = Method(
    name="nearswap",
    version=1,
    summary="the expert's weights where they are near the base's",
    source="alchemonaut 2024, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    parameters=(Parameter("t", None, "how far a weight may be from the base's to be taken whole"),),
    start=start,
    apply=apply,
    takes="weights",
    error="whole",
    reach=reach,
    experts=(1, 1),
)
