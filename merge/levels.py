"""What a plan reads of each expert's blocks: nothing, the preview, or the block itself."""

from __future__ import annotations

from collections.abc import Sequence

from mergepipe.merge.facts import TensorFacts
from mergepipe.merge.inputs import Virtual
from mergepipe.merge.plan import TensorPlan
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError

Previews = tuple[dict[int, Digest], ...]
"""For each expert, the previews that are read, by their blocks' indices."""


def previews_of(facts: TensorFacts, planned: TensorPlan) -> Previews:
    """The objects that a tensor's plan reads in place of blocks.

    Raises:
        BadInputError: this store has no such preview.
    """
    found: Previews = tuple({} for _ in planned.reads)
    if planned.previews is None:
        return found
    wanted = [frozenset(indices) for indices in planned.previews]
    for place in facts.places:
        for group in place.groups:
            for expert in group.experts:
                if place.index not in wanted[expert]:
                    continue
                if group.preview is None:
                    raise BadInputError(f"there is no preview of block {place.index} of {facts.name!r}")
                found[expert][place.index] = group.preview.id
    return found


def virtual_previews(facts: TensorFacts, previews: Previews) -> dict[Digest, Virtual]:
    """What these previews stand for."""
    entry = facts.entry
    return {
        digest: Virtual((entry.blocks[index], entry.element_type), preview=digest)
        for coarse in previews
        for index, digest in coarse.items()
    }


def blocks_at(
    facts: TensorFacts, index: int, reads: Sequence[frozenset[int]], previews: Previews
) -> tuple[Digest, ...]:
    """Each expert's block where it is read, its preview where that is, the reference's own block else."""
    own = facts.entry.blocks[index]
    return tuple(
        entry.blocks[index] if index in indices else coarse.get(index, own)
        for entry, indices, coarse in zip(facts.job.experts, reads, previews, strict=True)
    )
