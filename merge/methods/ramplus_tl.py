"""RAM+ for each tensor: as RAM, with what an expert alone changed enlarged the more of its changes others share.

Source: "Behavior Knowledge Merge in Reinforced Agentic Models", 2026 (arXiv 2601.13572).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Coefficients, Parameter, Pass, Problem, Tile, scalar
from mergepipe.merge.methods.ram import EPSILON, RAM
from mergepipe.merge.methods.task_vectors import ROUNDING


def start(problem: Problem) -> Coefficients:
    """``epsilon``; ``gains`` come from the pass."""
    return {"epsilon": scalar(problem.number("epsilon"))}


def state(problem: Problem) -> NDArray[Any]:
    """(K, 2) int64: changes that others share, and those that none shares."""
    return np.zeros((len(problem.experts), 2), np.int64)


def add(tile: Tile, coefficients: Coefficients, counts: NDArray[Any]) -> None:
    """Count a tile's changes."""
    from mergepipe.merge import choice_kernels

    choice_kernels.count_shared(tile.experts, coefficients["epsilon"][()], counts)


def settle(problem: Problem, coefficients: Coefficients, counts: NDArray[Any]) -> Coefficients:
    """``gains``: ``1 + r * min(shared / alone, alpha)``."""
    alone = np.maximum(counts[:, 1].astype(np.float64), max(problem.number("epsilon"), 1e-300))
    share = np.minimum(counts[:, 0] / alone, problem.number("alpha"))
    return {**coefficients, "gains": (1 + problem.number("r") * share).astype(np.float32)}


def reach(problem: Problem, _: Coefficients) -> NDArray[np.float64]:
    """As RAM's, with the largest gain that there can be."""
    gain = abs(1 + problem.number("r") * problem.number("alpha"))
    return np.full(len(problem.experts), max(1.0, gain) * ROUNDING)


_COUNTS: Final = Pass("shared changes", state, add, settle, uses=("epsilon",))


def passes(_: Problem) -> tuple[Pass, ...]:
    """One, to count."""
    return (_COUNTS,)


RAMPLUS_TL: Final = replace(
    RAM,
    name="ramplus_tl",
    summary="RAM, single changes enlarged by how much is shared",
    parameters=(
        Parameter("r", 0.1, "how strongly an expert's own changes are enlarged"),
        Parameter("alpha", 0.2, "the largest ratio of shared to own changes that counts", minimum=0.0),
        EPSILON,
    ),
    start=start,
    reach=reach,
    passes=passes,
    pinned=("gains",),
)
