"""``mp verify``: read everything, believe nothing.

Each object's frame, content and id are checked, each row against its file, each commit and tree against the rows. What
is damaged is reported with what uses it, and marked in the catalog, so that the next ingest of the same bytes writes it
anew. An object that is well again loses its mark. Previews are checked against their rows too, and made again by
:mod:`mergepipe.store.analyze`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from mergepipe.store.catalog import ObjectRow, Writing
from mergepipe.store.check_records import damaged_records, lost_record
from mergepipe.store.codecs import expect
from mergepipe.store.digest import DIGEST_BYTES, Digest
from mergepipe.store.errors import DamagedError, MergePipeError, UsageError
from mergepipe.store.frame import Encoding, Kind
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.previews import PreviewRow, read_preview, unpack_row
from mergepipe.store.refs import all_refs
from mergepipe.store.replace import settle
from mergepipe.store.snapshot import Snapshot, being_read
from mergepipe.store.usage import object_ids, with_bases

if TYPE_CHECKING:
    from mergepipe.store.store import Store

_MAXIMUM_USERS: Final = 20
_BATCH: Final = 4096  # objects between two notes of how far a check has come
_PROGRESS: Final = b"verified"


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged object: its id, kind, what is wrong, and the refs and tensors that need it."""

    id: Digest
    kind: str
    reason: str
    used_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at. ``checked_bytes``: bytes of object files that were read (headers alone with ``fast``).

    ``skipped``: objects that an interrupted check had looked at.
    """

    objects: int
    checked_bytes: int
    damaged: tuple[Damage, ...]
    skipped: int = 0
    elapsed_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Previewed:
    """A row of the catalog's previews: the two blocks, and what it says."""

    base: Digest
    block: Digest
    level: bytes
    row: PreviewRow


@dataclass
class _Findings:
    """What was found so far.

    ``reasons``: of each damaged object its kind and what is wrong. ``rows``: likewise, of objects that a preview's
    wrong row names; they may be well themselves. ``previews``: those rows that can be read, by the preview's id.
    """

    reasons: dict[Digest, tuple[str, str]] = field(default_factory=dict)
    rows: dict[Digest, tuple[str, str]] = field(default_factory=dict)
    previews: dict[Digest, list[_Previewed]] = field(default_factory=dict)
    checked_bytes: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def verify(
    store: Store, ref: str | None = None, *, fast: bool = False, resume: bool = False, progress: Progress | None = None
) -> VerifyReport:
    """Check all objects, or those that the commit ``ref`` needs.

    ``fast`` looks at sizes and headers alone. ``resume`` goes on where a full check was interrupted; what that one
    found damaged is looked at again. Others may write, collect and repack at the same time: what has changed since
    the check began is looked at as it is now.

    Raises:
        NotFoundError: ``ref`` does not exist.
        UsageError: only a check of the whole store, by contents, can be resumed.
        ConflictError: ``ref`` was removed, and its commit collected, before it was looked at.
    """
    if resume and (ref is not None or fast):
        raise UsageError("only a full check of the whole store can be resumed", hint="mp verify --resume")
    findings = _Findings()
    started = time.monotonic()
    if not fast:
        store.catalog.check()
    _read_preview_rows(store, findings)
    if ref is None:
        rows = _all_rows(store)
        findings.reasons.update(damaged_records(store, rows))
    else:
        snapshot = store.snapshot(ref)
        with being_read(store.layout, [snapshot.commit_id]):
            rows = _rows_of(store, snapshot, findings)
    _check_preview_rows(rows, findings)
    skipped = _done_before(store, rows) if resume else set()
    order = sorted(digest for digest in rows if digest not in skipped)
    advance = counter(progress, "verify", sum(rows[digest].stored_bytes for digest in order))

    def one(digest: Digest) -> None:
        row = rows[digest]
        reason = _what_is_wrong(store, digest, row, findings, fast=fast)
        with findings.lock:
            if reason is not None:
                findings.reasons[digest] = (row.kind.name.lower(), reason)
            findings.checked_bytes += row.stored_bytes
        advance(row.stored_bytes)

    deltas = [rows[digest].raw_bytes for digest in order if rows[digest].encoding is Encoding.DELTA]
    expect(0 if fast else sum(deltas), differences=True)
    workers = default_workers()
    whole = ref is None and not fast
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            run_bounded(pool, one, batch, ahead=2 * workers)
            _mark(store, batch, set(findings.reasons), fast=fast)
            if whole:
                _note_progress(store, batch[-1] if start + _BATCH < len(order) else None)
    _mark(store, (), set(findings.reasons), fast=fast)
    found = sorted([*findings.reasons.items(), *findings.rows.items()])
    users = _users(store, {digest for digest, _ in found}, findings) if found else {}
    damaged = tuple(Damage(digest, *what, tuple(users.get(digest, ()))) for digest, what in found)
    return VerifyReport(len(order), findings.checked_bytes, damaged, len(skipped), round(time.monotonic() - started, 3))


