"""The catalog's rows, read from the object files alone: each describes itself.

Of blocks and pieces the header and the file's size are looked at; records (nodes, commits, plans) and previews are read
whole, for their content is needed. ``full`` reads everything. An object whose header cannot be read gets no row, so it
counts as absent; one whose content is not what it should be gets its row and is marked as damaged. Either way the next
ingest of the same bytes writes it anew.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from mergepipe.store.catalog import ObjectRow, unix_time
from mergepipe.store.chunking import MAXIMUM_BLOCK_BYTES
from mergepipe.store.commits import Commit, decode_commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, DamagedError, MergePipeError
from mergepipe.store.frame import Encoding, Header, Kind
from mergepipe.store.layout import Layout
from mergepipe.store.objects import ObjectReader
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.usage import object_ids

_NAME = re.compile(r"[0-9a-f]{62}\Z")
_RECORDS: Final = (Kind.NODE, Kind.COMMIT, Kind.PLAN)
_ENCODINGS: Final = {
    True: (Encoding.RAW, Encoding.DEFLATE),
    False: (Encoding.RAW, Encoding.PLANES, Encoding.DELTA),
}


@dataclass
class Found:
    """What the objects say.

    ``objects``: the row of each file whose header can be read; ``damaged``: what is wrong with a file, with or without
    a row; ``commits``: id -> content, and decoded; ``previews``: rows of the catalog's ``previews``.
    """

    objects: dict[Digest, ObjectRow] = field(default_factory=dict)
    damaged: dict[Digest, str] = field(default_factory=dict)
    commits: dict[Digest, Commit] = field(default_factory=dict)
    commit_rows: dict[Digest, bytes] = field(default_factory=dict)
    previews: dict[bytes, bytes] = field(default_factory=dict)
    checked_bytes: int = 0


def scan(layout: Layout, *, full: bool = False, progress: Progress | None = None) -> Found:
    """Look at all object files; ``full`` decodes each of them and compares it with its id. Raises OSError."""
    scanning = _Scan(layout, full=full)
    files = list(_files(layout))
    advance = counter(progress, "objects", sum(size for _, size in files))

    def one(item: tuple[Digest, int]) -> None:
        scanning.look(*item)
        advance(max(item[1], 0))

    workers = default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="recover") as pool:
        run_bounded(pool, one, files, ahead=4 * workers)
    found = scanning.found
    _keep_bases(found)
    found.commits = dict(sorted(found.commits.items()))
    return found


def is_whole(layout: Layout, found: Found, digest: Digest) -> bool:
    """Whether everything that a commit names is there, and the base of each delta among it."""
    try:
        needed = object_ids(Snapshot(ObjectReader(layout), digest, found.commits[digest]))
    except MergePipeError:
        return False
    rows = [found.objects.get(each) for each in needed]
    bases = [found.objects.get(row.base) for row in rows if row is not None and row.base is not None]
    return all(row is not None and row.stored_bytes for row in (*rows, *bases))


def children_rows(commits: Mapping[Digest, Commit]) -> dict[bytes, bytes]:
    """The rows of ``children``."""
    return {
        parent.commit + digest: parent.role.encode() for digest, commit in commits.items() for parent in commit.parents
    }


def _files(layout: Layout) -> Iterator[tuple[Digest, int]]:
    """All object files with their sizes in bytes; -1 for what has an object's name and is no file."""
    for fan in range(256):
        try:
            with os.scandir(layout.objects / f"{fan:02x}") as entries:
                for entry in entries:
                    if _NAME.match(entry.name):
                        is_file = entry.is_file(follow_symlinks=False)
                        size = entry.stat(follow_symlinks=False).st_size if is_file else -1
                        yield Digest.parse(f"{fan:02x}{entry.name}"), size
        except (FileNotFoundError, NotADirectoryError):
            continue


class _Scan:
    """Threads look at one file each."""

    def __init__(self, layout: Layout, *, full: bool) -> None:
        self.found = Found()
        self._reader = ObjectReader(layout)
        self._full = full
        self._lock = threading.Lock()
        self._now = unix_time()

    def look(self, digest: Digest, size: int) -> None:
        """Take down what one file says."""
        try:
            header = self._header(digest, size)
        except MergePipeError as error:
            with self._lock:
                self.found.damaged[digest] = error.message
            return
        row = ObjectRow(
            header.kind, header.encoding, header.width, header.raw_bytes, size, self._now, header.base
        )  # fmt: skip
        with self._lock:
            self.found.objects[digest] = row
            self.found.checked_bytes += size
        try:
            self._read(digest, header)
        except MergePipeError as error:
            with self._lock:
                self.found.damaged[digest] = error.message

    def _header(self, digest: Digest, size: int) -> Header:
        if size < 0:
            raise DamagedError(f"object {digest.short} is no file")
        header = self._reader.read_header(digest)
        is_record = header.kind in _RECORDS
        if header.stored_bytes != size:
            raise DamagedError(f"object {digest.short} has {size} bytes, its header says {header.stored_bytes}")
        if header.encoding not in _ENCODINGS[is_record] or (not is_record and header.raw_bytes > MAXIMUM_BLOCK_BYTES):
            raise DamagedError(f"object {digest.short} has a header that no object has")
        return header

    def _read(self, digest: Digest, header: Header) -> None:
        if header.kind is Kind.COMMIT:
            self._commit(digest)
        elif header.kind is Kind.PREVIEW:
            self._preview(digest, header)
        elif header.kind in _RECORDS or self._full:
            self._reader.verify(digest)

    def _commit(self, digest: Digest) -> None:
        data = self._reader.read_record(Kind.COMMIT, digest)
        try:
            commit = decode_commit(data, f"commit {digest.short}")
        except BadInputError as error:
            raise DamagedError(error.message) from error
        if commit.id != digest:
            raise DamagedError(f"commit {digest.short} is not written as commits are")
        self._reader.verify(digest)
        with self._lock:
            self.found.commits[digest] = commit
            self.found.commit_rows[digest] = data

    def _preview(self, digest: Digest, header: Header) -> None:
        import numpy as np

        from mergepipe.store.previews import PreviewRow, preview_key, read_preview

        data = self._reader.read_piece(digest, header.raw_bytes)
        try:
            preview = read_preview(np.frombuffer(data, np.uint8))
        except ValueError as error:
            raise DamagedError(f"object {digest.short} is no preview: {error}") from error
        row = PreviewRow(digest, header.stored_bytes, preview.residual)
        with self._lock:
            key = preview_key(preview.base, preview.block, preview.level)
            self.found.previews[key] = max(self.found.previews.get(key, b""), row.pack())


def _keep_bases(found: Found) -> None:
    """A base that is lost keeps a row, marked as damaged: whoever brings it again must not store it as a delta."""
    lost = {
        row.base: row
        for row in found.objects.values()
        if row.base is not None and row.base not in found.objects
    }  # fmt: skip
    for base, row in lost.items():
        found.objects[base] = ObjectRow(Kind.BLOCK, Encoding.RAW, 1, row.raw_bytes, 0, row.touched)
        found.damaged.setdefault(base, f"object {base.short} is missing, and others are stored as differences to it")
