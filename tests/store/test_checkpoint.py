"""What counts as a checkpoint: which files hold its weights, what else lies there, and what is not to be trusted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mergepipe.store import checkpoint as checkpoint_module
from mergepipe.store.checkpoint import OpenFile, is_safe_path, open_checkpoint
from mergepipe.store.errors import BadInputError, NotFoundError
from mergepipe.store.folder import walk_folder
from support.checkpoints import HeaderStyle, random_tensor, write_checkpoint, write_safetensors

TENSORS = {f"layers.{i}.weight": random_tensor("BF16", (4, 4), i) for i in range(5)}
INDEX = "model.safetensors.index.json"


def refused(path: Path) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        open_checkpoint(path)
    return caught.value


def edit_index(folder: Path, **moved: str | None) -> None:
    """Change where the index says that tensors lie; ``a__b`` stands for ``a.b``, None takes one out."""
    path = folder / INDEX
    value = json.loads(path.read_text())
    for name, shard in moved.items():
        tensor = name.replace("__", ".")
        value["weight_map"].pop(tensor, None)
        if shard is not None:
            value["weight_map"][tensor] = shard
    path.write_text(json.dumps(value))


class TestWhereTheWeightsAre:
    def test_one_file(self, tmp_path: Path) -> None:
        path = write_safetensors(tmp_path / "any name.safetensors", TENSORS)
        with open_checkpoint(path) as checkpoint:
            assert set(checkpoint.tensors) == set(TENSORS)
            assert [shard.path for shard in checkpoint.shards] == ["any name.safetensors"]
            assert checkpoint.files == {}

    def test_a_folder_with_all_its_other_files(self, tmp_path: Path) -> None:
        files = {
            "config.json": b"{}",
            "sub/deeper/notes.txt": b"",
            ".hidden": b"x",
            "pytorch_model.bin": b"old weights",
        }
        folder = write_checkpoint(tmp_path / "m", TENSORS, files=files)
        with open_checkpoint(folder) as checkpoint:
            assert set(checkpoint.files) == set(files)
            assert set(checkpoint.tensors) == set(TENSORS)

    @pytest.mark.parametrize("index", [True, False])
    def test_shards(self, tmp_path: Path, index: bool) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS, shards=3, index=index)
        with open_checkpoint(folder) as checkpoint:
            assert set(checkpoint.tensors) == set(TENSORS)
            assert [shard.path for shard in checkpoint.shards] == [
                f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
            ]
            assert (INDEX in checkpoint.files) is index

    def test_an_index_comes_before_a_single_file(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
        write_safetensors(folder / "model.safetensors", {"other": random_tensor("U8", (3,))})
        with open_checkpoint(folder) as checkpoint:
            assert set(checkpoint.tensors) == set(TENSORS)
            assert "model.safetensors" in checkpoint.files

    def test_an_adapter(self, tmp_path: Path) -> None:
        folder = tmp_path / "m"
        write_safetensors(folder / "adapter_model.safetensors", TENSORS)
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/Base-1B"}')
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.is_adapter
            assert checkpoint.base_hint() == "org/Base-1B"
            assert set(checkpoint.tensors) == set(TENSORS)

    @pytest.mark.parametrize(
        ("config", "hint"),
        [
            ('{"_name_or_path": "a/b"}', "a/b"),
            ('{"base_model": "c", "_name_or_path": "a/b"}', "c"),
            ('{"_name_or_path": 3}', ""),
            ("[]", ""),
            ("not json", ""),
            ('{"_name_or_path": "\\ud800"}', ""),
        ],
    )
    def test_the_base_that_a_configuration_names(self, tmp_path: Path, config: str, hint: str) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS, files={"config.json": config.encode()})
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.base_hint() == hint

    def test_folders_of_tools_are_left_out(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS)
        for name in (".git", ".mp", "__pycache__"):
            (folder / name).mkdir()
            (folder / name / "file").write_bytes(b"x")
        with open_checkpoint(folder) as checkpoint:
            assert set(checkpoint.files) == {"config.json"}


class TestWhatIsWrong:
    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "Qwen3-0.6B").mkdir()
        with pytest.raises(NotFoundError, match="Qwen3-06B") as caught:
            open_checkpoint(tmp_path / "Qwen3-06B")
        assert "Qwen3-0.6B" in (caught.value.hint or "")

    def test_a_folder_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert "has no weights" in refused(tmp_path).message

    def test_another_kind_of_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        assert "neither a model's folder nor" in refused(tmp_path / "model.gguf").message

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "model.safetensors")
        assert "neither a file nor a folder" in refused(tmp_path / "model.safetensors").message
        assert "neither a file nor a folder" in refused(tmp_path).message

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            open_checkpoint(tmp_path / "nowhere" / "m")
        with pytest.raises(BadInputError, match="cannot be read"):
            walk_folder(tmp_path / "nowhere")

    def test_a_file_that_goes_and_one_that_the_system_does_not_read(self, tmp_path: Path) -> None:
        with pytest.raises(BadInputError, match="cannot be opened"):
            OpenFile(tmp_path / "gone")
        folder = OpenFile(tmp_path)
        with pytest.raises(BadInputError, match="cannot be read"):
            folder.read_into(0, np.empty(1, np.uint8))
        folder.close()

    def test_an_index_of_pytorch_files_that_disagrees_with_them(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model-00001-of-00001.bin")
        index = {"weight_map": dict.fromkeys(("a", "b"), "pytorch_model-00001-of-00001.bin")}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert "disagrees with shard pytorch_model-00001-of-00001.bin about tensor 'b'" in refused(tmp_path).message

    def test_a_shard_that_the_index_names_is_missing(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS, shards=3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        message = refused(folder).message
        assert INDEX in message
        assert "model-00002-of-00003.safetensors is missing" in message
        assert "layers.1.weight" in message

    def test_a_shard_that_its_neighbours_count_is_missing(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS, shards=3, index=False)
        (folder / "model-00003-of-00003.safetensors").unlink()
        assert "shard model-00003-of-00003.safetensors is missing" in refused(folder).message

    @pytest.mark.parametrize(
        ("moved", "tensor"),
        [
            ({"layers__1__weight": None}, "layers.1.weight"),
            ({"layers__9__weight": "model-00001-of-00002.safetensors"}, "layers.9.weight"),
            ({"layers__0__weight": "model-00002-of-00002.safetensors"}, "layers.0.weight"),
        ],
    )
    def test_an_index_that_disagrees_with_a_shard(
        self, tmp_path: Path, moved: dict[str, str | None], tensor: str
    ) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
        edit_index(folder, **moved)
        message = refused(folder).message
        assert INDEX in message
        assert f"'{tensor}'" in message
        assert "disagrees with shard" in message

    @pytest.mark.parametrize("name", ["../m2/x.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "..", "", ".", "./x"])
    def test_an_index_that_leads_out_of_the_folder(self, tmp_path: Path, name: str) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
        write_safetensors(tmp_path / "m2" / "x.safetensors", TENSORS)
        edit_index(folder, layers__0__weight=name)
        assert "outside of the folder" in refused(folder).message

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
    )
    def test_an_index_that_is_none(self, tmp_path: Path, text: str) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS)
        (folder / INDEX).write_text(text)
        assert INDEX in refused(folder).message

    def test_a_tensor_in_two_files(self, tmp_path: Path) -> None:
        for name in ("a.safetensors", "b.safetensors"):
            write_safetensors(tmp_path / name, {"w": random_tensor("U8", (3,))})
        message = refused(tmp_path).message
        assert "'w'" in message
        assert "a.safetensors" in message
        assert "b.safetensors" in message

    def test_a_lying_header_names_its_file(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS, shards=2)
        shard = folder / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        assert "model-00002-of-00002.safetensors" in refused(folder).message

    def test_names_that_are_no_text(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS)
        strange = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt"))
        try:
            strange.write_bytes(b"x")
        except OSError:
            pytest.skip("the filesystem takes no such names")
        assert "is not UTF-8" in refused(folder).message
        lone = write_safetensors(strange.with_suffix(".safetensors"), TENSORS)
        assert "is not UTF-8" in refused(lone).message

    def test_a_file_that_is_exchanged_after_its_header_was_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its tensors would be taken from the places that another header names."""
        folder = write_checkpoint(tmp_path / "m", TENSORS)
        other = write_safetensors(tmp_path / "other", dict(reversed(TENSORS.items())), HeaderStyle({"format": "pt"}))
        original = checkpoint_module.read_header

        def read_then_exchange(path: Path) -> object:
            header = original(path)
            other.replace(path)
            return header

        assert other.stat().st_size == (folder / "model.safetensors").stat().st_size
        monkeypatch.setattr(checkpoint_module, "read_header", read_then_exchange)
        assert "changed while it was being read" in refused(folder).message