def _what_is_wrong(store: Store, digest: Digest, row: ObjectRow, findings: _Findings, *, fast: bool) -> str | None:
    """Why an object is damaged; None where it is well, or was collected meanwhile."""
    while True:
        try:
            _check_object(store, digest, row, fast=fast)
            if row.kind is Kind.PREVIEW and not fast:
                _check_preview(store, digest, row, findings.previews.get(digest, ()))
        except MergePipeError as error:
            settle(store.catalog, store.layout)  # a repack that was killed left the row and the file apart
            with store.catalog.reading() as view:
                now = view.object_row(digest)
            if now is None:
                return None
            if replace(now, touched=row.touched) == row:
                return error.message
            row = now  # repacked, or written anew
        else:
            return None


def _done_before(store: Store, rows: Iterable[Digest]) -> set[Digest]:
    """What a check that was interrupted has looked at and found well."""
    with store.catalog.reading() as view:
        after = view.get("meta", _PROGRESS)
        marked = {Digest(key) for key, _ in view.items("damaged")}
    return set() if after is None else {digest for digest in rows if digest <= after and digest not in marked}


def _note_progress(store: Store, last: Digest | None) -> None:
    """Keep how far a check has come, in the order of ids; None: to its end."""
    if store.catalog.read_only:
        return

    def change(view: Writing) -> None:
        if last is not None:
            view.put("meta", _PROGRESS, last)
        else:
            view.delete("meta", _PROGRESS)

    store.catalog.write(change)


def _all_rows(store: Store) -> dict[Digest, ObjectRow]:
    with store.catalog.reading() as view:
        ids = [Digest(key) for key, _ in view.items("objects")]
        rows = {digest: view.object_row(digest) for digest in ids}
    return {digest: row for digest, row in rows.items() if row is not None}


def _rows_of(store: Store, snapshot: Snapshot, findings: _Findings) -> dict[Digest, ObjectRow]:
    rows: dict[Digest, ObjectRow] = {}
    try:
        needed = with_bases(store, object_ids(snapshot))
    except DamagedError as error:  # nobody knows what a damaged tree needs: look at everything
        rows = _all_rows(store)
        findings.reasons.update(lost_record(store, rows, error, snapshot.commit_id))
        return rows
    findings.rows = {block: what for block, what in findings.rows.items() if block in needed}
    of_these = ((digest, [each for each in all_ if each.block in needed]) for digest, all_ in findings.previews.items())
    findings.previews = {digest: previewed for digest, previewed in of_these if previewed}
    with store.catalog.reading() as view:
        for digest in findings.previews:
            row = view.object_row(digest)
            if row is not None:
                rows[digest] = row
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


def _read_preview_rows(store: Store, findings: _Findings) -> None:
    """All rows of previews, by the preview's id; those that say that there is none are passed over."""
    with store.catalog.reading() as view:
        for key, value in view.items("previews"):
            base, block = Digest(key[:DIGEST_BYTES]), Digest(key[DIGEST_BYTES : 2 * DIGEST_BYTES])
            if not value:
                continue
            try:
                row = unpack_row(value)
            except DamagedError:
                reason = f"the catalog's row of the preview of its difference to {base.short} cannot be read"
                findings.rows[block] = ("preview", reason)
            else:
                findings.previews.setdefault(row.id, []).append(_Previewed(base, block, key[2 * DIGEST_BYTES :], row))


def _check_preview_rows(rows: Mapping[Digest, ObjectRow], findings: _Findings) -> None:
    """Each row of a preview names an object that there is, of that kind and size."""
    for digest, previewed in findings.previews.items():
        found = rows.get(digest)
        if found is None:
            findings.rows[digest] = ("preview", f"object {digest.short} is not in the catalog")
        elif found.kind is not Kind.PREVIEW:
            findings.rows[digest] = ("preview", f"object {digest.short} is a {found.kind.name.lower()}, no preview")
        elif any(each.row.stored_bytes != found.stored_bytes for each in previewed):
            reason = f"object {digest.short} does not have the size that the preview's row in the catalog says"
            findings.rows[digest] = ("preview", reason)


def _check_preview(store: Store, digest: Digest, row: ObjectRow, previewed: Iterable[_Previewed]) -> None:
    """A preview's content is one, and says what the catalog says."""
    try:
        preview = read_preview(np.frombuffer(store.reader.read_piece(digest, row.raw_bytes), np.uint8))
    except ValueError as error:
        raise DamagedError(f"object {digest.short} is no preview: {error}") from error
    for each in previewed:
        found = (preview.base, preview.block, bytes([preview.level]), preview.residual)
        if found != (each.base, each.block, each.level, each.row.residual):
            raise DamagedError(f"the preview {digest.short} is not what its row in the catalog says")


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


def _users(store: Store, damaged: set[Digest], findings: _Findings) -> dict[Digest, list[str]]:
    """Which refs, tensors and files need each damaged object, directly or as the base of a delta, or as a preview."""
    coarse: dict[Digest, list[Digest]] = {}
    for digest in damaged & findings.previews.keys():
        for each in findings.previews[digest]:
            coarse.setdefault(each.block, []).append(digest)
    with store.catalog.reading() as view:
        refs = all_refs(view)
        needs = {Digest(key): _base_in(value, damaged) for key, value in view.items("objects")}
    users: dict[Digest, list[str]] = {}

    def note(digest: Digest, user: str) -> None:
        for found in (digest, needs.get(digest), *coarse.get(digest, ())):
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
