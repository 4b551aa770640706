"""Which base a checkpoint was trained from: by its configuration's own word, else by a look at its blocks.

A candidate is a ref whose commit has the same tensors with the same shapes. Among several, blocks sampled over the
model decide: the share that is byte-identical first (embeddings and norms often are), then the relative size of the
difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import numpy as np

from mergepipe.store.checkpoint import Checkpoint, open_checkpoint
from mergepipe.store.codecs import scratch
from mergepipe.store.commits import Commit
from mergepipe.store.digest import hash_bytes
from mergepipe.store.errors import MergePipeError, NotFoundError, UsageError
from mergepipe.store.ingest_blocks import TensorWork, plan_tensor
from mergepipe.store.refs import all_refs, ref_name_for
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.statistics import block_statistics

if TYPE_CHECKING:
    from mergepipe.store.store import Store

_SAMPLES: Final = 12
_MAXIMUM_CANDIDATES: Final = 32
_TOO_FAR: Final = 0.5  # a base differs from its fine-tune by less than half of its own size


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A ref that seems to be the base, and why."""

    ref: str
    reason: str


def find_base(store: Store, paths: Sequence[Path], ref: str | None = None) -> str:
    """The base that all of the checkpoints share, for ``--base auto``.

    Raises:
        NotFoundError: no ref fits.
        UsageError: they have different bases.
    """
    found = {path: suggest_base(store, path, ref) for path in paths}
    for path, suggestion in found.items():
        if suggestion is None:
            raise NotFoundError(
                f"no ref in the store looks like the base of {path}",
                hint="Ingest the base first, or name it with --base REF, or leave --base out.",
            )
    names = {suggestion.ref for suggestion in found.values() if suggestion is not None}
    if len(names) > 1:
        raise UsageError(
            f"the checkpoints have different bases: {', '.join(sorted(names))}",
            hint="Ingest them one by one.",
        )
    return names.pop()


def suggest_base(store: Store, path: Path, ref: str | None = None) -> Suggestion | None:
    """The most likely base of a checkpoint among the refs, or None. ``ref``: its own, by default its folder's name."""
    with store.catalog.reading() as view:
        refs = all_refs(view)
    own_name = ref or ref_name_for(path)
    earlier = next((known for known in refs if known.name == own_name), None)
    if earlier is not None:
        return _as_before(store, store.commit(earlier.commit))
    with open_checkpoint(path) as checkpoint:
        hint = PurePosixPath(checkpoint.base_hint()).name
        if any(hint == known.name for known in refs):  # rather than one whose last part it is
            return Suggestion(hint, f"its configuration names {hint!r}")
        seen: set[bytes] = set()
        candidates: list[tuple[str, Snapshot]] = []
        for known in refs:
            if known.commit in seen:
                continue
            seen.add(known.commit)
            snapshot = store.snapshot_of(known.commit)
            if hint and hint == PurePosixPath(known.name).name:
                return Suggestion(known.name, f"its configuration names {hint!r}")
            if len(candidates) < _MAXIMUM_CANDIDATES and _same_tensors(checkpoint, snapshot):
                candidates.append((known.name, snapshot))
        ranked = [(*_distance(store, checkpoint, snapshot), name) for name, snapshot in candidates]
    close = sorted(item for item in ranked if item[1] < _TOO_FAR)
    if not close:
        return None
    different_share, relative, name = close[0]
    return Suggestion(name, _reason(different_share, relative))


def suggest_stored_base(store: Store, own: Snapshot) -> Suggestion | None:
    """The most likely base of a model that is in the store, among the refs whose commits are older than its own."""
    with store.catalog.reading() as view:
        refs = all_refs(view)
    seen = {own.commit_id}
    ranked: list[tuple[float, float, str]] = []
    for known in refs:
        if known.commit in seen or len(ranked) >= _MAXIMUM_CANDIDATES:
            continue
        seen.add(known.commit)
        snapshot = store.snapshot_of(known.commit)
        if snapshot.commit.time < own.commit.time and _same_stored_tensors(own, snapshot):
            ranked.append((*_stored_distance(store, own, snapshot), known.name))
    close = sorted(item for item in ranked if item[1] < _TOO_FAR)
    return Suggestion(close[0][2], _reason(*close[0][:2])) if close else None


