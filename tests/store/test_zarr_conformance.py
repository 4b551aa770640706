"""The zarr view under zarr's own suite for stores."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from zarr.abc.store import SupportsDeleteSync, SupportsSetSync
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.storage import WrapperStore
from zarr.testing.store import StoreTests

from mergepipe.store import Snapshot, Store
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.safetensors_file import build_header
from mergepipe.store.zarr_view import SnapshotStore

READ_ONLY = "store was opened in read-only mode and does not support writing"


class Files:
    """A commit's plain files as keys: so the suite's keys and values come from a real store, read and verified."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def keys(self, prefix: str = "") -> Iterator[str]:
        return (path for path in self.snapshot.files if path.startswith(prefix))

    def size(self, key: str) -> int | None:
        entry = self.snapshot.files.get(key)
        return None if entry is None else entry.size

    def read(self, key: str) -> bytes | None:
        return self.snapshot.read_file(key) if key in self.snapshot.files else None


class FilesStore(SnapshotStore):
    """SnapshotStore with all of its own code, over keys that a test may choose."""

    def present(self) -> Files:
        return Files(self.snapshot)


def place(view: SnapshotStore, values: Iterable[tuple[str, Buffer]]) -> None:
    """Put values under keys by ingesting them as files of the next commit."""
    checkpoint = view.snapshot.reader.layout.root.parent / "files"
    for key, value in values:
        (checkpoint / key).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / key).write_bytes(value.to_bytes())
    with Store.open(view.snapshot.reader.layout.root) as store:
        store.ingest([checkpoint])
        view.snapshot = store.snapshot("files")
    view._source = None


class Arranged(WrapperStore[FilesStore]):
    """For inherited tests that arrange their data by writing through the store: here that goes around it."""

    async def set(self, key: str, value: Buffer) -> None:
        place(self._store, [(key, value)])

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        place(self._store, values)


