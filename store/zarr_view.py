"""A commit as a read-only zarr v3 group, for people and for other tools.

    group = snapshot.to_zarr()
    group["model.embed_tokens.weight"][:10]  # reads and verifies the blocks that hold those rows, no others

The bulk paths of MergePipe do not come through here: zarr spends most of a millisecond on each chunk.
:mod:`mergepipe.store.zarr_hierarchy` says what the keys and values are; this module serves them to zarr.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

import mergepipe.store.zarr_dtypes  # noqa: F401  # registers bfloat16 and the 8-bit floats
from mergepipe.store.commits import decode_commit
from mergepipe.store.digest import Digest
from mergepipe.store.frame import Kind
from mergepipe.store.layout import read_layout
from mergepipe.store.objects import ObjectReader
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.zarr_hierarchy import Hierarchy

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


def open_group(snapshot: Snapshot) -> zarr.Group:
    """The commit as a zarr group: one array for each tensor, under its :func:`~.zarr_hierarchy.node_name`."""
    return zarr.open_group(SnapshotStore(snapshot), mode="r", zarr_format=3)


class KeyedSource(Protocol):
    """Keys and values, read-only. Blocking; called from several threads at once."""

    def keys(self, prefix: str = "") -> Iterator[str]: ...

    def size(self, key: str) -> int | None: ...

    def read(self, key: str) -> memoryview | bytes | None: ...


class SnapshotStore(Store):
    """A zarr store over one commit. Every write raises ValueError, as in any read-only store of zarr.

    Equal where the store's directory and the commit are. Pickles to those two, and needs no catalog when it
    is loaded: a worker elsewhere reads objects, nothing else.
    """

    supports_writes: bool = False
    supports_deletes: bool = False
    supports_listing: bool = True

    def __init__(self, snapshot: Snapshot, *, read_only: bool = True) -> None:
        if not read_only:
            raise ValueError("a commit does not change, so its zarr store is read-only")
        super().__init__(read_only=True)
        self.snapshot = snapshot
        self._root = snapshot.reader.layout.root.absolute()
        self._source: KeyedSource | None = None

    def present(self) -> KeyedSource:
        """The keys and values, from the manifest tree (which is read now)."""
        return Hierarchy(self.snapshot)

    @property
    def _identity(self) -> tuple[Path, Digest]:
        return self._root, self.snapshot.commit_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._identity == other._identity

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (type(self), *self._identity)

    def __str__(self) -> str:
        root, commit = self._identity
        return f"mergepipe://{root}@{commit.short}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self}')"

    def with_read_only(self, read_only: bool = False) -> Store:
        """Another one like this; raises NotImplementedError for one to write to."""
        return type(self)(self.snapshot) if read_only else super().with_read_only(read_only)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """A value or a part of it, None where there is no such key; raises DamagedError for a bad block."""
        await self._ensure_open()
        return await asyncio.to_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """The blocking form of :meth:`get`."""
        value = self._opened().read(key)
        if value is None:
            return None
        start, stop = _byte_span(byte_range, len(value))
        return (prototype or default_buffer_prototype()).buffer.from_bytes(value[start:stop])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._size, key) is not None

    async def getsize(self, key: str) -> int:
        size = await asyncio.to_thread(self._size, key)
        if size is None:
            raise FileNotFoundError(key)
        return size

    async def getsize_prefix(self, prefix: str) -> int:
        source = await asyncio.to_thread(self._opened)
        return sum(source.size(key) or 0 for key in source.keys(prefix))

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        source = await asyncio.to_thread(self._opened)
        for key in source.keys(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        source = await asyncio.to_thread(self._opened)
        folder = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        children = dict.fromkeys(key[len(folder) :].split("/", 1)[0] for key in source.keys(folder))
        for child in children:
            yield child

    def _opened(self) -> KeyedSource:
        if self._source is None:
            self._source = self.present()
        return self._source

    def _size(self, key: str) -> int | None:
        return self._opened().size(key)

    # Writing is refused, by the base class's own message.

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002
        self._check_writable()

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:  # noqa: ARG002
        self._check_writable()

    async def delete(self, key: str) -> None:  # noqa: ARG002
        self._check_writable()

    async def delete_dir(self, prefix: str) -> None:  # noqa: ARG002
        self._check_writable()

    async def clear(self) -> None:
        self._check_writable()


def _byte_span(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    """``(start, stop)`` of a request within ``size`` bytes; raises ValueError for what is no request."""
    match byte_range:
        case None:
            return 0, size
        case RangeByteRequest(start, end):
            return start, min(end, size)
        case OffsetByteRequest(offset):
            return offset, size
        case SuffixByteRequest(suffix):
            return max(size - suffix, 0), size
        case _:
            raise ValueError(f"Unexpected byte_range, got {byte_range}.")


def _reopen(cls: type[SnapshotStore], root: Path, commit_id: Digest) -> SnapshotStore:
    reader = ObjectReader(read_layout(root))
    commit = decode_commit(reader.read_record(Kind.COMMIT, commit_id), f"commit {commit_id.short}")
    return cls(Snapshot(reader, commit_id, commit))
