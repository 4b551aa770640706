"""``mp verify``: read everything, believe nothing.

Each object's frame, content and id are checked, each row against its file, each commit and tree against the rows. What
is damaged is reported with what uses it, and marked in the catalog, so that the next ingest of the same bytes writes it
anew. An object that is well again loses its mark.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mergepipe.store.catalog import ObjectRow, Writing
from mergepipe.store.codecs import expect
from mergepipe.store.commits import decode_commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, DamagedError, MergePipeError
from mergepipe.store.frame import Encoding, Kind
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.refs import all_refs
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.usage import object_ids, with_bases

if TYPE_CHECKING:
    from mergepipe.store.store import Store

_MAXIMUM_USERS: Final = 20


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged object: its id, kind, what is wrong, and the refs and tensors that need it."""

    id: Digest
    kind: str
    reason: str
    used_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at. ``checked_bytes``: bytes of object files that were read (headers alone with ``fast``)."""

    objects: int
    checked_bytes: int
    damaged: tuple[Damage, ...]


@dataclass
class _Findings:
    reasons: dict[Digest, tuple[str, str]] = field(default_factory=dict)
    checked_bytes: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def verify(
    store: Store, ref: str | None = None, *, fast: bool = False, progress: Progress | None = None
) -> VerifyReport:
    """Check all objects, or those that the commit ``ref`` needs.

    ``fast`` looks at sizes and headers alone.

    Raises:
        NotFoundError: ``ref`` does not exist.
    """
    findings = _Findings()
    if ref is None:
        rows = _all_rows(store)
        _check_records(store, rows, findings)
    else:
        rows = _rows_of(store, store.snapshot(ref), findings)
    advance = counter(progress, "verify", sum(row.stored_bytes for row in rows.values()))

    def one(item: tuple[Digest, ObjectRow]) -> None:
        digest, row = item
        try:
            _check_object(store, digest, row, fast=fast)
        except MergePipeError as error:
            with findings.lock:
                findings.reasons[digest] = (row.kind.name.lower(), error.message)
        with findings.lock:
            findings.checked_bytes += row.stored_bytes
        advance(row.stored_bytes)

    deltas = [row.raw_bytes for row in rows.values() if row.encoding is Encoding.DELTA]
    expect(0 if fast else sum(deltas), differences=True)
    workers = default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        run_bounded(pool, one, rows.items(), ahead=2 * workers)
    _mark(store, rows, set(findings.reasons), fast=fast)
    users = _users(store, set(findings.reasons)) if findings.reasons else {}
    damaged = tuple(
        Damage(digest, kind, reason, tuple(users.get(digest, ())))
        for digest, (kind, reason) in sorted(findings.reasons.items())
    )
    return VerifyReport(len(rows), findings.checked_bytes, damaged)


def _all_rows(store: Store) -> dict[Digest, ObjectRow]:
    with store.catalog.reading() as view:
        ids = [Digest(key) for key, _ in view.items("objects")]
        rows = {digest: view.object_row(digest) for digest in ids}
    return {digest: row for digest, row in rows.items() if row is not None}


def _rows_of(store: Store, snapshot: Snapshot, findings: _Findings) -> dict[Digest, ObjectRow]:
    rows: dict[Digest, ObjectRow] = {}
    try:
        needed = with_bases(store, object_ids(snapshot))
    except DamagedError:  # nobody knows what a damaged tree needs: look at everything
        return _all_rows(store)
    with store.catalog.reading() as view:
        for digest in needed:
            row = view.object_row(digest)
            if row is None:
                findings.reasons[digest] = ("unknown", f"object {digest.short} is not in the catalog")
            else:
                rows[digest] = row
    return rows


def _check_object(store: Store, digest: Digest, row: ObjectRow, *, fast: bool) -> None:
    header = store.reader.read_header(digest) if fast else store.reader.verify(digest)
    found = (header.encoding, header.width, header.raw_bytes, header.stored_bytes, header.base)
    if found != (row.encoding, row.width, row.raw_bytes, row.stored_bytes, row.base):
        raise DamagedError(f"object {digest.short} is not what its catalog row says")
    if fast:
        size = (store.layout.objects / digest.hex()[:2] / digest.hex()[2:]).stat().st_size
        if size != row.stored_bytes:
            raise DamagedError(f"object {digest.short} has {size} bytes, not {row.stored_bytes}")
    if row.base is not None:
        with store.catalog.reading() as view:
            base = view.object_row(row.base)
        if base is None or base.encoding is Encoding.DELTA:
            raise DamagedError(f"object {digest.short} is a delta to {row.base.short}, which is not there or a delta")


def _check_records(store: Store, rows: dict[Digest, ObjectRow], findings: _Findings) -> None:
    """Refs point at commits, commits at trees, trees at objects that have rows."""
    with store.catalog.reading() as view:
        commits = [(Digest(key), value) for key, value in view.items("commits")]
        refs = all_refs(view)
    known = {digest for digest, _ in commits}
    for ref in refs:
        if ref.commit not in known:
            findings.reasons[ref.commit] = ("commit", f"ref {ref.name!r} points at a commit that is not there")
    for digest, value in commits:
        try:
            commit = decode_commit(value, f"commit {digest.short}")
            if commit.id != digest:
                raise BadInputError(f"the catalog's copy of commit {digest.short} is not that commit")
            _check_sizes(Snapshot(store.reader, digest, commit), rows, findings)
            for needed in object_ids(Snapshot(store.reader, digest, commit)):
                if needed not in rows:
                    findings.reasons[needed] = ("unknown", f"commit {digest.short} needs it, and it is not there")
        except DamagedError:
            continue  # the node itself is found below, by its own check
        except MergePipeError as error:
            findings.reasons[digest] = ("commit", error.message)


def _check_sizes(snapshot: Snapshot, rows: Mapping[Digest, ObjectRow], findings: _Findings) -> None:
    """A tensor's blocks have the sizes that its shape gives them."""
    for name, entry in snapshot.tensors.items():
        for index, block in enumerate(entry.blocks):
            row, size = rows.get(block), entry.block_span(index)[1]
            if row is not None and row.raw_bytes != size:
                reason = f"tensor {name!r} needs {size} bytes as block {index}, and {block.short} has {row.raw_bytes}"
                findings.reasons[snapshot.commit_id] = ("commit", reason)