class TestLinks:
    def test_inside_of_the_folder_they_are_files(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS)
        (folder / "real.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to("real.safetensors")
        with open_checkpoint(folder) as checkpoint:
            assert set(checkpoint.tensors) == set(TENSORS)

    @pytest.mark.parametrize("name", ["model.safetensors", "secrets.txt", "sub/secrets.txt"])
    def test_out_of_the_folder_they_are_refused(self, tmp_path: Path, name: str) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS)
        outside = write_safetensors(tmp_path / "outside.safetensors", TENSORS)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
        error = refused(folder)
        assert name in error.message
        assert "leads out of the folder" in error.message
        assert error.hint

    def test_folders_and_broken_links_are_refused(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", TENSORS)
        (folder / "loop").symlink_to(folder)
        assert "loop" in refused(folder).message
        (folder / "loop").unlink()
        (folder / "gone").symlink_to("nowhere")
        assert "gone" in refused(folder).message

    def test_the_hub_caches_snapshots_link_into_its_blobs(self, tmp_path: Path) -> None:
        cache = tmp_path / "models--org--name"
        snapshot = cache / "snapshots" / "abc123"
        (cache / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        write_safetensors(cache / "blobs" / "0123", TENSORS, HeaderStyle(padding="  "))
        (cache / "blobs" / "4567").write_text("{}")
        (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
        (snapshot / "config.json").symlink_to("../../blobs/4567")
        with open_checkpoint(snapshot) as checkpoint:
            assert set(checkpoint.tensors) == set(TENSORS)
            assert set(checkpoint.files) == {"config.json"}
        (tmp_path / "secret").write_text("x")
        (snapshot / "more").symlink_to(tmp_path / "secret")
        assert "leads out of the folder" in refused(snapshot).message

    def test_a_link_to_a_checkpoint_is_the_checkpoint(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "real", TENSORS)
        (tmp_path / "link").symlink_to("real")
        with open_checkpoint(tmp_path / "link") as checkpoint:
            assert set(checkpoint.tensors) == set(TENSORS)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("model.safetensors", True),
        ("a/b/c", True),
        ("...", True),
        ("a..b", True),
        ("", False),
        ("/a", False),
        ("..", False),
        (".", False),
        ("a/../b", False),
        ("./a", False),
        ("a//b", False),
        ("a/", False),
        ("a\\b", False),
        ("C:a", False),
        ("a\0b", False),
    ],
)
def test_paths_that_stay_in_their_folder(name: str, safe: bool) -> None:
    assert is_safe_path(name) is safe


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_file_stays_open(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", TENSORS, shards=3)
    before = open_descriptors()
    with open_checkpoint(folder):
        assert open_descriptors() > before
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"short")
    refused(folder)
    assert open_descriptors() == before
