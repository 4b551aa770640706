"""TIES: trim each delta to its largest magnitudes, elect a sign for each element, merge the deltas that agree.

Source: Yadav et al., "TIES-merging", 2023 (arXiv 2306.01708).

``density`` keeps the ``int(density * n)`` largest magnitudes of a tensor's n elements, one at least, and all that are
equal to the smallest of them. Where ``exact`` is false, the threshold is the lowest magnitude of its bin in the
catalog's histogram, which is as precise as a bfloat16, and no element is read before the merge.
"""

from __future__ import annotations

from typing import Final

from mergepipe.merge.method import Coefficients, Method, Pass, Problem
from mergepipe.merge.methods import task_vectors, thresholds


def ranges(problem: Problem) -> list[thresholds.Range]:
    """The ranks that each expert keeps."""
    elements = problem.elements
    found = []
    for density in problem.own("density"):
        kept = elements if density >= 1 else max(1, int(density * elements)) if density > 0 else 0
        found.append((1, kept))
    return found


def start(problem: Problem) -> Coefficients:
    """Those of the mix, and the thresholds as the histograms give them."""
    return thresholds.start(problem, ranges(problem), consensus=True)


def passes(problem: Problem) -> tuple[Pass, ...]:
    """For exact thresholds, and for norms."""
    return thresholds.passes(problem, ranges)


TIES: Final = Method(
    name="ties",
    version=2,
    summary="trimmed deltas, merged where their signs agree",
    source="Yadav et al. 2023, arXiv 2306.01708",
    parameters=(*task_vectors.parameters(consensus=True, normalize=True, rescale=False), thresholds.EXACT),
    start=start,
    apply=thresholds.apply_with(consensus=True),
    takes="deltas",
    error="whole",
    reach=task_vectors.consensus_reach,
    passes=passes,
    histograms=True,
    pinned=("thresholds", "kept"),
)
