"""Reinforced Agent Merging: what several experts changed is averaged, what one alone changed is taken whole.

Source: "Behavior Knowledge Merge in Reinforced Agentic Models", 2026 (arXiv 2601.13572).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Coefficients, Float32, Method, Parameter, Problem, Tile, scalar
from mergepipe.merge.methods.task_vectors import ROUNDING

EPSILON: Final = Parameter("epsilon", 1e-5, "a delta no larger than this is no change", minimum=0.0)


def start(problem: Problem) -> Coefficients:
    """``epsilon`` and ``gains`` (K,), what multiplies an expert's own changes; float32."""
    return {"epsilon": scalar(problem.number("epsilon")), "gains": np.ones(len(problem.experts), np.float32)}


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """The base plus the mean of the deltas over ``epsilon``, or the one delta times its expert's gain."""
    from mergepipe.merge import choice_kernels

    epsilon, gains = coefficients["epsilon"][()], coefficients["gains"]
    choice_kernels.merge_reinforced(tile.base, tile.experts, epsilon, gains, out)


def reach(problem: Problem, _: Coefficients) -> NDArray[np.float64]:
    """An element is one delta or a mean of some: no larger than the largest."""
    return np.full(len(problem.experts), ROUNDING)


RAM: Final = Method(
    name="ram",
    version=1,
    summary="shared changes averaged, single ones whole",
    source="Behavior Knowledge Merge in Reinforced Agentic Models 2026, arXiv 2601.13572",
    parameters=(EPSILON,),
    start=start,
    apply=apply,
    takes="deltas",
    error="whole",
    reach=reach,
)
