"""The zarr view: real commits, read through zarr."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from mergepipe.store import Snapshot, Store
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import DamagedError, NotFoundError
from mergepipe.store.frame import Encoding
from mergepipe.store.objects import Role
from mergepipe.store.safetensors_file import build_header
from mergepipe.store.zarr_hierarchy import MAXIMUM_CONFIG_BYTES, METADATA_KEY, node_name
from mergepipe.store.zarr_view import SnapshotStore, open_group

# -- a commit with every element type, cut into blocks of 4 KiB -------------------------------------------------

TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("BF16", (100, 64)),  # 4 chunks of 32 rows; the last has 4
    "model.layers.0.experts.weight": ("BF16", (3, 40, 64)),  # (1, 32, 64): cut short in the middle, too
    "lm_head.weight": ("F32", (17, 100)),
    "scale": ("F32", ()),
    "empty": ("F16", (0, 4)),
    "vector": ("I8", (5000,)),
    "mask": ("BOOL", (7,)),
    "packed.even": ("F4", (128, 100)),
    "packed.ragged": ("F4", (3, 90, 100)),
    "packed.six": ("F6_E2M3", (128, 64)),
    "packed.empty": ("F4", (0, 8)),
    "odd/na%me": ("U16", (3000,)),
    "../__up": ("I64", (2, 2)),
    "zarr.json": ("F64", (3,)),
    **{f"every.{name}": (name, (70, 70)) for name, dtype in DTYPES.items() if dtype.zarr_name},
}
WHOLE = [name for name, (dtype, _) in TENSORS.items() if DTYPES[dtype].zarr_name]
PACKED = [name for name in TENSORS if name not in WHOLE]


def tensor_bytes(name: str) -> bytes:
    """Random bits: NaN payloads, -0 and denormals are in it."""
    dtype, shape = TENSORS[name]
    generator = np.random.default_rng(list(name.encode()))
    high = 2 if dtype == "BOOL" else 256
    return generator.integers(0, high, DTYPES[dtype].nbytes(math.prod(shape)), np.uint8).tobytes()


def write_checkpoint(folder: Path, config: Any = None, **changed: bytes) -> Path:
    """A folder with model.safetensors and config.json; ``changed`` replaces the bytes of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    header = build_header(((name, DTYPES[dtype], shape) for name, (dtype, shape) in TENSORS.items()), {})
    data = b"".join(changed.get(name) or tensor_bytes(name) for name in TENSORS)
    (folder / "model.safetensors").write_bytes(header.raw + data)
    (folder / "config.json").write_text(json.dumps(config if config is not None else {"model_type": "toy"}))
    return folder


def make_store(folder: Path) -> Store:
    """A store whose branch ``base`` is the checkpoint."""
    store = Store.create(folder / "store", block_bytes=4096)
    store.ingest([write_checkpoint(folder / "base")])
    return store


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    """For tests that only read."""
    with make_store(tmp_path_factory.mktemp("shared")) as store:
        yield store.snapshot("base")


@pytest.fixture(scope="module")
def group(snapshot: Snapshot) -> zarr.Group:
    return open_group(snapshot)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """For tests that change it."""
    with make_store(tmp_path) as opened:
        yield opened


