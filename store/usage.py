"""``mp du``: how many bytes commits stand for, and how many they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergepipe.store.digest import Digest
from mergepipe.store.errors import DamagedError
from mergepipe.store.frame import Kind
from mergepipe.store.refs import all_refs
from mergepipe.store.snapshot import Snapshot

if TYPE_CHECKING:
    from mergepipe.store.store import Store


@dataclass(frozen=True, slots=True)
class RefUsage:
    """One ref: decoded bytes of its commit, their stored bytes, and the stored bytes that no other ref holds.

    ``previews`` of its blocks are counted apart: how many, their files, and the decoded bytes that they stand for.
    """

    ref: str
    logical_bytes: int
    stored_bytes: int
    alone_bytes: int
    previews: int = 0
    preview_bytes: int = 0
    previewed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """The whole store.

    ``logical_bytes``: all refs' commits, each counted in full. ``unique_bytes``: decoded bytes after
    deduplication. ``stored_bytes``: all objects as they lie on disk, also those that no ref reaches any more, and
    ``preview_bytes`` those of them that are previews. ``previewed_bytes``: decoded bytes of the blocks that previews
    stand for.
    """

    refs: tuple[RefUsage, ...]
    objects: int
    logical_bytes: int
    unique_bytes: int
    stored_bytes: int
    previews: int = 0
    preview_bytes: int = 0
    previewed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Previewed:
    """A preview: its file's bytes, and the decoded bytes of its block."""

    stored_bytes: int
    raw_bytes: int


def usage(store: Store) -> Usage:
    """Measure all refs from manifests and catalog rows; reads no weights."""
    with store.catalog.reading() as view:
        refs = all_refs(view)
    held: dict[str, set[Digest]] = {}
    logical: dict[str, int] = {}
    by_commit: dict[Digest, tuple[set[Digest], int]] = {}
    for ref in refs:
        if ref.commit not in by_commit:
            snapshot = store.snapshot_of(ref.commit)
            by_commit[ref.commit] = (object_ids(snapshot), logical_bytes(snapshot))
        held[ref.name], logical[ref.name] = by_commit[ref.commit]
    holders = Counter(digest for ids in held.values() for digest in with_bases(store, ids))
    rows = _stored_sizes(store, holders)
    previews = _previews(store)
    lines = []
    for ref in refs:
        ids = with_bases(store, held[ref.name])
        alone = sum(rows.get(digest, (0, 0))[1] for digest in ids if holders[digest] == 1)
        stored = sum(rows.get(digest, (0, 0))[1] for digest in ids)
        own = [preview for block in held[ref.name] & previews.keys() for preview in previews[block]]
        lines.append(RefUsage(ref.name, logical[ref.name], stored, alone, *_sums(own)))
    with store.catalog.reading() as view:
        sizes = [(value[0], int.from_bytes(value[16:24], "little")) for _, value in view.items("objects")]
    coarse = [size for kind, size in sizes if kind == Kind.PREVIEW]
    return Usage(
        tuple(lines),
        objects=len(sizes),
        logical_bytes=sum(logical.values()),
        unique_bytes=_data_bytes(store, set().union(*held.values())),
        stored_bytes=sum(size for _, size in sizes),
        previews=len(coarse),
        preview_bytes=sum(coarse),
        previewed_bytes=sum(preview.raw_bytes for each in previews.values() for preview in each),
    )


def _previews(store: Store) -> dict[Digest, list[_Previewed]]:
    """All previews that there are, by the block that they are a coarse look at."""
    found: dict[Digest, list[_Previewed]] = {}
    with store.catalog.reading() as view:
        if not view.count("previews"):
            return found
        from mergepipe.store.previews import unpack_row  # here: it loads numpy

        for key, value in view.items("previews"):
            block = Digest(key[32:64])
            with suppress(DamagedError):  # `mp verify` says what is wrong with it
                row, exact = view.object_row(unpack_row(value).id) if value else None, view.object_row(block)
                if row is not None and exact is not None:
                    found.setdefault(block, []).append(_Previewed(row.stored_bytes, exact.raw_bytes))
    return found


def _sums(previews: Iterable[_Previewed]) -> tuple[int, int, int]:
    """How many, their files' bytes, and the decoded bytes that they stand for."""
    known = list(previews)
    stored, raw = sum(each.stored_bytes for each in known), sum(each.raw_bytes for each in known)
    return len(known), stored, raw


def stored_bytes_of(store: Store, commit: Digest) -> int:
    """Bytes on disk of all objects that a commit's tree points at, each once; bases of deltas are not counted."""
    snapshot = store.snapshot_of(commit)
    return sum(stored for _, stored in _stored_sizes(store, object_ids(snapshot)).values())


def object_ids(snapshot: Snapshot) -> set[Digest]:
    """Ids of everything that a commit's tree points at, the nodes and the commit itself too."""
    ids = {snapshot.commit_id, *node_ids(snapshot)}
    if snapshot.commit.plan is not None:
        ids.add(snapshot.commit.plan)
    for entry in snapshot.tensors.values():
        ids.update(entry.blocks)
    for file in [*snapshot.files.values(), *(shard.header for shard in snapshot.shards)]:
        ids.update(file.blocks)
    return ids


def node_ids(snapshot: Snapshot) -> set[Digest]:
    """Ids of all manifest nodes of a commit."""
    found: set[Digest] = set()
    waiting = [snapshot.commit.tree]
    while waiting:
        digest = waiting.pop()
        if digest not in found:
            found.add(digest)
            waiting += snapshot.node(digest).nodes.values()
    return found


def with_bases(store: Store, ids: Iterable[Digest]) -> set[Digest]:
    """The ids, and those of the base blocks that deltas among them need."""
    found = set(ids)
    with store.catalog.reading() as view:
        for digest in list(found):
            row = view.object_row(digest)
            if row is not None and row.base is not None:
                found.add(row.base)
    return found


def logical_bytes(snapshot: Snapshot) -> int:
    """Bytes of a commit's tensors and files as they came in."""
    return (
        sum(entry.nbytes for entry in snapshot.tensors.values())
        + sum(entry.size for entry in snapshot.files.values())
        + sum(shard.header.size for shard in snapshot.shards)
    )


def _data_bytes(store: Store, ids: Iterable[Digest]) -> int:
    """Decoded bytes of the blocks and files among the ids; nodes, commits and plans do not count."""
    with store.catalog.reading() as view:
        rows = [view.object_row(digest) for digest in ids]
    return sum(row.raw_bytes for row in rows if row is not None and row.kind in (Kind.BLOCK, Kind.FILE))


def _stored_sizes(store: Store, ids: Iterable[Digest]) -> dict[Digest, tuple[int, int]]:
    """``(raw, stored)`` bytes of each object that exists."""
    sizes: dict[Digest, tuple[int, int]] = {}
    with store.catalog.reading() as view:
        for digest in ids:
            row = view.object_row(digest)
            if row is not None:
                sizes[digest] = (row.raw_bytes, row.stored_bytes)
    return sizes
