"""DELLA: keep each element of a delta with a probability that grows with its rank in its row, and rescale what is left.

Source: Deep et al., "DELLA-Merging", 2024 (arXiv 2406.11617).

A row's smallest magnitude is kept with the probability ``density - epsilon``, its largest with ``density + epsilon``.
Rows run along the last axis; a vector is one row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Apply, Coefficients, Float32, Method, Parameter, Pass, Problem, Tile
from mergepipe.merge.methods import task_vectors
from mergepipe.merge.methods.masks import SEED, chances, mask_keys
from mergepipe.store.errors import UsageError

EPSILON: Final = Parameter(
    "epsilon",
    0.15,
    "how far a row's probabilities go to both sides of density",
    minimum=0.0,
    maximum=1.0,
    per_expert=True,
)


def start(problem: Problem) -> Coefficients:
    """Those of the mix; ``keys`` (K,) uint64 and ``chances`` (K, 2) uint32 of the masks.

    Raises UsageError where ``density - epsilon`` or ``density + epsilon`` is not within 0 and 1.
    """
    return {**task_vectors.mix_coefficients(problem, consensus=False), **_masks(problem)}


def start_consensus(problem: Problem) -> Coefficients:
    """The same for a consensus of signs."""
    return {**task_vectors.mix_coefficients(problem, consensus=True), **_masks(problem)}


def _masks(problem: Problem) -> dict[str, NDArray[Any]]:
    density, epsilon = problem.own("density"), problem.own("epsilon")
    epsilon = np.where((density <= 0) | (density >= 1), 0.0, epsilon)
    partly = (density > 0) & (density < 1)
    wrong = partly & ((density - epsilon <= 0) | (density + epsilon >= 1))
    if wrong.any():
        k = int(np.flatnonzero(wrong)[0])
        raise UsageError(
            f"density {density[k]:g} and epsilon {epsilon[k]:g} give probabilities outside of 0 and 1",
            hint="density - epsilon and density + epsilon must lie between 0 and 1.",
        )
    return {"keys": mask_keys(problem), "chances": chances(np.stack([density - epsilon, density + epsilon], axis=1))}


def add_norms(tile: Tile, coefficients: Coefficients, lanes: NDArray[Any]) -> None:
    """Sum magnitudes before and after the mask."""
    from mergepipe.merge import row_kernels

    keys, limits = coefficients["keys"], coefficients["chances"]
    row_kernels.add_ranked(tile.experts, tile.start, tile.row, keys, limits, lanes)


_NORMS: Final = task_vectors.rescale_pass("norms of the masks by rank", add_norms, uses=("keys", "chances"))


def passes(problem: Problem) -> tuple[Pass, ...]:
    """One where norms are to be kept."""
    return (_NORMS,) if task_vectors.rescales(problem) else ()


def apply_with(*, consensus: bool) -> Apply:
    """The function over tiles, for a sum or a consensus of signs."""

    def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
        from mergepipe.merge import mask_kernels, row_kernels

        mix = task_vectors.mix_of(coefficients, consensus=consensus)
        row_kernels.drop_rows(tile.experts, tile.start, tile.row, coefficients["keys"], coefficients["chances"])
        mask_kernels.merge_all(tile.base, tile.experts, mix, out)

    return apply


DELLA: Final = Method(
    name="della",
    version=1,
    summary="deltas thinned by rank, merged where their signs agree",
    source="Deep et al. 2024, arXiv 2406.11617",
    parameters=(*task_vectors.parameters(EPSILON, consensus=True, normalize=True, rescale=True), SEED),
    start=start_consensus,
    apply=apply_with(consensus=True),
    takes="deltas",
    error="whole",
    reach=task_vectors.consensus_reach,
    passes=passes,
    rows=True,
    pinned=("factors",),
)

DELLA_LINEAR: Final = replace(
    DELLA,
    name="della_linear",
    summary="deltas thinned by rank, summed",
    parameters=(*task_vectors.parameters(EPSILON, consensus=False, normalize=False, rescale=True), SEED),
    start=start,
    apply=apply_with(consensus=False),
    error="additive",
    reach=task_vectors.additive_reach,
)
