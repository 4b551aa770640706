"""A plan in words: for each tensor and expert what is read, what is left out, and why."""

from __future__ import annotations

from dataclasses import dataclass

from mergepipe.merge.plan import Plan
from mergepipe.merge.validate import check_plan
from mergepipe.store.store import Store


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """One expert's part in a tensor.

    ``differing``: blocks that are not the base's. ``read``: those of them that the plan reads. ``reason``: why the
    others are not. A block that several experts have is read once: its bytes are with the first of them.
    """

    expert: str
    differing: int
    read: int
    stored_bytes_read: int
    stored_bytes_left: int
    kept_elements: int
    reason: str


@dataclass(frozen=True, slots=True)
class TensorExplanation:
    """One tensor that some expert changes. ``bound``: L2 distance from the full merge's tensor at most."""

    name: str
    blocks: int
    elements: int
    bound: float
    experts: tuple[ExpertShare, ...]


def explain(store: Store, plan: Plan) -> list[TensorExplanation]:
    """All tensors in which an expert differs from its reference, in the model's order; the plan is checked first."""
    checked = check_plan(store, plan)
    found = []
    for tensor in checked.facts.tensors:
        if not tensor.places:
            continue
        planned = checked.plan.tensors.get(tensor.name)
        setting = checked.plan.settings[tensor.job.setting]
        shares = []
        for number, expert in enumerate(setting.experts):
            reads = set(planned.reads[number]) if planned else set()
            mine = [
                (place.index, group.stored_bytes if number == group.experts[0] else 0)
                for place in tensor.places
                for group in place.groups
                if number in group.experts
            ]
            done = sum(size for index, size in mine if index in reads)
            left = sum(size for index, size in mine if index not in reads)
            kept = int(planned.pinned["kept"][number]) if planned and "kept" in planned.pinned else -1
            count = sum(index in reads for index, _ in mine)
            name = checked.plan.models[expert].name
            shares.append(ExpertShare(name, len(mine), count, done, left, kept, _reason(len(mine), count)))
        bound = planned.bound if planned else 0.0
        found.append(
            TensorExplanation(tensor.name, len(tensor.entry.blocks), tensor.entry.elements, bound, tuple(shares))
        )
    return found


def _reason(differing: int, read: int) -> str:
    if not differing:
        return "is the base's own"
    if read == differing:
        return "read whole"
    return "left out: gains less for its bytes than what is read" if not read else "read in part, by gain for each byte"
