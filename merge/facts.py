"""What the planner knows: manifests and catalog rows of the inputs, gathered once, no weights read.

A *place* is one block index of one tensor. Experts whose block at a place is the base's own contribute nothing there;
experts with one and the same block there are one *group*: it is read once and serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Method
from mergepipe.store.catalog import Reading
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, DamagedError
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.statistics import DeltaStatistics, unpack_histogram, unpack_statistics
from mergepipe.store.store import Store


@dataclass(frozen=True, slots=True)
class Group:
    """Experts that have one block at a place: which, its id, a bound of its delta's L2 norm, the bytes to read it."""

    experts: tuple[int, ...]
    block: Digest
    norm: float
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """One block index of a tensor where some expert differs from the base."""

    index: int
    groups: tuple[Group, ...]
    base_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor of the base, and where the experts differ from it.

    ``histograms``: for each expert the magnitude histogram of its delta, None where it is not needed.
    ``base_bytes``: bytes to read each of the base's blocks.
    """

    name: str
    entry: TensorEntry
    places: tuple[Place, ...]
    histograms: tuple[NDArray[np.int64] | None, ...]
    base_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """A pair of tensors whose statistics the catalog does not have yet."""

    expert: int
    tensor: str


def gather(
    store: Store, base: Snapshot, experts: Sequence[Snapshot], names: Sequence[str], method: Method
) -> tuple[list[TensorFacts], list[Missing]]:
    """Facts for all tensors of the base, and which statistics are missing (then the facts are not complete).

    Raises:
        BadInputError: an expert lacks a tensor, or has it in another shape.
    """
    check_shapes(base, experts, names)
    facts: list[TensorFacts] = []
    missing: list[Missing] = []
    with store.catalog.reading() as view:
        for name, entry in base.tensors.items():
            others = [expert.tensors[name] for expert in experts]
            facts.append(_tensor(view, name, entry, others, method, missing))
    return facts, missing


def check_shapes(base: Snapshot, experts: Sequence[Snapshot], names: Sequence[str]) -> None:
    """Raises BadInputError that lists the tensors of an expert that do not fit the base."""
    for expert, name in zip(experts, names, strict=True):
        problems = []
        for tensor, entry in base.tensors.items():
            other = expert.tensors.get(tensor)
            if other is None:
                problems.append(f"{tensor} is missing")
            elif other.shape != entry.shape:
                problems.append(f"{tensor} is {list(other.shape)}, in the base {list(entry.shape)}")
            elif other.dtype != entry.dtype and not _both_float(other, entry):
                problems.append(f"{tensor} is {other.dtype}, in the base {entry.dtype}")
            elif other.chunks != entry.chunks:
                problems.append(f"{tensor} is cut into other blocks (ingest it again with --base)")
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise BadInputError(
                f"expert {name!r} does not fit the base: {'; '.join(problems[:3])}{more}",
                hint="Merge models that were trained from the base. `mp diff BASE EXPERT` lists the differences.",
            )


def _both_float(a: TensorEntry, b: TensorEntry) -> bool:
    return a.element_type.has_statistics and b.element_type.has_statistics


def _tensor(
    view: Reading,
    name: str,
    entry: TensorEntry,
    others: list[TensorEntry],
    method: Method,
    missing: list[Missing],
) -> TensorFacts:
    costs = tuple(_base_cost(view, block) for block in entry.blocks)
    if not entry.element_type.has_statistics:
        return TensorFacts(name, entry, (), (None,) * len(others), costs)
    lacking: set[int] = set()
    places = []
    for index, block in enumerate(entry.blocks):
        groups = _groups(view, block, index, others, lacking)
        if groups:
            places.append(Place(index, groups, costs[index]))
    histograms: list[NDArray[np.int64] | None] = []
    for number, other in enumerate(others):
        found = None
        if method.thresholds and other.blocks != entry.blocks:
            row = view.get("tensors", entry.id + other.id)
            if row is None:
                lacking.add(number)
            else:
                found = unpack_histogram(row)
        histograms.append(found)
    missing += [Missing(number, name) for number in sorted(lacking)]
    return TensorFacts(name, entry, tuple(places), tuple(histograms), costs)


def _groups(view: Reading, base: Digest, index: int, others: list[TensorEntry], lacking: set[int]) -> tuple[Group, ...]:
    members: dict[Digest, list[int]] = {}
    for number, other in enumerate(others):
        block = other.blocks[index]
        if block != base:
            members.setdefault(block, []).append(number)
    groups = []
    for block, numbers in members.items():
        row = view.get("deltas", base + block)
        norm = 0.0
        if row is None:
            lacking.update(numbers)
        else:
            norm = norm_bound(unpack_statistics(row))
        groups.append(Group(tuple(numbers), block, norm, expert_cost(view, block, base)))
    return tuple(groups)


def norm_bound(statistics: DeltaStatistics) -> float:
    """At least the delta's L2 norm, and hardly more.

    Statistics sum squares in float32, 64 in a run, so the norm may be up to ``2**-19`` of itself too small; and squares
    of magnitudes below ``2**-63`` lose digits, or vanish.
    """
    lost = math.sqrt(statistics.changed) * min(statistics.largest, 2.0**-63)
    return statistics.l2 * (1 + 2.0**-18) + lost


def expert_cost(view: Reading, block: Digest, base: Digest) -> int:
    """Bytes that reading an expert's block takes when the base's block at its place is at hand.

    A delta against another block than the base's (or than the one that the base's is stored against) needs that too.
    """
    row = view.object_row(block)
    if row is None:
        raise _gone(block)
    if row.base is None or row.base in (base, _root(view, base)):
        return row.stored_bytes
    other = view.object_row(row.base)
    if other is None:
        raise _gone(row.base)
    return row.stored_bytes + other.stored_bytes


def _base_cost(view: Reading, block: Digest) -> int:
    row = view.object_row(block)
    if row is None:
        raise _gone(block)
    root = view.object_row(row.base) if row.base is not None else None
    return row.stored_bytes + (root.stored_bytes if root is not None else 0)


def _root(view: Reading, block: Digest) -> Digest | None:
    row = view.object_row(block)
    return row.base if row is not None else None


def _gone(block: Digest) -> DamagedError:
    return DamagedError(
        f"object {block.short} is not in the store", hint="`mp verify` says what is missing and what needs it."
    )
