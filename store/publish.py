"""The one function that makes work visible.

Order: (1) objects were written into the writer's folder; (2) one flush of the filesystem makes their content
durable; (3) inside one LMDB write transaction, which only one writer can hold, they are renamed into ``objects/``,
the directories are flushed, and rows, commits and refs are put; (4) the transaction commits.

Before (4) nothing is visible, after it all is. A crash between the renames and (4) leaves files without rows, which
the next writer of the same object replaces. Since renames happen under the write lock and only where no row exists,
a row and its file always agree. A ref moves only from the value that its writer saw. Moves of refs go to the journal
(:mod:`mergepipe.store.journal`), last of all before (4).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergepipe.store.canonical import dump_canonical
from mergepipe.store.catalog import Catalog, ObjectRow, Writing, unix_time
from mergepipe.store.commits import Commit, timestamp_now
from mergepipe.store.digest import Digest
from mergepipe.store.errors import ConflictError
from mergepipe.store.filesystem import explain_os_error, flush_directory, flush_files, flush_filesystem
from mergepipe.store.frame import Encoding
from mergepipe.store.interrupts import too_late_to_interrupt
from mergepipe.store.journal import record_moves
from mergepipe.store.layout import is_layout
from mergepipe.store.refs import Ref, decode_ref, encode_ref
from mergepipe.store.staging import Batch, Staging


@dataclass(frozen=True, slots=True)
class RefUpdate:
    """A ref's move from ``expected`` (None: it must not exist) to ``new`` (None: it goes away)."""

    name: str
    expected: Digest | None
    new: Digest | None
    kind: str = "branch"
    reason: str = ""
    author: str = ""


@dataclass
class Changes:
    """What one publication puts besides the staged objects."""

    commits: list[Commit] = field(default_factory=list)
    refs: list[RefUpdate] = field(default_factory=list)
    deltas: dict[bytes, bytes] = field(default_factory=dict)
    tensors: dict[bytes, bytes] = field(default_factory=dict)
    results: dict[bytes, Digest] = field(default_factory=dict)
    previews: dict[bytes, bytes] = field(default_factory=dict)
    relied_on: Sequence[Digest] = ()


def publish(catalog: Catalog, staging: Staging | Batch | None, changes: Changes) -> None:
    """Make staged objects and ``changes`` durable and visible, all or nothing.

    Raises:
        ConflictError: a ref is not where its writer saw it; nothing was moved, and the objects are not kept.
        EnvironmentalError: the disk is full, or the like; the store is as it was.
    """
    if staging is not None and staging.rows:
        try:
            if not flush_filesystem(staging.path):
                flush_files(str(staging.file_of(digest)) for digest in staging.rows)
        except OSError as error:
            raise explain_os_error(error, "flushing new objects to disk") from error

    def change(view: Writing) -> None:
        if staging is not None and not is_layout(staging.layout.root):
            raise ConflictError(
                f"the store {staging.layout.root} was taken away meanwhile", hint="Run the command again."
            )
        for update in changes.refs:
            _expect(view, update)
        if staging is not None and staging.rows:
            _expect_bases(view, staging)
            _move_objects(view, staging)
        if isinstance(staging, Staging):
            _rely_on(view, staging.relied_on)
        _rely_on(view, changes.relied_on)
        _put_rows(view, changes)
        for update in changes.refs:
            _move_ref(view, update)
        if changes.refs and catalog.journal is not None:
            record_moves(view, catalog.journal, [(update.name, update.kind) for update in changes.refs])

    with too_late_to_interrupt():
        catalog.write(change)


