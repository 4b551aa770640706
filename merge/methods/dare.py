"""DARE: keep each element of a delta with the probability ``density``, and rescale what is left.

Source: Yu et al., "Language models are super Mario", 2023 (arXiv 2311.03099).

``rescale`` multiplies by the L1 norm before over that after, as mergekit does; the paper divides by ``density``, of
which that is an estimate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from numpy.typing import NDArray

from mergepipe.merge.method import Apply, Coefficients, Float32, Method, Pass, Problem, Tile
from mergepipe.merge.methods import task_vectors
from mergepipe.merge.methods.masks import SEED, chances, mask_keys


def start(problem: Problem) -> Coefficients:
    """Those of the mix; ``keys`` (K,) uint64 and ``chances`` (K,) uint32 of the masks."""
    return {**task_vectors.mix_coefficients(problem, consensus=False), **_masks(problem)}


def start_consensus(problem: Problem) -> Coefficients:
    """The same for a consensus of signs."""
    return {**task_vectors.mix_coefficients(problem, consensus=True), **_masks(problem)}


def _masks(problem: Problem) -> dict[str, NDArray[Any]]:
    return {"keys": mask_keys(problem), "chances": chances(problem.own("density"))}


def add_norms(tile: Tile, coefficients: Coefficients, lanes: NDArray[Any]) -> None:
    """Sum magnitudes before and after the mask."""
    from mergepipe.merge import mask_kernels

    mask_kernels.add_dropped(tile.experts, tile.start, coefficients["keys"], coefficients["chances"], lanes)


_NORMS: Final = task_vectors.rescale_pass("norms of the random masks", add_norms, uses=("keys", "chances"))


def passes(problem: Problem) -> tuple[Pass, ...]:
    """One where norms are to be kept."""
    return (_NORMS,) if task_vectors.rescales(problem) else ()


def apply_with(*, consensus: bool) -> Apply:
    """The function over tiles, for a sum or a consensus of signs."""

    def apply(tile: Tile, coefficients: Coefficients, out: Float32) -> None:
        from mergepipe.merge import mask_kernels

        keys, limits = coefficients["keys"], coefficients["chances"]
        mix = task_vectors.mix_of(coefficients, consensus=consensus)
        mask_kernels.merge_dropped(tile.base, tile.experts, tile.start, keys, limits, mix, out)

    return apply


DARE_LINEAR: Final = Method(
    name="dare_linear",
    version=1,
    summary="randomly thinned deltas, summed",
    source="Yu et al. 2023, arXiv 2311.03099",
    parameters=(*task_vectors.parameters(consensus=False, normalize=False, rescale=True), SEED),
    start=start,
    apply=apply_with(consensus=False),
    takes="deltas",
    error="additive",
    reach=task_vectors.additive_reach,
    passes=passes,
    pinned=("factors",),
    previews=lambda _: True,  # masks do not look at the deltas
)

DARE_TIES: Final = replace(
    DARE_LINEAR,
    name="dare_ties",
    summary="randomly thinned deltas, merged where their signs agree",
    parameters=(*task_vectors.parameters(consensus=True, normalize=False, rescale=True), SEED),
    start=start_consensus,
    apply=apply_with(consensus=True),
    error="whole",
    reach=task_vectors.consensus_reach,
    previews=None,
)
