"""``mp heal``: what is damaged or missing here is taken from another store, or from a checkpoint with the same bytes.

An id is a hash of content, so it does not matter who has the bytes: what hashes to the id is the object. Another
store's files are read and never written, and its catalog is not even opened, for object files describe themselves.
Nothing that it says is believed: what does not hash to its id is refused. From a checkpoint, the blocks are cut as this
store cuts them, and hashed.

Objects get this store's frame, as planes or raw; as a delta only to a base that is here and intact. They are published
64 at a time (:mod:`mergepipe.store.publish`), which clears their marks of damage. It can be stopped at any time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from mergepipe.store.catalog import ObjectRow, Reading
from mergepipe.store.commits import Commit, decode_commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import DamagedError, MergePipeError, UsageError
from mergepipe.store.frame import Encoding, Kind
from mergepipe.store.heal_sources import CheckpointSource, Found, Refused, StoreSource
from mergepipe.store.layout import STORE_DIRECTORY, read_layout
from mergepipe.store.parallel import Progress
from mergepipe.store.publish import Changes, publish
from mergepipe.store.refs import all_refs
from mergepipe.store.replace import bases_of_deltas, settle
from mergepipe.store.staging import Staging, is_intact

if TYPE_CHECKING:
    from mergepipe.store.codecs import Bytes
    from mergepipe.store.store import Store

Source: TypeAlias = StoreSource | CheckpointSource
_BATCH_OBJECTS: Final = 64
_BATCH_BYTES: Final = 128 << 20
_ANY_SIZE: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Broken:
    """An object that is known to be damaged or missing. ``row`` is what the catalog says of it, if anything."""

    id: Digest
    kind: Kind | None
    reason: str
    row: ObjectRow | None = None


@dataclass(frozen=True, slots=True)
class Healed:
    """An object that is well again: what it is, and the size of its new file."""

    id: Digest
    kind: Kind
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class HealReport:
    """What was healed, what is still broken, and what was offered and refused. ``source``: a store or a checkpoint."""

    source: str
    healed: tuple[Healed, ...]
    missing: tuple[Broken, ...]
    refused: tuple[Refused, ...]


def find_broken(store: Store) -> list[Broken]:
    """Objects that are marked as damaged, or whose file is not there or has another size; reads no content."""
    with store.catalog.reading() as view:
        damaged = {Digest(key) for key, _ in view.items("damaged")}
        found = {digest: _marked(view, digest) for digest in damaged}
        for key, _ in view.items("objects"):
            digest = Digest(key)
            row = view.object_row(digest)
            if row is not None and digest not in found and not is_intact(store.layout, view, digest):
                exists = os.path.exists(store.layout.object_path(digest))  # noqa: PTH110
                reason = "its file has another size than it had" if exists else "its file is missing"
                found[digest] = Broken(digest, row.kind, reason, row)
        for digest, reason in _lost_commits(view):
            found.setdefault(digest, Broken(digest, Kind.COMMIT, reason, view.object_row(digest)))
    return sorted(found.values(), key=lambda each: each.id)


def heal(store: Store, source: Path, *, verify_first: bool = False, progress: Progress | None = None) -> HealReport:
    """Write anew what is broken here and whole in ``source``: a store, or a checkpoint.

    ``verify_first`` reads all of this store before, to know all that is damaged; else only what is known is looked for.

    Raises:
        NotFoundError, BadInputError: ``source`` is neither a store nor a checkpoint.
        UsageError: it is this store itself.
        DamagedError: the catalog cannot be read.
    """
    from mergepipe.store.check import verify

    offered = _open_source(store, source)
    try:
        store.catalog.check()
        settle(store.catalog, store.layout)
        if verify_first:
            verify(store, progress=progress)
        broken = {each.id: each for each in find_broken(store)}
        with Staging(store.layout, store.catalog) as staging:
            ward = _Ward(store, staging, broken)
            ward.take(_own_commits(store, broken))
            if broken.keys() - ward.healed.keys():
                left = {digest: each.row for digest, each in broken.items() if digest not in ward.healed}
                ward.take(offered.find(left, progress))
    finally:
        offered.close()
    missing = tuple(each for digest, each in broken.items() if digest not in ward.healed)
    return HealReport(offered.name, tuple(ward.healed.values()), missing, tuple(offered.refused))


def _open_source(store: Store, path: Path) -> Source:
    for root in (path, path / STORE_DIRECTORY):
        if (root / "store.json").exists():
            if root.samefile(store.layout.root):
                raise UsageError(
                    "a store cannot be healed from itself", hint="Name another copy of it, or a checkpoint."
                )
            return StoreSource(read_layout(root))
    return CheckpointSource(store, path)


@dataclass
class _Ward:
    """Stages what comes in, publishes it in batches, and reads it once more from its place."""

    store: Store
    staging: Staging
    broken: Mapping[Digest, Broken]
    healed: dict[Digest, Healed] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    staged_bytes: int = 0

    def __post_init__(self) -> None:
        with self.store.catalog.reading() as view:
            self._bases = bases_of_deltas(view)

    def take(self, offered: Iterable[Found]) -> None:
        for found in offered:
            if found.id in self.healed or found.id in self.staging.rows:
                continue
            self._stage(found)
            if len(self.staging.rows) >= _BATCH_OBJECTS or self.staged_bytes >= _BATCH_BYTES:
                self._publish()
        self._publish()
        self._put_commits()

    def _stage(self, found: Found) -> None:
        row = self.broken[found.id].row
        self.staged_bytes += len(found.data)
        if found.kind in (Kind.NODE, Kind.COMMIT, Kind.PLAN):
            self.staging.add_record(found.kind, bytes(found.data))
            if found.kind is Kind.COMMIT:
                self.commits.append(decode_commit(bytes(found.data), f"commit {found.id.short}"))
            return
        if not self.staging.claim(found.id):
            return
        data = np.frombuffer(found.data, np.uint8)
        kind = row.kind if row is not None else found.kind
        if kind is Kind.PREVIEW:
            self.staging.add_preview(found.id, data, _ANY_SIZE)
            return
        width = row.width if row is not None else found.width
        self.staging.add_block(kind, found.id, data, width, self._base_for(found.id, row))

    def _base_for(self, digest: Digest, row: ObjectRow | None) -> tuple[Digest, Bytes] | None:
        """What the object was a delta to, where that is here and intact, and nothing is a delta to the object."""
        if row is None or row.encoding is not Encoding.DELTA or row.base is None or digest in self._bases:
            return None
        if row.base in self.staging.rows:
            self._publish()
        with self.store.catalog.reading() as view:
            base = view.object_row(row.base)
            if base is None or base.encoding is Encoding.DELTA or base.raw_bytes != row.raw_bytes:
                return None
            if not is_intact(self.store.layout, view, row.base):
                return None
        data = np.empty(row.raw_bytes, np.uint8)
        try:
            self.store.reader.read_block(row.base, data)
        except DamagedError:
            return None
        return row.base, data

    def _publish(self) -> None:
        batch = self.staging.take_batch()
        self.staged_bytes = 0
        if batch.rows:
            publish(self.store.catalog, batch, Changes())
        for digest in batch.rows:
            self._look_again(digest)

    def _put_commits(self) -> None:
        """The catalog's copies, last: a commit's parents must be there."""
        commits, self.commits = self.commits, []
        if not commits:
            return
        coming = {commit.id for commit in commits}
        with self.store.catalog.reading() as view:
            there = {digest for digest in _parents(commits) if digest in coming or view.get("commits", digest)}
        ready = [commit for commit in commits if _parents([commit]) <= there]
        publish(self.store.catalog, None, Changes(commits=ready))
        for commit in commits:
            if commit in ready:
                self._look_again(commit.id)
            else:
                self.healed.pop(commit.id, None)

    def _look_again(self, digest: Digest) -> None:
        try:
            header = self.store.reader.verify(digest)
        except DamagedError:
            return  # the disk itself, perhaps; it counts as missing
        self.healed[digest] = Healed(digest, header.kind, header.stored_bytes)


def _parents(commits: Iterable[Commit]) -> set[Digest]:
    return {parent.commit for commit in commits for parent in commit.parents}


def _marked(view: Reading, digest: Digest) -> Broken:
    row = view.object_row(digest)
    reason = "it is marked as damaged" if row is not None else "something needs it, and it is not there"
    return Broken(digest, row.kind if row is not None else None, reason, row)


def _lost_commits(view: Reading) -> Iterator[tuple[Digest, str]]:
    """Commits that refs or other commits lead to and the catalog lacks, and those of which its copy is another."""
    for ref in all_refs(view):
        if view.get("commits", ref.commit) is None:
            yield ref.commit, f"ref {ref.name!r} points at it, and it is not there"
    for key, value in view.items("commits"):
        commit = _as_commit(Digest(key), value)
        if commit is None:
            yield Digest(key), "the catalog's copy of it is wrong"
            continue
        for parent in _parents([commit]):
            if view.get("commits", parent) is None:
                yield parent, f"commit {commit.id.short} was made from it, and it is not there"


def _as_commit(digest: Digest, data: bytes) -> Commit | None:
    try:
        commit = decode_commit(data, f"commit {digest.short}")
    except MergePipeError:
        return None
    return commit if commit.id == digest else None


def _own_commits(store: Store, broken: Mapping[Digest, Broken]) -> Iterator[Found]:
    """A commit lies here twice: as an object and in the catalog. One copy heals the other."""
    for digest, each in broken.items():
        if each.kind not in (Kind.COMMIT, None):
            continue
        with store.catalog.reading() as view:
            data = view.get("commits", digest)
        if data is None or _as_commit(digest, data) is None:
            data = None
            with suppress(DamagedError):
                data = store.reader.read_record(Kind.COMMIT, digest)
        if data is not None:
            yield Found(digest, Kind.COMMIT, data)
