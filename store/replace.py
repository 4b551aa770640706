"""Another encoding of the same content takes an object's place; its id does not change.

What must hold at every moment, after a crash too: *a row says delta wherever its file is one, or may be.* Writers
choose the bases of their deltas by rows, and a delta's base is never a delta. So a row becomes a delta's before its
file does, and stops to be one after its file did:

1. the new files are staged, read back, flushed (:mod:`mergepipe.store.repack`);
2. a first transaction: each object that will become a delta gets its new row, and every object of the batch a note in
   ``meta`` (``repack`` + NUL + id -> its old row);
3. nobody else may be writing now: a writer that was there before may have chosen one of these blocks as a base by its
   old row. One that begins later sees the new row; one that is done has its rows, which step 4 looks at;
4. a second transaction, as in :mod:`mergepipe.store.publish`: files are renamed, directories flushed, rows put, notes
   removed; and it commits.

A crash after 2 leaves notes, and rows that may disagree with their files, on the safe side. Readers go by the file's
own header. :func:`settle` makes each such row agree with its file again; it may run at any time: a repack that is
between 2 and 4 sees that its note is gone, and leaves that object as it is. Whoever has an old file open reads on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mergepipe.store.catalog import Catalog, ObjectRow, Reading, Writing, unix_time
from mergepipe.store.digest import DIGEST_BYTES, Digest
from mergepipe.store.errors import ConflictError, MergePipeError
from mergepipe.store.filesystem import explain_os_error, flush_directory, flush_files, flush_filesystem
from mergepipe.store.frame import HEADER_BYTES, Encoding, Header, Kind, unpack_header
from mergepipe.store.interrupts import too_late_to_interrupt
from mergepipe.store.layout import Layout
from mergepipe.store.leases import is_abandoned
from mergepipe.store.objects import no_pipes
from mergepipe.store.staging import Batch

_NOTE: Final = b"repack\0"
MAY_BE_BASES: Final = (Kind.BLOCK, Kind.FILE)


@dataclass(frozen=True, slots=True)
class Replacement:
    """One object: its row as it is, and as it will be."""

    digest: Digest
    old: ObjectRow
    new: ObjectRow

    @property
    def becomes_delta(self) -> bool:
        return self.new.encoding is Encoding.DELTA

    @property
    def declared(self) -> ObjectRow:
        """The row between the two transactions: a delta's, if either is."""
        return self.new if self.becomes_delta else self.old


def replace_objects(catalog: Catalog, batch: Batch, wanted: Sequence[Replacement]) -> list[Replacement]:
    """Let staged files take their objects' places; returns those that did.

    What changed meanwhile, or became the base of a delta, is left as it is.

    Raises:
        ConflictError: somebody else is writing to the store, and blocks were to become deltas.
        EnvironmentalError: the disk is full, or the like. Every object is whole, in one encoding or the other.
    """
    try:
        if not flush_filesystem(batch.path):
            flush_files(str(batch.file_of(each.digest)) for each in wanted)
    except OSError as error:
        raise explain_os_error(error, "flushing new objects to disk") from error
    with too_late_to_interrupt():
        declared: list[Replacement] = catalog.write(lambda view: _declare(view, wanted))
        try:
            if any(each.becomes_delta for each in declared):
                refuse_other_writers(batch.layout, batch.path)
            return catalog.write(lambda view: _replace(view, batch, declared))
        except BaseException:
            with suppress(MergePipeError):  # else whoever comes next does it
                settle(catalog, batch.layout)
            raise


def settle(catalog: Catalog, layout: Layout) -> int:
    """Make the rows of repacks that did not end agree with their files again; returns how many there were."""
    with catalog.reading() as view:
        if next(view.items("meta", _NOTE), None) is None:
            return 0
    if catalog.read_only:
        return 0

    def change(view: Writing) -> int:
        notes = list(view.items("meta", _NOTE))
        for key, _ in notes:
            if len(key) != len(_NOTE) + DIGEST_BYTES:  # nobody's
                view.delete("meta", key)
                continue
            digest = Digest(key[len(_NOTE) :])
            row, header = view.object_row(digest), _header_of(layout, digest)
            if row is not None and header is not None:
                view.put("objects", digest, _row_of(header, row.touched).pack())
            view.delete("meta", key)
        return len(notes)

    return catalog.write(change)


def unsettled(view: Reading) -> set[Digest]:
    """Objects whose row may disagree with their file, because a repack replaces them now, or died in the middle."""
    ids = (key[len(_NOTE) :] for key, _ in view.items("meta", _NOTE))
    return {Digest(each) for each in ids if len(each) == DIGEST_BYTES}