def _mark(store: Store, rows: Iterable[Digest], damaged: set[Digest], *, fast: bool) -> None:
    """Remember what is damaged, forget what is well again; a fast look proves nothing well."""
    with store.catalog.reading() as view:
        marked = {Digest(key) for key, _ in view.items("damaged")}
    healed = set() if fast else {digest for digest in rows if digest in marked} - damaged
    if store.catalog.read_only or (not healed and damaged <= marked):
        return

    def change(view: Writing) -> None:
        for digest in damaged:
            view.put("damaged", digest, b"")
        for digest in healed:
            view.delete("damaged", digest)

    store.catalog.write(change)


def _users(store: Store, damaged: set[Digest]) -> dict[Digest, list[str]]:
    """Which refs, tensors and files need each damaged object, directly or as the base of a delta."""
    with store.catalog.reading() as view:
        refs = all_refs(view)
        needs = {Digest(key): _base_in(value, damaged) for key, value in view.items("objects")}
    users: dict[Digest, list[str]] = {}

    def note(digest: Digest, user: str) -> None:
        for found in (digest, needs.get(digest)):
            if found in damaged:
                names = users.setdefault(found, [])
                if user not in names and len(names) < _MAXIMUM_USERS:
                    names.append(user)

    for ref in refs:
        try:
            snapshot = store.snapshot_of(ref.commit)
            note(ref.commit, ref.name)
            note(snapshot.commit.tree, ref.name)
            for name, entry in snapshot.tensors.items():
                for block in entry.blocks:
                    note(block, f"{ref.name}:{name}")
            for path, file in [*snapshot.files.items(), *((shard.path, shard.header) for shard in snapshot.shards)]:
                for block in file.blocks:
                    note(block, f"{ref.name}:{path}")
        except MergePipeError:
            for digest in damaged:  # the tree itself is damaged: everything of this ref may be
                if store.catalog and _is_record(store, digest):
                    note(digest, ref.name)
    return users


def _base_in(row: bytes, damaged: set[Digest]) -> Digest | None:
    base = row[-32:]
    return Digest(base) if base in damaged else None


def _is_record(store: Store, digest: Digest) -> bool:
    with store.catalog.reading() as view:
        row = view.object_row(digest)
    return row is None or row.kind in (Kind.NODE, Kind.COMMIT, Kind.PLAN)