def _same_stored_tensors(own: Snapshot, other: Snapshot) -> bool:
    entries = other.tensors
    return entries.keys() == own.tensors.keys() and all(
        entries[name].shape == entry.shape for name, entry in own.tensors.items()
    )


def _stored_distance(store: Store, own: Snapshot, base: Snapshot) -> tuple[float, float]:
    """What :func:`_distance` says, of two models that are both in the store."""
    pairs = [(base.tensors[name], entry) for name, entry in own.tensors.items() if entry.blocks]
    pairs = [
        (mine, entry)
        for mine, entry in pairs
        if entry.element_type.has_statistics and entry.dtype == mine.dtype and entry.same_grid(mine)
    ]
    differing = 0
    difference = size = 0.0
    sampled = pairs[:: max(len(pairs) // _SAMPLES, 1)]
    for number, (mine, entry) in enumerate(sampled):
        index = number * 7919 % len(entry.blocks)
        if mine.blocks[index] == entry.blocks[index]:
            continue
        data, old = (np.empty(entry.block_span(index)[1], np.uint8) for _ in range(2))
        store.reader.read_block(entry.blocks[index], data)
        store.reader.read_block(mine.blocks[index], old)
        types = entry.element_type, entry.element_type
        differing += 1
        difference += block_statistics(data, old, *types, None).l2 ** 2
        size += block_statistics(old, np.zeros_like(old), *types, None).l2 ** 2
    if not sampled:
        return 1.0, 1.0
    return differing / len(sampled), (difference / size) ** 0.5 if size else 0.0


def _reason(different_share: float, relative: float) -> str:
    return f"of the blocks sampled {1 - different_share:.0%} are identical and the rest differs by {relative:.1%}"


def _as_before(store: Store, commit: Commit) -> Suggestion | None:
    """For a checkpoint whose ref is there already: the base that it had the last time."""
    parent = commit.parent("base")
    if parent is None:
        return None
    try:
        same = store.resolve(parent.name) == parent.commit
    except MergePipeError:
        same = False
    return Suggestion(parent.name if same else parent.commit.hex(), "it was ingested with that base before")


def _same_tensors(checkpoint: Checkpoint, snapshot: Snapshot) -> bool:
    entries = snapshot.tensors
    return entries.keys() == checkpoint.tensors.keys() and all(
        entries[name].shape == source.shape for name, source in checkpoint.tensors.items()
    )


def _distance(store: Store, checkpoint: Checkpoint, snapshot: Snapshot) -> tuple[float, float]:
    """``(share of sampled blocks that differ, norm of the difference over the norm of the base)``."""
    works = [
        plan_tensor(name, source, snapshot.tensors[name], store.layout.block_bytes)
        for name, source in checkpoint.tensors.items()
        if source.dtype.has_statistics and source.dtype.name == snapshot.tensors[name].dtype
    ]
    works = [work for work in works if work.blocks]
    step = max(len(works) // _SAMPLES, 1)
    differing = 0
    difference = size = 0.0
    sampled = works[::step]
    for number, work in enumerate(sampled):
        index = number * 7919 % len(work.blocks)
        changed, delta, norm = _compare_block(store, work, index)
        differing += changed
        difference += delta**2
        size += norm**2
    if not sampled:
        return 1.0, 1.0
    return differing / len(sampled), (difference / size) ** 0.5 if size else 0.0


def _compare_block(store: Store, work: TensorWork, index: int) -> tuple[bool, float, float]:
    at_base = work.base_block(index)
    assert at_base is not None
    offset, size = work.span(index)
    data = scratch.bytes("incoming", size)
    work.source.read_into(offset, data)
    if hash_bytes(data.data) == at_base[0]:
        return False, 0.0, 0.0
    base = np.empty(size, np.uint8)
    store.reader.read_block(at_base[0], base)
    delta = block_statistics(data, base, work.source.dtype, work.source.dtype, None)
    own = block_statistics(base, np.zeros_like(base), work.source.dtype, work.source.dtype, None)
    return True, delta.l2, own.l2