def bases_of_deltas(view: Reading) -> set[bytes]:
    """Ids of all objects that some delta is stored against."""
    return {value[-DIGEST_BYTES:] for _, value in view.items("objects") if value[1] == Encoding.DELTA}


def refuse_other_writers(layout: Layout, own: Path) -> None:
    """Raises ConflictError where somebody else is writing to the store, or may be."""
    try:
        with os.scandir(layout.temporary) as entries:
            folders = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise explain_os_error(error, "looking for other writers") from error
    busy = [folder for folder in folders if folder != own and not is_abandoned(folder)]
    if busy:
        raise ConflictError(
            "somebody else is at work in the store, and may rely on blocks as they are stored now",
            hint="Run it again when they are done: it goes on where it stopped. If nothing runs any more, "
            f"on any machine, remove {busy[0]}.",
        )


def _declare(view: Writing, wanted: Sequence[Replacement]) -> list[Replacement]:
    bases = bases_of_deltas(view)
    declared = []
    for each in wanted:
        row = view.object_row(each.digest)
        if row is None or not _agree(row, each.old) or view.get("damaged", each.digest) is not None:
            continue
        if view.get("meta", _NOTE + each.digest) is not None:  # somebody else's, who is at work
            continue
        if each.becomes_delta:
            if each.digest in bases or not _has_base(view, each.new):
                continue
            assert each.new.base is not None
            bases.add(each.new.base)
            _rely_on(view, each.new.base)
            view.put("objects", each.digest, replace(each.new, touched=row.touched).pack())
        view.put("meta", _NOTE + each.digest, each.old.pack())
        declared.append(each)
    return declared


def _replace(view: Writing, batch: Batch, declared: Sequence[Replacement]) -> list[Replacement]:
    bases = bases_of_deltas(view)
    done: list[Replacement] = []
    directories: set[str] = set()
    try:
        for each in declared:
            row = view.object_row(each.digest)
            noted = view.delete("meta", _NOTE + each.digest)
            if not noted or row is None or not _agree(row, each.declared):
                continue  # settled, or written anew, or gone
            moved = not batch.file_of(each.digest).exists()  # by a first run, which the map was too small for
            if each.becomes_delta and not moved and (each.digest in bases or not _has_base(view, each.new)):
                view.put("objects", each.digest, replace(each.old, touched=row.touched).pack())
                continue
            directories.add(_move(batch, each.digest, moved=moved))
            view.put("objects", each.digest, replace(each.new, touched=row.touched).pack())
            view.delete("damaged", each.digest)
            done.append(each)
        if directories and not flush_filesystem(batch.layout.objects):
            for directory in sorted(directories):
                flush_directory(Path(directory))
    except OSError as error:
        raise explain_os_error(error, "moving new objects into place") from error
    return done


def _move(batch: Batch, digest: Digest, *, moved: bool) -> str:
    """Rename a staged file into its place; returns the directory."""
    target = batch.layout.object_path(digest)
    if not moved:
        os.replace(batch.file_of(digest), target)  # noqa: PTH105
    return target[: target.rindex("/")]


def _has_base(view: Reading, row: ObjectRow) -> bool:
    """Whether a delta's base is there, of its size, and no delta itself."""
    base = view.object_row(row.base) if row.base is not None else None
    return (
        base is not None
        and base.kind in MAY_BE_BASES
        and base.encoding is not Encoding.DELTA
        and base.raw_bytes == row.raw_bytes
        and view.get("damaged", row.base or b"") is None
    )


def _rely_on(view: Writing, base: Digest) -> None:
    """Make a base young, as publishing does: a collection that has marked already leaves it alone."""
    row, now = view.object_row(base), unix_time()
    if row is not None and row.touched < now - 60:
        view.put("objects", base, replace(row, touched=now).pack())


def _agree(one: ObjectRow, other: ObjectRow) -> bool:
    """Whether two rows say the same of the file; when it was last relied on does not matter."""
    return replace(one, touched=0) == replace(other, touched=0)


def _header_of(layout: Layout, digest: Digest) -> Header | None:
    """The header of a file that has the size that it says; None where there is none."""
    try:
        with open(layout.object_path(digest), "rb", buffering=0, opener=no_pipes) as file:
            header = unpack_header(file.read(HEADER_BYTES))
            return header if os.fstat(file.fileno()).st_size == header.stored_bytes else None
    except (OSError, ValueError):
        return None  # `mp verify` will say what is wrong with it


def _row_of(header: Header, touched: int) -> ObjectRow:
    return ObjectRow(
        header.kind, header.encoding, header.width, header.raw_bytes, header.stored_bytes, touched, header.base
    )
