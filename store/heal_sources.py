"""Where lost objects can come from: another store's object files, or a checkpoint's tensors and files.

A source yields what it has of the wanted ids, each with content that hashes to its id. Files that are there and hold
something else are listed as refused. Sources are only read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from mergepipe.store.checkpoint import OpenFile, TensorSource, open_checkpoint
from mergepipe.store.chunking import MAXIMUM_BLOCK_BYTES, block_count, block_elements, chunk_shape
from mergepipe.store.digest import Buffer, Digest, hash_bytes, hash_record
from mergepipe.store.errors import DamagedError, MergePipeError
from mergepipe.store.frame import HEADER_BYTES, Encoding, Header, Kind
from mergepipe.store.manifest import FileEntry, Shard, TensorEntry, build_tree
from mergepipe.store.objects import ObjectReader
from mergepipe.store.parallel import Progress, counter

if TYPE_CHECKING:
    from mergepipe.store.catalog import ObjectRow
    from mergepipe.store.layout import Layout
    from mergepipe.store.store import Store

Wanted = Mapping[Digest, "ObjectRow | None"]
_RECORDS: Final = (Kind.NODE, Kind.COMMIT, Kind.PLAN)
_MOST_RECORD_BYTES: Final = 128 << 20  # of a record of which nothing is known here
_TABLE_BYTES: Final = 64  # what an encoding may take beyond the raw size


@dataclass(frozen=True, slots=True)
class Found:
    """An object's decoded content, which hashes to ``id``. ``width``: byte planes for blocks."""

    id: Digest
    kind: Kind
    data: Buffer
    width: int = 1


@dataclass(frozen=True, slots=True)
class Refused:
    """A file under a wanted id that does not hold what the id names."""

    id: Digest
    reason: str


