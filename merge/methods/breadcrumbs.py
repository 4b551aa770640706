"""Model Breadcrumbs: leave out each delta's few largest magnitudes and all of its small ones.

Source: Davari and Belilovsky, "Model Breadcrumbs", 2023 (arXiv 2312.06795).

Of a tensor's n elements, ``int(gamma * n)`` of the largest magnitudes are left out, or fewer where ``density`` leaves
no room for it, and the next ``int(density * n)`` are kept, with all that are equal to the largest or smallest of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from mergepipe.merge.method import Coefficients, Method, Parameter, Pass, Problem
from mergepipe.merge.methods import task_vectors, thresholds

GAMMA: Final = Parameter(
    "gamma", 0.01, "share of each tensor's largest changes to leave out", minimum=0.0, maximum=1.0, per_expert=True
)


def ranges(problem: Problem) -> list[thresholds.Range]:
    """The ranks that each expert keeps."""
    elements = problem.elements
    found = []
    for density, gamma in zip(problem.own("density"), problem.own("gamma"), strict=True):
        kept = elements if density >= 1 else int(density * elements)
        skipped = min(int(gamma * elements), elements - kept)
        found.append((skipped + 1, skipped + kept))
    return found


def start(problem: Problem) -> Coefficients:
    """Those of the mix, and the thresholds as the histograms give them."""
    return thresholds.start(problem, ranges(problem), consensus=False)


def start_consensus(problem: Problem) -> Coefficients:
    """The same for a consensus of signs."""
    return thresholds.start(problem, ranges(problem), consensus=True)


def passes(problem: Problem) -> tuple[Pass, ...]:
    """For exact thresholds, and for norms."""
    return thresholds.passes(problem, ranges)


BREADCRUMBS: Final = Method(
    name="breadcrumbs",
    version=1,
    summary="deltas without their largest and their small values, summed",
    source="Davari and Belilovsky 2023, arXiv 2312.06795",
    parameters=(*task_vectors.parameters(GAMMA, consensus=False, normalize=False, rescale=False), thresholds.EXACT),
    start=start,
    apply=thresholds.apply_with(consensus=False),
    takes="deltas",
    error="additive",
    reach=task_vectors.additive_reach,
    passes=passes,
    histograms=True,
    pinned=("thresholds", "ceilings", "kept"),
)

BREADCRUMBS_TIES: Final = replace(
    BREADCRUMBS,
    name="breadcrumbs_ties",
    summary="deltas without their largest and their small values, merged where their signs agree",
    parameters=(*task_vectors.parameters(GAMMA, consensus=True, normalize=False, rescale=False), thresholds.EXACT),
    start=start_consensus,
    apply=thresholds.apply_with(consensus=True),
    error="whole",
    reach=task_vectors.consensus_reach,
)
