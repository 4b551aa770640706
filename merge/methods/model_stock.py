"""Model Stock: from the base towards the experts' mean, the farther the more their deltas agree.

Source: Jang et al., "Model Stock: all we need is just a few fine-tuned models", 2024 (arXiv 2403.19522).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import gram
from mergepipe.merge.method import Coefficients, Float32, Method, Parameter, Pass, Problem, Tile
from mergepipe.merge.span import combine, combine_rows, final, gram_pass, reach


def start(_: Problem) -> Coefficients:
    return {}


def passes(problem: Problem) -> tuple[Pass, ...]:
    return () if problem.flag("filter_wise") else (gram_pass(settle, deltas=True),)


def settle(_: Problem, __: Coefficients, state: NDArray[Any]) -> Coefficients:
    """The same factor for all experts, from their Gram matrix."""
    return final(_factors(state), 1.0)


def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
    """``base + t * mean of the deltas``, with one t for the tensor, or one for each row."""
    if "factors" in coefficients:
        combine(tile, coefficients, out)
    else:
        combine_rows(tile, 1.0, _factors, out)


def _factors(grams: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K, ...) from Gram matrices (K, K, ...)."""
    count = grams.shape[0]
    share = gram.model_stock(grams) / count
    return np.broadcast_to(share, (count, *share.shape)).copy()


MODEL_STOCK: Final = Method(
    name="model_stock",
    version=1,
    summary="towards the mean of the experts, as far as their deltas agree",
    source="Jang et al. 2024, arXiv 2403.19522",
    parameters=(Parameter("filter_wise", False, "an own share for each row of a tensor"),),
    start=start,
    passes=passes,
    apply=apply,
    takes="deltas",
    error="linear",
    reach=reach,
    experts=(2, None),
    rows=True,
    previews=lambda problem: not problem.flag("filter_wise"),
)