@dataclass
class StoreSource:
    """The object files of another store. Its catalog is not opened."""

    layout: Layout
    refused: list[Refused] = field(default_factory=list)
    name: str = "store"

    def close(self) -> None:
        """Nothing is open."""

    def find(self, wanted: Wanted, progress: Progress | None = None) -> Iterator[Found]:
        """What is there of the wanted objects; deltas last, so that what they need here can come first."""
        reader = ObjectReader(self.layout)
        advance = counter(progress, "heal", sum(row.stored_bytes for row in wanted.values() if row is not None))
        for digest, row in sorted(wanted.items(), key=lambda item: (_is_delta(item[1]), item[0])):
            try:
                found = self._read(reader, digest, row)
            except DamagedError as error:
                self.refused.append(Refused(digest, error.message))
            else:
                if found is not None:
                    yield found
            advance(row.stored_bytes if row is not None else 0)

    def _read(self, reader: ObjectReader, digest: Digest, row: ObjectRow | None) -> Found | None:
        """The object, checked against its id; None where there is no such file. Raises DamagedError."""
        size = self._size(digest)
        if size is None:
            return None
        header = reader.read_header(digest)
        if row is not None and header.raw_bytes != row.raw_bytes:
            raise DamagedError(f"it holds {header.raw_bytes} bytes there, and {row.raw_bytes} here")
        if header.kind in _RECORDS:
            if row is None and header.raw_bytes > _MOST_RECORD_BYTES:
                raise DamagedError(f"it claims {header.raw_bytes} bytes")
            return Found(digest, header.kind, reader.read_record(header.kind, digest))
        self._check_sizes(header, size)
        data = np.empty(header.raw_bytes, np.uint8)
        reader.read_block(digest, data)
        return Found(digest, header.kind, data.data, header.width)

    def _check_sizes(self, header: Header, size: int) -> None:
        """No file may make the reader take more memory than a block can need; nor may its base's."""
        if header.raw_bytes > MAXIMUM_BLOCK_BYTES:
            raise DamagedError(f"it claims {header.raw_bytes} bytes")
        most = HEADER_BYTES + header.raw_bytes + _TABLE_BYTES
        of_base = self._size(header.base) if header.base is not None else 0
        if of_base is None:
            raise DamagedError("it is a delta there, and its base is missing")
        if max(size, of_base) > most:
            raise DamagedError(f"its file, or its base's, takes {max(size, of_base)} bytes, more than it can need")

    def _size(self, digest: Digest) -> int | None:
        """The size of an object's file, None where there is none. Raises DamagedError for what is no plain file."""
        try:
            found = os.lstat(self.layout.object_path(digest))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedError(f"it cannot be read there: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError("it is no plain file there")
        return found.st_size


def _is_delta(row: ObjectRow | None) -> bool:
    return row is not None and row.encoding is Encoding.DELTA


class CheckpointSource:
    """A checkpoint's tensors, files and headers, cut as this store cuts them; and the manifest nodes over them."""

    name = "checkpoint"

    def __init__(self, store: Store, path: Path) -> None:
        self.refused: list[Refused] = []
        self._store = store
        self._checkpoint = open_checkpoint(path)
        self._block_bytes = store.layout.block_bytes

    def close(self) -> None:
        self._checkpoint.close()

    def find(self, wanted: Wanted, progress: Progress | None = None) -> Iterator[Found]:
        """What the checkpoint has of the wanted objects. Reads all of it, once for each way that it was cut."""
        tensors = self._checkpoint.tensors
        grids = _grids(self._store, wanted)
        advance = counter(progress, "heal", sum(_nbytes(source) for source in tensors.values()))
        entries: dict[str, TensorEntry] = {}
        for name, source in tensors.items():
            usual = chunk_shape(source.shape, source.dtype.bits, self._block_bytes)
            known = grids.get((name, source.dtype.name, source.shape), set())
            for chunks in (usual, *sorted(known - {usual})):
                ids = []
                for digest, found in _blocks(source, chunks):
                    ids.append(digest)
                    if digest in wanted:
                        yield found
                if chunks == usual or known == {chunks}:
                    entries[name] = TensorEntry(source.dtype.name, source.shape, chunks, tuple(ids))
            advance(_nbytes(source))
        yield from self._files_and_nodes(wanted, entries)

    def _files_and_nodes(self, wanted: Wanted, entries: Mapping[str, TensorEntry]) -> Iterator[Found]:
        files: dict[str, FileEntry] = {}
        for name, file in sorted(self._checkpoint.files.items()):
            ids = []
            for piece in _pieces(file, self._block_bytes):
                ids.append(piece.id)
                if piece.id in wanted:
                    yield piece
            files[name] = FileEntry(file.stamp[0], tuple(ids))
        shards = []
        for shard in self._checkpoint.shards:
            raw, step = memoryview(shard.header.raw), self._block_bytes
            found = [_piece(raw[start : start + step]) for start in range(0, len(raw), step)]
            yield from (piece for piece in found if piece.id in wanted)
            shards.append(Shard(shard.path, FileEntry(len(raw), tuple(piece.id for piece in found))))
        nodes: list[Found] = []

        def put(data: bytes) -> Digest:
            digest = hash_record("node", data)
            if digest in wanted:
                nodes.append(Found(digest, Kind.NODE, data))
            return digest

        build_tree(entries, files, tuple(shards), put)
        yield from nodes


def _grids(store: Store, wanted: Iterable[Digest]) -> dict[tuple[str, str, tuple[int, ...]], set[tuple[int, ...]]]:
    """How the commits that can be read cut the tensors that need a wanted block."""
    found: dict[tuple[str, str, tuple[int, ...]], set[tuple[int, ...]]] = {}
    needed = set(wanted)
    with store.catalog.reading() as view:
        commits = [Digest(key) for key, _ in view.items("commits")]
    for commit in commits:
        try:
            tensors = store.snapshot_of(commit).tensors
        except MergePipeError:
            continue
        for name, entry in tensors.items():
            if not needed.isdisjoint(entry.blocks):
                found.setdefault((name, entry.dtype, entry.shape), set()).add(entry.chunks)
    return found


def _blocks(source: TensorSource, chunks: tuple[int, ...]) -> Iterator[tuple[Digest, Found]]:
    for index in range(block_count(source.shape, chunks)):
        start, count = block_elements(source.shape, chunks, index)
        data = np.empty(source.dtype.nbytes(count), np.uint8)
        source.read_into(source.dtype.nbytes(start), data)
        digest = hash_bytes(data.data)
        yield digest, Found(digest, Kind.BLOCK, data.data, source.dtype.plane_bytes)


def _pieces(file: OpenFile, piece_bytes: int) -> Iterator[Found]:
    size = file.stamp[0]
    for start in range(0, size, piece_bytes):
        data = np.empty(min(piece_bytes, size - start), np.uint8)
        file.read_into(start, data)
        yield _piece(data.data)


def _piece(data: memoryview) -> Found:
    return Found(hash_bytes(data), Kind.FILE, data)


def _nbytes(source: TensorSource) -> int:
    return source.dtype.nbytes(int(np.prod(source.shape, dtype=np.int64)) if source.shape else 1)