def array_of(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[node_name(name)]
    assert isinstance(array, zarr.Array)
    return array


def native(dtype: str) -> np.dtype[Any]:
    name = DTYPES[dtype].zarr_name
    assert name is not None
    return np.dtype(getattr(ml_dtypes, name, None) or name)


class TestArrays:
    def test_there_is_one_for_each_tensor(self, group: zarr.Group, snapshot: Snapshot) -> None:
        assert {name for name, _ in group.arrays()} == {node_name(name) for name in TENSORS}
        assert group.read_only
        assert dict(group.attrs) == {"mergepipe": {"commit": snapshot.commit_id.hex(), "config": {"model_type": "toy"}}}

    @pytest.mark.parametrize("name", WHOLE)
    def test_it_equals_the_tensor_bit_for_bit(self, group: zarr.Group, name: str) -> None:
        dtype, shape = TENSORS[name]
        array = array_of(group, name)
        assert (array.shape, array.dtype) == (shape, native(dtype))
        assert array.attrs["mergepipe"] == {"name": name, "dtype": dtype}
        assert np.ascontiguousarray(array[...]).tobytes() == tensor_bytes(name)

    @pytest.mark.parametrize("name", PACKED)
    def test_packed_types_are_their_bytes(self, group: zarr.Group, name: str) -> None:
        dtype, shape = TENSORS[name]
        array = array_of(group, name)
        assert array.attrs["mergepipe"] == {"name": name, "dtype": dtype, "shape": list(shape)}
        assert array.dtype == np.uint8
        assert np.asarray(array[:]).tobytes() == tensor_bytes(name)

    def test_chunks_are_blocks(self, group: zarr.Group, snapshot: Snapshot) -> None:
        for name in [*WHOLE, "packed.even", "packed.six"]:
            assert array_of(group, name).nchunks == len(snapshot.tensors[name].blocks)
        assert array_of(group, "model.layers.0.experts.weight").chunks == (1, 32, 64)
        assert array_of(group, "packed.ragged").nchunks == 1

    def test_chunks_at_an_edge_are_filled_up_with_zeros(self, snapshot: Snapshot) -> None:
        name = "model.layers.0.experts.weight"
        value = SnapshotStore(snapshot).get_sync(f"{name}/c/1/1/0")
        assert value is not None
        start = (40 + 32) * 128
        assert value.to_bytes() == tensor_bytes(name)[start : start + 8 * 128] + bytes(24 * 128)

    def test_deltas_against_a_base_read_the_same(self, store: Store, tmp_path: Path) -> None:
        name = "lm_head.weight"
        changed = (np.frombuffer(tensor_bytes(name), "u4") ^ 1).tobytes()
        store.ingest([write_checkpoint(tmp_path / "expert", **{name: changed})], base="base")
        expert = store.snapshot("expert")
        assert {expert.reader.read_header(block).encoding for block in expert.tensors[name].blocks} == {Encoding.DELTA}
        assert np.asarray(array_of(expert.to_zarr(), name)[...]).tobytes() == changed

    def test_a_config_that_json_cannot_say_or_that_is_large_is_left_out(self, store: Store, tmp_path: Path) -> None:
        for name, config in {"nan": {"x": math.nan}, "large": {"x": "y" * MAXIMUM_CONFIG_BYTES}}.items():
            store.ingest([write_checkpoint(tmp_path / name, config)])
            snapshot = store.snapshot(name)
            assert dict(open_group(snapshot).attrs) == {"mergepipe": {"commit": snapshot.commit_id.hex()}}


class TestReading:
    def test_a_slice_reads_the_blocks_that_it_needs(self, snapshot: Snapshot) -> None:
        array = array_of(open_group(snapshot), "model.embed_tokens.weight")
        counters = snapshot.reader.counters
        before = counters.objects[Role.OTHER], counters.decoded[Role.OTHER]
        array[40:60]
        assert counters.objects[Role.OTHER] - before[0] == 1
        assert counters.decoded[Role.OTHER] - before[1] == 32 * 64 * 2

    def test_listing_and_sizes_read_no_block(self, snapshot: Snapshot) -> None:
        view = SnapshotStore(snapshot)
        sizes = asyncio.run(all_sizes(view))
        objects = snapshot.reader.counters.objects[Role.OTHER]
        assert asyncio.run(all_sizes(view)) == sizes
        assert asyncio.run(view.exists("scale/c"))
        assert snapshot.reader.counters.objects[Role.OTHER] == objects

    def test_threads_may_share_a_group(self, group: zarr.Group) -> None:
        def read(name: str) -> bool:
            return np.ascontiguousarray(array_of(group, name)[...]).tobytes() == tensor_bytes(name)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, WHOLE * 3))

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
    def test_damage_is_an_error_and_never_data(self, store: Store, damage: str) -> None:
        name, snapshot = "model.embed_tokens.weight", store.snapshot("base")
        path = Path(snapshot.reader.layout.object_path(snapshot.tensors[name].blocks[1]))
        data = bytearray(path.read_bytes())
        path.unlink()
        if damage == "flip":
            data[-1] ^= 1
        if damage != "remove":
            path.write_bytes(data[:-1] if damage == "cut" else data)
        array = array_of(open_group(snapshot), name)
        assert np.ascontiguousarray(array[:32]).tobytes() == tensor_bytes(name)[: 32 * 128]
        with pytest.raises(DamagedError):
            array[:]

    def test_writing_is_refused(self, group: zarr.Group) -> None:
        with pytest.raises(ValueError, match="read-only"):
            group.create_array("new", shape=(1,), dtype="u1")
        with pytest.raises(ValueError, match="read-only"):
            array_of(group, "vector")[:] = 0
        with pytest.raises(ValueError, match="read-only"):
            group.attrs["new"] = 1
        with pytest.raises(ValueError, match="read-only"):
            del group["vector"]