def _move_objects(view: Writing, staging: Staging | Batch) -> None:
    layout = staging.layout
    directories: set[str] = set()
    try:
        for digest, row in staging.rows.items():
            target = layout.object_path(digest)
            source = str(staging.file_of(digest))
            known = view.object_row(digest)
            intact = known is not None and view.get("damaged", digest) is None and _has_size(target, known.stored_bytes)
            if intact:
                continue
            # The transaction may run twice, where the map had to grow: then the file is in its place already.
            if os.path.exists(source):  # noqa: PTH110  # hot path
                os.replace(source, target)  # noqa: PTH105
            directories.add(target[: target.rindex("/")])
            view.put("objects", digest, row.pack())
            view.delete("damaged", digest)
        if not directories:
            return
        if not flush_filesystem(layout.objects):
            for directory in sorted(directories):
                flush_directory(Path(directory))
    except OSError as error:
        raise explain_os_error(error, "moving new objects into place") from error


def _expect_bases(view: Writing, staging: Staging | Batch) -> None:
    """Raises ConflictError where a block that a new delta is stored against was collected meanwhile."""
    bases = {row.base for row in staging.rows.values() if row.base is not None and row.base not in staging.rows}
    for base in bases:
        found = view.object_row(base)
        if found is None or found.encoding is Encoding.DELTA:
            raise _went_away(f"object {base.short}, which a delta is stored against,")


def _has_size(path: str, size: int) -> bool:
    try:
        return os.stat(path).st_size == size  # noqa: PTH116  # hot path
    except OSError:
        return False


def _rely_on(view: Writing, objects: Iterable[Digest]) -> None:
    """Make objects that are in the store young again; raises ConflictError where one was collected meanwhile."""
    now = unix_time()
    for digest in objects:
        row = view.object_row(digest)
        if row is None:
            raise _went_away(f"object {digest.short}")
        if row.touched < now - 60:
            view.put("objects", digest, _touched(row, now))


def _went_away(what: str) -> ConflictError:
    return ConflictError(f"{what} went away while it was being relied on", hint="Run the command again.")


def _put_rows(view: Writing, changes: Changes) -> None:
    rows: Mapping[str, Mapping[bytes, bytes]] = {
        "deltas": changes.deltas,
        "tensors": changes.tensors,
        "results": changes.results,
        "previews": changes.previews,
    }
    for database, items in rows.items():
        for key, value in items.items():
            view.put(database, key, value)
    made = {commit.id for commit in changes.commits}
    for commit in changes.commits:
        for parent in commit.parents:
            if view.get("commits", parent.commit) is None and parent.commit not in made:
                raise _went_away(f"commit {parent.commit.short}")
        view.put("commits", commit.id, commit.encode())
        for parent in commit.parents:
            view.put("children", parent.commit + commit.id, parent.role.encode())


def _touched(row: ObjectRow, now: int) -> bytes:
    return replace(row, touched=now).pack()


def _expect(view: Writing, update: RefUpdate) -> None:
    data = view.get("refs", update.name.encode())
    found = decode_ref(data) if data is not None else None
    if (found.commit if found else None) == update.expected:
        return
    seen = update.expected.short if update.expected else "absent"
    now = found.commit.short if found else "gone"
    raise ConflictError(
        f"ref {update.name!r} was {seen} and is now {now}: somebody else moved it meanwhile",
        hint="Look at it with `mp log`, then run the command again.",
    )


def _move_ref(view: Writing, update: RefUpdate) -> None:
    key = update.name.encode()
    if update.new is None:
        view.delete("refs", key)
    elif view.get("commits", update.new) is None:
        raise _went_away(f"commit {update.new.short}")
    else:
        view.put("refs", key, encode_ref(Ref(update.name, update.new, update.kind)))
    last = next(view.items("reflog", key + b"\0", reverse=True), None)
    number = int.from_bytes(last[0][-8:], "big") + 1 if last else 0
    entry = {
        "old": update.expected.hex() if update.expected else None,
        "new": update.new.hex() if update.new else None,
        "reason": update.reason,
        "author": update.author,
        "time": timestamp_now(),
    }
    view.put("reflog", key + b"\0" + number.to_bytes(8, "big"), dump_canonical(entry))