class TestSnapshotStore(StoreTests[FilesStore, cpu.Buffer]):
    """Inherited tests run as they are, but where one writes through the store; each of those says what it does."""

    store_cls = FilesStore
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def store_kwargs(self, tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "files").mkdir()
        header = build_header([("x", DTYPES["U8"], (1,))], {})
        (tmp_path / "files" / "model.safetensors").write_bytes(header.raw + b"\0")
        with Store.create(tmp_path / "store", block_bytes=4096) as store:
            store.ingest([tmp_path / "files"])
            return {"snapshot": store.snapshot("files")}

    async def set(self, store: FilesStore, key: str, value: Buffer) -> None:
        place(store, [(key, value)])

    async def get(self, store: FilesStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes(store.snapshot.read_file(key))

    def test_store_repr(self, store: FilesStore) -> None:
        assert repr(store).startswith("FilesStore('mergepipe:///")
        assert repr(store).endswith(f"/store@{store.snapshot.commit_id.short}')")

    def test_store_supports_writes(self, store: FilesStore) -> None:
        assert not store.supports_writes
        assert not store.supports_deletes

    def test_store_supports_listing(self, store: FilesStore) -> None:
        assert store.supports_listing

    def test_store_read_only(self, store: FilesStore) -> None:
        """Inherited: that it is writable."""
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False  # type: ignore[misc]

    @pytest.mark.parametrize("read_only", [True, False])
    async def test_store_open_read_only(self, open_kwargs: dict[str, Any], read_only: bool) -> None:
        """Inherited for True; there is no writable one to open."""
        if read_only:
            await super().test_store_open_read_only(open_kwargs, read_only)
        else:
            with pytest.raises(ValueError, match="a commit does not change"):
                await self.store_cls.open(**open_kwargs, read_only=False)

    async def test_serializable_store(self, store: FilesStore) -> None:
        """Inherited: writes to the copy. Here the copy reads what was there."""
        await self.set(store, "foo", self.buffer_cls.from_bytes(b"\x01\x02\x03\x04"))
        copy: FilesStore = pickle.loads(pickle.dumps(store))
        assert (copy, type(copy), copy.read_only) == (store, FilesStore, True)
        observed = await copy.get("foo", prototype=default_buffer_prototype())
        assert observed is not None
        assert observed.to_bytes() == b"\x01\x02\x03\x04"

    # These arrange their data by writing through the store, and test reading: the data comes by another way.

    async def test_exists(self, store: FilesStore) -> None:
        await super().test_exists(Arranged(store))  # type: ignore[arg-type]

    async def test_getsize_prefix(self, store: FilesStore) -> None:
        await super().test_getsize_prefix(Arranged(store))  # type: ignore[arg-type]

    async def test_list(self, store: FilesStore) -> None:
        await super().test_list(Arranged(store))  # type: ignore[arg-type]

    async def test_list_prefix(self, store: FilesStore) -> None:
        await super().test_list_prefix(Arranged(store))  # type: ignore[arg-type]

    async def test_list_empty_path(self, store: FilesStore) -> None:
        await super().test_list_empty_path(Arranged(store))  # type: ignore[arg-type]

    async def test_list_dir(self, store: FilesStore) -> None:
        await super().test_list_dir(Arranged(store))  # type: ignore[arg-type]

    # These test writing: it is refused, and nothing changes.

    async def refuses(self, store: FilesStore, method: str, *arguments: Any) -> None:
        await self.set(store, "foo/zarr.json", self.buffer_cls.from_bytes(b"bar"))
        with pytest.raises(ValueError, match=READ_ONLY):
            await getattr(store, method)(*arguments)
        assert [key async for key in store.list()] == ["foo/zarr.json"]
        assert (await self.get(store, "foo/zarr.json")).to_bytes() == b"bar"

    @pytest.mark.parametrize("key", ["zarr.json", "c/0", "foo/zarr.json"])
    @pytest.mark.parametrize("data", [b"\x01\x02\x03\x04", b""])
    async def test_set(self, store: FilesStore, key: str, data: bytes) -> None:
        """Inherited: that a value is written."""
        await self.refuses(store, "set", key, self.buffer_cls.from_bytes(data))

    async def test_set_not_open(self, store_not_open: FilesStore) -> None:
        """Inherited: that a value is written to a store that is not open yet."""
        assert not store_not_open._is_open
        await self.refuses(store_not_open, "set", "c/0", self.buffer_cls.from_bytes(b"\x01"))

    async def test_set_many(self, store: FilesStore) -> None:
        """Inherited: that several values are written."""
        await self.refuses(store, "_set_many", [("foo/zarr.json", self.buffer_cls.from_bytes(b"new"))])

    async def test_set_if_not_exists(self, store: FilesStore) -> None:
        """Inherited: that a value is written where there is none."""
        await self.refuses(store, "set_if_not_exists", "k", self.buffer_cls.from_bytes(b"new"))
        await self.refuses(store, "set_if_not_exists", "foo/zarr.json", self.buffer_cls.from_bytes(b"new"))

    async def test_delete(self, store: FilesStore) -> None:
        """Inherited: that a value is deleted; skipped there for stores that do not delete."""
        await self.refuses(store, "delete", "foo/zarr.json")

    async def test_delete_dir(self, store: FilesStore) -> None:
        """Inherited: that a folder is deleted; skipped there for stores that do not delete."""
        await self.refuses(store, "delete_dir", "foo")

    async def test_delete_nonexistent_key_does_not_raise(self, store: FilesStore) -> None:
        """Inherited: that nothing happens; here it raises as any other delete does."""
        await self.refuses(store, "delete", "nonexistent_key")

    async def test_clear(self, store: FilesStore) -> None:
        """Inherited: that everything is deleted."""
        await self.refuses(store, "clear")

    def test_set_sync(self, store: FilesStore) -> None:
        """Inherited: skipped where there is no blocking set."""
        assert not isinstance(store, SupportsSetSync)

    def test_delete_sync(self, store: FilesStore) -> None:
        """Inherited: skipped where there is no blocking delete."""
        assert not isinstance(store, SupportsDeleteSync)

    def test_delete_sync_missing(self, store: FilesStore) -> None:
        """Inherited: skipped where there is no blocking delete."""
        assert not isinstance(store, SupportsDeleteSync)
