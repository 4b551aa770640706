"""Export: whole or not at all, never over something else, in any layout and type that was asked for."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergepipe.store import Store, filesystem
from mergepipe.store import export as export_module
from mergepipe.store.errors import ConflictError, DamagedError, EnvironmentalError, UsageError
from support.checkpoints import HeaderStyle, folder_bytes, random_tensor, raw, write_checkpoint, write_safetensors
from support.family import base_weights, write_model
from support.stores import flip_bit, object_path

WEIGHTS = base_weights()
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(store: Store, tmp_path: Path) -> Path:
    """A checkpoint that was ingested as ``m``."""
    path = write_model(tmp_path / "m", WEIGHTS)
    store.ingest([path])
    return path


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder through the safetensors library, by its index where it has one."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = load_file(path)
        assert not set(held) & set(tensors)
        tensors.update(held)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        where = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
        assert index["weight_map"] == where
        total = sum(tensor.nbytes for tensor in tensors.values())
        assert index["metadata"]["total_size"] == total
    return tensors


def as_torch(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(weight.view(np.int16).copy()).view(torch.bfloat16) for name, weight in weights.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""

    def content(tensor: torch.Tensor) -> tuple[object, ...]:
        flat = tensor.contiguous().reshape(-1)
        return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""

    return {name: content(tensor) for name, tensor in one.items()} == {
        name: content(tensor) for name, tensor in other.items()
    }


def neighbours(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestAsItCame:
    def test_it_loads_in_the_formats_own_library(self, store: Store, model: Path, tmp_path: Path) -> None:
        result = store.snapshot("m").export(tmp_path / "out")
        assert same(load(tmp_path / "out"), as_torch(WEIGHTS))
        assert (result.directory, result.files, result.identical) == (tmp_path / "out", 3, True)
        assert result.written_bytes == sum(map(len, folder_bytes(model).values()))

    @pytest.mark.parametrize("workers", [1, 5])
    def test_progress_goes_up_to_the_whole(self, store: Store, model: Path, tmp_path: Path, workers: int) -> None:
        seen: list[tuple[str, int, int]] = []
        store.snapshot("m").export(tmp_path / "out", workers=workers, progress=lambda *step: seen.append(step))
        assert {(stage, total) for stage, _, total in seen} == {
            ("export", (model / "model.safetensors").stat().st_size)
        }
        assert max(done for _, done, _ in seen) == sum(weight.nbytes for weight in WEIGHTS.values())

    def test_a_relative_folder_is_below_the_working_directory(
        self, store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        store.snapshot("m").export("../out/deeper")
        assert folder_bytes(tmp_path / "out" / "deeper") == folder_bytes(model)

    def test_files_that_are_added(self, store: Store, model: Path, tmp_path: Path) -> None:
        extra = {"README.md": b"made", "config.json": b"never over what is there"}
        store.snapshot("m").export(tmp_path / "out", extra_files=extra)
        assert folder_bytes(tmp_path / "out") == {**folder_bytes(model), "README.md": b"made"}

    def test_files_that_are_left_out(self, store: Store, model: Path, tmp_path: Path) -> None:
        """Weights are not among them; and what is left out makes room for what is added."""
        names = ["config.json", "tokenizer.json", "model.safetensors", "nothing"]
        result = store.snapshot("m").export(tmp_path / "out", leave_out=names, extra_files={"config.json": b"new"})
        weights = (model / "model.safetensors").read_bytes()
        assert folder_bytes(tmp_path / "out") == {"model.safetensors": weights, "config.json": b"new"}
        assert (result.files, result.written_bytes) == (2, len(weights) + 3)


class TestOtherLayouts:
    @pytest.mark.parametrize("limit", [1, 8192, 40_000, 10**9])
    def test_shards_of_at_most_so_many_bytes(self, store: Store, model: Path, tmp_path: Path, limit: int) -> None:
        result = store.snapshot("m").export(tmp_path / "out", max_shard_bytes=limit)
        assert not result.identical
        assert same(load(tmp_path / "out"), as_torch(WEIGHTS))
        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        assert (tmp_path / "out" / INDEX).exists() is (len(shards) > 1)
        largest = max(weight.nbytes for weight in WEIGHTS.values())
        for shard in shards:
            assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= max(limit, largest)
        if len(shards) == 1:
            assert [shard.name for shard in shards] == ["model.safetensors"]
        else:
            names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
            assert [shard.name for shard in shards] == names
        assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()

    def test_shards_become_one_file_without_an_index(self, store: Store, tmp_path: Path) -> None:
        store.ingest([write_model(tmp_path / "m", WEIGHTS, shards=3)])
        store.snapshot("m").export(tmp_path / "out", max_shard_bytes=10**9)
        assert same(load(tmp_path / "out"), as_torch(WEIGHTS))
        assert neighbours(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json"]

    def test_shards_become_other_shards(self, store: Store, tmp_path: Path) -> None:
        store.ingest([write_model(tmp_path / "m", WEIGHTS, shards=3)])
        store.snapshot("m").export(tmp_path / "out", max_shard_bytes=30_000)
        assert same(load(tmp_path / "out"), as_torch(WEIGHTS))

    def test_a_layout_that_is_there_already_is_kept(self, store: Store, model: Path, tmp_path: Path) -> None:
        assert model.exists()
        store.snapshot("m").export(tmp_path / "first", max_shard_bytes=30_000)
        spaced = json.dumps(json.loads((tmp_path / "first" / INDEX).read_text()), indent=8)
        (tmp_path / "first" / INDEX).write_text(spaced)
        store.ingest([tmp_path / "first"])
        store.snapshot("first").export(tmp_path / "second", max_shard_bytes=30_000)
        assert folder_bytes(tmp_path / "second") == folder_bytes(tmp_path / "first")

    def test_metadata_goes_along(self, store: Store, tmp_path: Path) -> None:
        held = {"w": random_tensor("F32", (10,))}
        for name, style in {"own": HeaderStyle(metadata={"format": "mlx", "é": "ü"}), "none": HeaderStyle()}.items():
            store.ingest([write_checkpoint(tmp_path / name, held, style=style)])
            store.snapshot(name).export(tmp_path / "out" / name, max_shard_bytes=10**9)
        found = {}
        for name in ("own", "none"):
            data = (tmp_path / "out" / name / "model.safetensors").read_bytes()
            found[name] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        assert found == {"own": {"format": "mlx", "é": "ü"}, "none": {"format": "pt"}}

    def test_what_came_from_pytorch_goes_out_as_safetensors(self, store: Store, tmp_path: Path) -> None:
        folder = tmp_path / "m"
        folder.mkdir()
        state = {f"w{i}": torch.randn(40, 30) for i in range(4)}
        for number in (1, 2):
            held = dict(list(state.items())[number - 1 :: 2])
            torch.save(held, folder / f"pytorch_model-0000{number}-of-00002.bin")
        where = {f"w{i}": f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i in range(4)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        (folder / "config.json").write_text("{}")
        store.ingest([folder])
        store.snapshot("m").export(tmp_path / "out")
        assert neighbours(tmp_path / "out") == ["config.json", "model.safetensors"]
        assert same(load(tmp_path / "out"), state)

    def test_an_adapter_keeps_its_name(self, store: Store, tmp_path: Path) -> None:
        folder = tmp_path / "m"
        write_safetensors(folder / "adapter_model.safetensors", {"lora": random_tensor("F32", (10,))})
        (folder / "adapter_config.json").write_text("{}")
        store.ingest([folder])
        store.snapshot("m").export(tmp_path / "out", dtype="bf16")
        assert neighbours(tmp_path / "out") == ["adapter_config.json", "adapter_model.safetensors"]


class TestOtherTypes:
    @pytest.mark.parametrize(("name", "kind"), [("BF16", torch.bfloat16), ("float16", torch.float16)])
    def test_float32_is_rounded_as_torch_does(self, store: Store, tmp_path: Path, name: str, kind: torch.dtype) -> None:
        generator = np.random.default_rng(0)
        state = {
            "normal": generator.standard_normal((100, 70)).astype(np.float32),
            "wide": (generator.standard_normal(5000) * 10.0 ** generator.integers(-44, 38, 5000)).astype(np.float32),
            "ties": (np.arange(5000, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32),
            "special": np.array([0, -0.0, np.inf, -np.inf, 1e-45, 3.4e38], np.float32),
            "scalar": np.array(1.00390625, np.float32),
            "empty": np.empty((0, 3), np.float32),
        }
        store.ingest([write_checkpoint(tmp_path / "m", {key: raw(value) for key, value in state.items()})])
        store.snapshot("m").export(tmp_path / "out", dtype=name)
        expected = {key: torch.tensor(value).to(kind) for key, value in state.items()}
        assert same(load(tmp_path / "out"), expected)

    def test_only_floats_are_converted(self, store: Store, tmp_path: Path) -> None:
        held = {name: random_tensor(name, (8, 3)) for name in ("I64", "BOOL", "F8_E4M3", "U8", "F4", "C64")}
        normal = raw(np.linspace(-1, 1, 3000, dtype=np.float16))
        store.ingest([write_checkpoint(tmp_path / "m", {**held, "half": normal})])
        store.snapshot("m").export(tmp_path / "out", dtype="F32")
        store.ingest([tmp_path / "out"], ref="out")
        snapshot = store.snapshot("out")
        for name, tensor in held.items():
            assert snapshot.read_tensor(name).tobytes() == tensor.data
        entry = snapshot.entry("half")
        assert entry.dtype == "F32"
        found = snapshot.read_tensor("half").view(np.float32)
        assert np.array_equal(found, np.frombuffer(normal.data, np.float16).astype(np.float32))

    def test_blocks_of_many_sizes_land_where_they_should(self, store: Store, tmp_path: Path) -> None:
        held = {name: raw(np.arange(size, dtype=np.float64)) for name, size in {"a": 5000, "b": 1, "c": 9999}.items()}
        store.ingest([write_checkpoint(tmp_path / "m", held)])
        for name in ("F32", "F64"):
            store.snapshot("m").export(tmp_path / name, dtype=name)
            for key, tensor in load(tmp_path / name).items():
                assert torch.equal(tensor.double(), torch.arange(len(held[key].data) // 8).double())

    @pytest.mark.usefixtures("model")
    def test_an_unknown_type_writes_nothing(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="bfloat61"):
            store.snapshot("m").export(tmp_path / "out", dtype="bfloat61")
        assert not (tmp_path / "out").exists()

    @pytest.mark.usefixtures("model")
    @pytest.mark.parametrize("limit", [0, -1])
    def test_nor_do_shards_of_nothing(self, store: Store, tmp_path: Path, limit: int) -> None:
        with pytest.raises(UsageError, match="at least 1 byte"):
            store.snapshot("m").export(tmp_path / "out", max_shard_bytes=limit)
        assert not (tmp_path / "out").exists()


class TestWholeOrNotAtAll:
    @pytest.mark.usefixtures("model")
    def test_nothing_that_is_there_is_replaced(self, store: Store, tmp_path: Path) -> None:
        for name in ("full", "empty", "file"):
            path = tmp_path / name
            path.write_bytes(b"precious") if name == "file" else path.mkdir()
            if name == "full":
                (path / "precious").write_bytes(b"x")
            with pytest.raises(ConflictError, match="exists already") as caught:
                store.snapshot("m").export(path)
            assert "--force" in (caught.value.hint or "")
        assert (tmp_path / "full" / "precious").read_bytes() == b"x"
        assert (tmp_path / "file").read_bytes() == b"precious"
        assert list((tmp_path / "empty").iterdir()) == []

    @pytest.mark.parametrize("kind", ["folder", "file", "link"])
    def test_unless_it_is_asked_for(self, store: Store, model: Path, tmp_path: Path, kind: str) -> None:
        top = tmp_path / "top"
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "kept").write_bytes(b"x")
        top.mkdir()
        target = top / "out"
        if kind == "file":
            target.write_bytes(b"old")
        elif kind == "link":
            target.symlink_to(tmp_path / "elsewhere")
        else:
            target.mkdir()
            (target / "old").write_bytes(b"old")
        store.snapshot("m").export(target, force=True)
        assert folder_bytes(target) == folder_bytes(model)
        assert neighbours(top) == ["out"]
        assert (tmp_path / "elsewhere" / "kept").read_bytes() == b"x"

    def test_the_store_itself_is_never_replaced(self, store: Store, model: Path, tmp_path: Path) -> None:
        for path in (store.layout.root, store.layout.root.parent, tmp_path / "link"):
            if path.name == "link":
                path.symlink_to(tmp_path)
            with pytest.raises(ConflictError, match="is not replaced"):
                store.snapshot("m").export(path, force=True)
        assert model.is_dir()

    @pytest.mark.parametrize("force", [False, True])
    def test_a_damaged_block_in_the_middle(self, make_store: Callable[..., Store], tmp_path: Path, force: bool) -> None:
        store = make_store(damaged=True)
        store.ingest([write_model(tmp_path / "m", WEIGHTS)])
        block = store.snapshot("m").entry("model.layers.1.mlp.up_proj.weight").blocks[2]
        flip_bit(object_path(store, block), 500)
        top = tmp_path / "top"
        top.mkdir()
        if force:
            (top / "out").mkdir()
            (top / "out" / "old").write_bytes(b"old")
        with pytest.raises(DamagedError, match=block.short):
            store.snapshot("m").export(top / "out", force=force)
        assert neighbours(top) == (["out"] if force else [])
        if force:
            assert folder_bytes(top / "out") == {"old": b"old"}

    def test_a_damaged_file_or_header(self, make_store: Callable[..., Store], tmp_path: Path) -> None:
        store = make_store(damaged=True)
        store.ingest([write_model(tmp_path / "m", WEIGHTS)])
        snapshot = store.snapshot("m")
        for entry in (snapshot.files["tokenizer.json"], snapshot.shards[0].header):
            path = object_path(store, entry.blocks[0])
            content = path.read_bytes()
            flip_bit(path, len(content) - 1)
            (tmp_path / "top").mkdir(exist_ok=True)
            with pytest.raises(DamagedError, match=entry.blocks[0].short):
                store.snapshot("m").export(tmp_path / "top" / "out")
            assert neighbours(tmp_path / "top") == []
            path.unlink()
            path.write_bytes(content)

    @pytest.mark.usefixtures("model")
    def test_an_interrupt(self, store: Store, tmp_path: Path) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        (tmp_path / "top").mkdir()
        with pytest.raises(KeyboardInterrupt):
            store.snapshot("m").export(tmp_path / "top" / "out", progress=interrupt)
        assert neighbours(tmp_path / "top") == []

    @pytest.mark.usefixtures("model")
    def test_a_rename_that_fails_puts_the_old_folder_back(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "top" / "out"
        target.mkdir(parents=True)
        (target / "old").write_bytes(b"old")
        original = Path.rename

        def fail(self: Path, other: Path) -> Path:
            if self.name.endswith(".part"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(self, other)

        monkeypatch.setattr(Path, "rename", fail)
        monkeypatch.setattr(filesystem, "_libc", lambda: None)  # a system that cannot exchange two names in one step
        with pytest.raises(EnvironmentalError):
            store.snapshot("m").export(target, force=True)
        assert folder_bytes(target) == {"old": b"old"}
        assert neighbours(tmp_path / "top") == ["out"]

    @pytest.mark.parametrize("inside", ["objects", "objects/zz", "catalog", "exported", "."])
    @pytest.mark.parametrize("force", [False, True])
    def test_nothing_is_put_into_the_store(self, store: Store, model: Path, inside: str, force: bool) -> None:
        store.ingest([model], ref="m")
        with pytest.raises(ConflictError, match="is in the store, and is not replaced"):
            store.snapshot("m").export(store.layout.root / inside, force=force)

    def test_a_catalog_elsewhere_is_not_replaced(
        self, make_store: Callable[..., Store], model: Path, tmp_path: Path
    ) -> None:
        store = make_store(tmp_path / "s", catalog=tmp_path / "local" / "catalog")
        store.ingest([model], ref="m")
        for target in (tmp_path / "local", tmp_path / "local" / "catalog"):
            with pytest.raises(ConflictError, match="is not replaced"):
                store.snapshot("m").export(target, force=True)

    def test_without_one_flush_for_all_each_file_is_flushed(
        self, store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed: list[str] = []
        original = os.fsync

        def note(descriptor: int) -> None:
            flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            original(descriptor)

        monkeypatch.setattr(export_module, "flush_filesystem", lambda _: False)
        monkeypatch.setattr(os, "fsync", note)
        store.snapshot("m").export(tmp_path / "out")
        assert set(folder_bytes(model)) <= set(flushed)
        assert folder_bytes(tmp_path / "out") == folder_bytes(model)

    def test_files_in_folders_too(self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_model(tmp_path / "nested", WEIGHTS)
        (path / "folder").mkdir()
        (path / "folder" / "notes.txt").write_text("inside")
        store.ingest([path])
        monkeypatch.setattr(export_module, "flush_filesystem", lambda _: False)
        store.snapshot("nested").export(tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == folder_bytes(path)

    @pytest.mark.usefixtures("model")
    def test_no_file_stays_open(self, store: Store, tmp_path: Path) -> None:
        def descriptors() -> int:
            return sum(1 for _ in Path("/proc/self/fd").iterdir())

        store.snapshot("m").export(tmp_path / "warm")
        before = descriptors()
        store.snapshot("m").export(tmp_path / "out", max_shard_bytes=8192)
        assert descriptors() == before


def test_a_folder_on_another_filesystem(store: Store, model: Path, mounted_disk: Callable[..., Path]) -> None:
    """The folder is built beside its destination, wherever the store is."""
    disk = mounted_disk("4m")
    store.snapshot("m").export(disk / "out")
    assert folder_bytes(disk / "out") == folder_bytes(model)
    assert subprocess.run(["stat", "-f", "-c", "%T", str(disk)], capture_output=True, text=True, check=True).stdout
