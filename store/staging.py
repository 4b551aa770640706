"""What a writer has made and not yet published: object files under ``tmp/<writer>/``, with a lease.

Nothing here is visible to anybody until :func:`mergepipe.store.publish.publish` takes it. A writer that dies leaves
its folder; the next writer removes it, where its lease shows that the process is gone.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mergepipe.store.catalog import Catalog, ObjectRow, Reading, unix_time
from mergepipe.store.digest import Buffer, Digest, hash_record
from mergepipe.store.errors import MergePipeError
from mergepipe.store.filesystem import explain_os_error, start_writeback
from mergepipe.store.frame import HEADER_BYTES, Encoding, Header, Kind, pack_header
from mergepipe.store.layout import Layout
from mergepipe.store.leases import ReliedOn, make_folder, pin, remove_abandoned, remove_folder
from mergepipe.store.objects import may_unfold

if TYPE_CHECKING:
    from mergepipe.store.codecs import Bytes

_RECORD_NAMES = {Kind.NODE: "node", Kind.COMMIT: "commit", Kind.PLAN: "plan"}
_DELTA_IS_GOOD = 0.6  # below this share of the raw size nobody tries plain planes as well


@dataclass(frozen=True, slots=True)
class Batch:
    """Staged objects that are published before their writer is done."""

    layout: Layout
    path: Path
    rows: dict[Digest, ObjectRow]

    def file_of(self, digest: Digest) -> Path:
        return self.path / digest.hex()


class Staging:
    """One writer's unpublished objects. Use as a context manager; threads may share it.

    ``rows`` maps each staged id to its future catalog row. ``written_bytes`` counts object files as written.
    """

    def __init__(self, layout: Layout, catalog: Catalog) -> None:
        self.layout = layout
        self._catalog = catalog
        self.rows: dict[Digest, ObjectRow] = {}
        self._taken_bytes = 0
        self._claimed: set[Digest] = set()
        self._relied_on: set[Digest] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        try:
            self.path = make_folder(self.layout.temporary)
            self._relied_file = ReliedOn(self.path)
        except OSError as error:
            raise explain_os_error(error, f"making the writer's folder in {self.layout.temporary}") from error
        remove_abandoned(self.layout.temporary)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._relied_file.close()
        remove_folder(self.path)

    def pin(self, commits: Iterable[Digest]) -> None:
        """Say that these commits are being read: no collection takes their objects while this writer lives."""
        try:
            pin(self.path, commits)
        except OSError as error:
            raise explain_os_error(error, "writing a lease") from error

    @property
    def written_bytes(self) -> int:
        with self._lock:
            return self._taken_bytes + sum(row.stored_bytes for row in self.rows.values())

    def take_batch(self) -> Batch:
        """The objects that are staged by now, to be published by themselves; they are no longer in ``rows``."""
        with self._lock:
            rows, self.rows = self.rows, {}
            self._taken_bytes += sum(row.stored_bytes for row in rows.values())
        return Batch(self.layout, self.path, rows)

    def file_of(self, digest: Digest) -> Path:
        """Where a staged object's file lies until it is published."""
        return self.path / digest.hex()

    def claim(self, digest: Digest) -> bool:
        """Whether the caller should write this object: True once for an id that the store does not hold."""
        with self._lock:
            if digest in self._claimed:
                return False
            self._claimed.add(digest)
        if not is_stored(self.layout, self._catalog, digest):
            return True
        with self._lock:
            self._relied_on.add(digest)
            try:
                self._relied_file.add(digest)
            except OSError as error:
                raise explain_os_error(error, "writing what is relied on") from error
        return False

    @property
    def relied_on(self) -> set[Digest]:
        """Objects that were claimed and are in the store already: publishing makes sure that they still are."""
        with self._lock:
            return set(self._relied_on)

    def add_block(
        self, kind: Kind, digest: Digest, data: Bytes, width: int, base: tuple[Digest, Bytes] | None = None
    ) -> ObjectRow:
        """Encode and stage a claimed block or file piece; the smallest encoding wins.

        ``base``: id and bytes of a block that is no delta itself, of the same size.
        """
        from mergepipe.store import codecs

        size = data.nbytes
        width = codecs.effective_width(size, width)
        if base is not None and self._may_be_a_base(digest):
            base = None
        encoding = Encoding.RAW
        payload: list[Buffer] = [data.data] if size else []
        smallest = size
        if base is not None and base[0] != digest and width in codecs.DELTA_WIDTHS:
            parts = codecs.encode_delta(data, base[1], width)
            if codecs.payload_size(parts) < smallest:
                encoding, payload, smallest = Encoding.DELTA, parts, codecs.payload_size(parts)
        if size and smallest > _DELTA_IS_GOOD * size:
            parts = codecs.encode_planes(data, width, text=kind is Kind.FILE)
            if codecs.payload_size(parts) < smallest:
                encoding, payload, smallest = Encoding.PLANES, parts, codecs.payload_size(parts)
        base_id = base[0] if encoding is Encoding.DELTA and base else None
        return self._write(digest, Header(kind, encoding, width, size, smallest, base_id), payload)

    def add_preview(self, digest: Digest, content: Bytes, most_bytes: int) -> ObjectRow | None:
        """Encode and stage a claimed preview; None, and nothing staged, where its file takes over ``most_bytes``."""
        from mergepipe.store import codecs

        parts = codecs.encode_planes(content, 1)
        size = codecs.payload_size(parts)
        if HEADER_BYTES + size > most_bytes:
            return None
        return self._write(digest, Header(Kind.PREVIEW, Encoding.PLANES, 1, content.nbytes, size, None), parts)

    def row_of(self, digest: Digest) -> ObjectRow | None:
        """The row of an object that is staged, or in the store."""
        with self._lock:
            row = self.rows.get(digest)
        if row is not None:
            return row
        with self._catalog.reading() as view:
            return view.object_row(digest)

    def _may_be_a_base(self, digest: Digest) -> bool:
        """Whether a lost object that is written anew was no delta before: others may be deltas to it."""
        with self._catalog.reading() as view:
            row = view.object_row(digest)
        return row is not None and row.encoding is not Encoding.DELTA

    def add_record(self, kind: Kind, data: bytes) -> Digest:
        """Stage a node, commit or plan, unless the store has it; returns its id."""
        digest = hash_record(_RECORD_NAMES[kind], data)
        if self.claim(digest):
            small = zlib.compress(data, 6)
            folded = len(small) < len(data) and may_unfold(len(data), len(small))
            encoding, payload = (Encoding.DEFLATE, small) if folded else (Encoding.RAW, data)
            self._write(digest, Header(kind, encoding, 1, len(data), len(payload), None), [payload])
        return digest

    def put_encoded(self, digest: Digest, header: Header, payload: list[Buffer]) -> ObjectRow:
        """Stage an object in the encoding that the caller chose, whether or not the store holds it already."""
        return self._write(digest, header, payload)

    def _write(self, digest: Digest, header: Header, payload: list[Buffer]) -> ObjectRow:
        path = self.file_of(digest)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o444)
            try:
                _write_all(descriptor, [pack_header(header, payload), *payload])
                start_writeback(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise explain_os_error(error, "writing objects") from error
        row = ObjectRow(
            header.kind,
            header.encoding,
            header.width,
            header.raw_bytes,
            HEADER_BYTES + header.payload_bytes,
            unix_time(),
            header.base,
        )
        with self._lock:
            self.rows[digest] = row
        return row


def is_stored(layout: Layout, catalog: Catalog, digest: Digest) -> bool:
    """Whether the store holds an object that is not known to be damaged.

    The file's size is looked at as well: an object whose file was lost or cut is written anew.
    """
    with catalog.reading() as view:
        return is_intact(layout, view, digest)


def is_intact(layout: Layout, view: Reading, digest: Digest) -> bool:
    """:func:`is_stored` within a transaction."""
    row = view.object_row(digest)
    if row is None or view.get("damaged", digest) is not None:
        return False
    try:
        return os.stat(layout.object_path(digest)).st_size == row.stored_bytes  # noqa: PTH116  # hot path
    except OSError:
        return False


def _write_all(descriptor: int, parts: list[Buffer]) -> None:
    views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
    while views:
        written = os.writev(descriptor, views[:16])
        if written == 0:
            raise MergePipeError("the system wrote nothing to an object's file")
        while views and written >= views[0].nbytes:
            written -= views.pop(0).nbytes
        if written:
            views[0] = views[0][written:]