class TestPickling:
    def test_a_group_is_opened_elsewhere_without_the_catalog(self, store: Store) -> None:
        snapshot = store.snapshot("base")
        data = pickle.dumps(open_group(snapshot))
        assert len(pickle.dumps(SnapshotStore(snapshot))) < 1000
        store.close()
        shutil.rmtree(snapshot.reader.layout.catalog)
        there = pickle.loads(data)
        assert np.asarray(array_of(there, "vector")[:]).tobytes() == tensor_bytes("vector")

    @pytest.mark.usefixtures("store")
    def test_the_path_holds_in_another_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with Store.open("store") as relative:
            view = SnapshotStore(relative.snapshot("base"))
        monkeypatch.chdir(os.sep)
        copy = pickle.loads(pickle.dumps(view))
        assert copy == view
        assert copy.get_sync("scale/c") is not None

    def test_a_store_that_is_gone_is_said(self, store: Store, tmp_path: Path) -> None:
        data = pickle.dumps(SnapshotStore(store.snapshot("base")))
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        with pytest.raises(NotFoundError, match="there is no store in"):
            pickle.loads(data)

    def test_equal_is_the_same_commit_of_the_same_store(self, store: Store, snapshot: Snapshot, tmp_path: Path) -> None:
        store.ingest([write_checkpoint(tmp_path / "other", {"model_type": "other"})])
        base, other = store.snapshot("base"), store.snapshot("other")
        assert SnapshotStore(base) == SnapshotStore(base)
        assert SnapshotStore(base) != SnapshotStore(other)
        assert SnapshotStore(base) != SnapshotStore(snapshot)
        assert SnapshotStore(base) != "base"


# -- real keys, against zarr's own store in memory ---------------------------------------------------------------


async def all_sizes(view: ZarrStore) -> dict[str, int]:
    return {key: await view.getsize(key) async for key in view.list()}


async def copy_to_memory(view: SnapshotStore) -> MemoryStore:
    memory = MemoryStore()
    async for key in view.list():
        value = await view.get(key, default_buffer_prototype())
        assert value is not None
        await memory.set(key, value)
    return memory


async def test_it_answers_as_a_memory_store_with_the_same_values(snapshot: Snapshot) -> None:
    view = SnapshotStore(snapshot)
    memory = await copy_to_memory(view)
    assert await all_sizes(view) == await all_sizes(memory)
    keys = [key async for key in memory.list()]
    folders = {key[:end] for key in keys for end, sign in enumerate(key) if sign == "/"}
    for prefix in ["", "z", "every", "every.", "nothing", *folders, *(f"{folder}/" for folder in folders)]:
        for method in ("list_prefix", "list_dir"):
            ours = sorted([key async for key in getattr(view, method)(prefix)])
            assert ours == sorted([key async for key in getattr(memory, method)(prefix)]), (method, prefix)
        assert await view.is_empty(prefix) == await memory.is_empty(prefix)
        assert await view.getsize_prefix(prefix) == await memory.getsize_prefix(prefix)
        assert not await view.exists(prefix)


@pytest.mark.parametrize("key", [METADATA_KEY, "scale/c", "vector/zarr.json", "vector/c/1", "packed.ragged/c/0"])
async def test_parts_of_values_are_slices(snapshot: Snapshot, key: str) -> None:
    view, prototype = SnapshotStore(snapshot), default_buffer_prototype()
    whole = await view.get(key)
    assert whole is not None
    data = whole.to_bytes()
    requests: dict[ByteRequest, bytes] = {
        RangeByteRequest(1, 3): data[1:3],
        RangeByteRequest(2, 1 << 40): data[2:],
        OffsetByteRequest(3): data[3:],
        OffsetByteRequest(1 << 40): b"",
        SuffixByteRequest(2): data[-2:],
        SuffixByteRequest(1 << 40): data,
    }
    parts = await view.get_partial_values(prototype, [(key, request) for request in requests])
    assert [part.to_bytes() for part in parts if part is not None] == list(requests.values())


@pytest.mark.parametrize(
    "key", ["", "/", "c", "nothing", "vector", "vector/", "vector/c", "vector/c/2", "vector/c/01", "vector/c/0/0",
            "vector/zarr.json/", "scale/c/0", "empty/c/0/0", "/zarr.json", "zarr.json/x", "odd/na%me/zarr.json"]
)  # fmt: skip
async def test_what_is_no_key_is_none(snapshot: Snapshot, key: str) -> None:
    view = SnapshotStore(snapshot)
    assert await view.get(key) is None
    assert not await view.exists(key)
    with pytest.raises(FileNotFoundError):
        await view.getsize(key)
