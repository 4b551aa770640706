"""A plan in words: for each tensor and expert what is read, at which level, what is left out, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mergepipe.merge.build import jobs_of_plan
from mergepipe.merge.facts import TensorFacts
from mergepipe.merge.plan import Plan, TensorPlan
from mergepipe.merge.validate import check_plan
from mergepipe.store.manifest import split_name
from mergepipe.store.previews import find_preview
from mergepipe.store.store import Store

NOTHING: Final = 0
PREVIEW: Final = 1
EXACT: Final = 2
LEVELS: Final = ("nothing", "preview", "exact")
"""What a plan reads of a block, by its number."""


@dataclass(frozen=True, slots=True)
class Share:
    """Blocks that are read at one level, and their bytes on disk: the preview's, or the block's own."""

    blocks: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """One expert's part in a tensor. ``number``: the expert's among the plan's, from 0.

    ``nothing``, ``preview`` and ``exact``: of the blocks that are not the base's, those of which nothing is read (with
    what they would take), those of which the preview is, and those that are read. ``levels``: what is read of each of
    them, a byte each, in the tensor's order. ``reason``: why not more. A block that several experts have is read once:
    its bytes are with the first of them.
    """

    expert: str
    number: int
    nothing: Share
    preview: Share
    exact: Share
    kept_elements: int
    levels: bytes
    reason: str

    @property
    def differing(self) -> int:
        """Blocks that are not the base's."""
        return len(self.levels)

    @property
    def stored_bytes_read(self) -> int:
        return self.preview.stored_bytes + self.exact.stored_bytes

    @property
    def stored_bytes_left(self) -> int:
        """Of blocks of which nothing is read."""
        return self.nothing.stored_bytes


@dataclass(frozen=True, slots=True)
class TensorExplanation:
    """One tensor that some expert changes. ``bound``: L2 distance from the full merge's tensor at most."""

    name: str
    blocks: int
    elements: int
    bound: float
    experts: tuple[ExpertShare, ...]

    @property
    def layer(self) -> str:
        """The part of the model that the tensor belongs to: a numbered layer, or the module itself."""
        return layer_of(self.name)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a plan reads of the experts. Blocks are counted for each expert that has them, bytes once.

    ``exact_bytes``: also what adapters take, which are always read whole.
    """

    preview_blocks: int
    preview_bytes: int
    exact_blocks: int
    exact_bytes: int

    def as_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


def explain(store: Store, plan: Plan) -> list[TensorExplanation]:
    """All tensors in which an expert differs from its reference, in the model's order; the plan is checked first."""
    checked = check_plan(store, plan)
    found = []
    for tensor in checked.facts.tensors:
        if not tensor.places:
            continue
        planned = checked.plan.tensors.get(tensor.name)
        setting = checked.plan.settings[tensor.job.setting]
        shares = tuple(
            _share(tensor, planned, place, checked.plan.models[number].name, number - 1)
            for place, number in enumerate(setting.experts)
        )
        bound = planned.bound if planned else 0.0
        found.append(TensorExplanation(tensor.name, len(tensor.entry.blocks), tensor.entry.elements, bound, shares))
    return found


def _share(tensor: TensorFacts, planned: TensorPlan | None, mine: int, name: str, number: int) -> ExpertShare:
    """``mine``: the expert's place among the tensor's experts."""
    exact, coarse = planned.levels[mine] if planned else (frozenset[int](), frozenset[int]())
    blocks, sizes = [0, 0, 0], [0, 0, 0]
    levels = bytearray()
    for place in tensor.places:
        for group in place.groups:
            if mine not in group.experts:
                continue
            level = EXACT if place.index in exact else PREVIEW if place.index in coarse else NOTHING
            size = group.preview.stored_bytes if level == PREVIEW and group.preview else group.stored_bytes
            levels.append(level)
            blocks[level] += 1
            sizes[level] += size if mine == group.experts[0] else 0
    kept = int(planned.pinned["kept"][mine]) if planned and "kept" in planned.pinned else -1
    nothing, preview, whole = (Share(count, size) for count, size in zip(blocks, sizes, strict=True))
    return ExpertShare(name, number, nothing, preview, whole, kept, bytes(levels), _reason(*blocks))


def _reason(nothing: int, previews: int, exact: int) -> str:
    """Why an expert's blocks are not read whole, in words."""
    if not nothing + previews + exact:
        return "is the base's own"
    if not nothing + previews:
        return "read whole"
    if not previews + exact:
        return "left out: gains less for its bytes than what is read"
    if not previews:
        return "read in part, by gain for each byte"
    if not nothing + exact:
        return "previews: the rest gains less for its bytes than what is read"
    parts = [(previews, "as previews"), (exact, "whole"), (nothing, "not")]
    return f"{', '.join(f'{count:,} {how}' for count, how in parts if count)}, by gain for each byte"


def layer_of(name: str) -> str:
    """The part of a model that a tensor belongs to.

    >>> layer_of("model.layers.3.mlp.up_proj.weight")
    'model.layers.3'
    >>> layer_of("model.embed_tokens.weight")
    'model.embed_tokens'
    """
    path, _ = split_name(name)
    if path and path[-1].isdigit():
        return ".".join(path)
    return name.rpartition(".")[0] or name


def counts(plan: Plan) -> tuple[int, int]:
    """How many previews and how many blocks a plan reads, each counted for every expert that has it."""
    coarse = sum(len(indices) for tensor in plan.tensors.values() for indices in tensor.previews or ())
    exact = sum(len(indices) for tensor in plan.tensors.values() for indices in tensor.reads)
    return coarse, exact


def reading(store: Store, plan: Plan) -> Reading:
    """What a plan reads at which level, as this store keeps it; raises NotFoundError where it lacks a commit."""
    coarse, exact = counts(plan)
    preview_bytes = 0
    if coarse:
        _, jobs = jobs_of_plan(store, plan)
        with store.catalog.reading() as view:
            for job in jobs:
                planned = plan.tensors.get(job.name)
                pairs = {
                    (index, job.experts[number].blocks[index])
                    for number, indices in enumerate((planned.previews or ()) if planned else ())
                    for index in indices
                }
                rows = (find_preview(view, job.reference.blocks[index], block) for index, block in pairs)
                preview_bytes += sum(row.stored_bytes for row in rows if row is not None)
    return Reading(coarse, preview_bytes, exact, plan.costs.expert_bytes - preview_bytes)


def by_layer(tensors: Sequence[TensorExplanation]) -> Mapping[str, list[TensorExplanation]]:
    """The tensors by the part of the model that they belong to, in its order."""
    found: dict[str, list[TensorExplanation]] = {}
    for tensor in tensors:
        found.setdefault(tensor.layer, []).append(tensor)
    return found
