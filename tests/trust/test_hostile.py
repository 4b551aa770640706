"""Hostile input made by hand: what random harm would not find. Each fails soon and clearly, and runs nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergepipe.store import Store
from mergepipe.store.checkpoint import open_checkpoint
from mergepipe.store.errors import BadInputError, ConflictError, EnvironmentalError, MergePipeError
from mergepipe.store.zarr_hierarchy import Hierarchy
from support.checkpoints import file_with_header, folder_bytes, random_tensor, safetensors_bytes, write_checkpoint

pytestmark = pytest.mark.usefixtures("soon")


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


class TestHeaders:
    NAMES = (
        "../../escape",
        "/etc/passwd",
        "..",
        ".",
        "a/../../b",
        "C:\\x",
        "~",
        "c/0",
        "zarr.json",
        "\x1b[2J",
        "",
        "a\nb",
    )

    def test_names_that_lead_elsewhere_are_names(self, store: Store, tmp_path: Path) -> None:
        """They are no paths: they come out as they came in, and nothing lies outside of the folders."""
        (tmp_path / "in").mkdir()
        content = safetensors_bytes({name: random_tensor("U8", (3,), at) for at, name in enumerate(self.NAMES)})
        (tmp_path / "in" / "model.safetensors").write_bytes(content)
        before = {path for path in tmp_path.rglob("*") if store.layout.root not in path.parents}
        store.ingest([tmp_path / "in"], ref="m")
        store.snapshot("m").export(tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == {"model.safetensors": content}
        after = {path for path in tmp_path.rglob("*") if store.layout.root not in path.parents}
        assert after - before == {tmp_path / "out", tmp_path / "out" / "model.safetensors"}
        keys = list(Hierarchy(store.snapshot("m")).keys())
        assert len(keys) == len(set(keys)) == 1 + 2 * len(self.NAMES)
        assert not any({"", "..", "."} & set(key.split("/")) or "\\" in key for key in keys)

    @pytest.mark.parametrize("dimensions", [2, 17, 18, 64])
    def test_extents_whose_product_no_float_holds(self, tmp_path: Path, dimensions: int) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(file_with_header({"w": entry(shape=[(1 << 62) - 1] * dimensions)}, bytes(8)))
        with pytest.raises(BadInputError, match="data_offsets say 8"):
            open_checkpoint(path)

    def test_numbers_that_are_infinite(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(
            file_with_header('{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', bytes(8))
        )
        with pytest.raises(BadInputError, match="more than a number can be"):
            open_checkpoint(path)

    @pytest.mark.parametrize("lie", ["none", "a gap", "an overlap", "a key twice"])
    def test_very_many_tensors(self, tmp_path: Path, deep: bool, lie: str) -> None:
        """Their number costs time and memory in proportion, whether the header is honest or not."""
        count = 1_000_000 if deep else 50_000
        text = ",".join(f'"t{at}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{at + 1}]}}' for at in range(count))
        text += {
            "none": "",
            "a gap": f',"x":{{"dtype":"U8","shape":[1],"data_offsets":[{count + 1},{count + 2}]}}',
            "an overlap": f',"x":{{"dtype":"U8","shape":[1],"data_offsets":[{count - 1},{count}]}}',
            "a key twice": ',"t7":{"dtype":"U8","shape":[1],"data_offsets":[7,8]}',
        }[lie]
        path = tmp_path / "model.safetensors"
        path.write_bytes(file_with_header("{" + text + "}", bytes(count)))
        if lie == "none":
            with open_checkpoint(path) as checkpoint:
                assert len(checkpoint.tensors) == count
        else:
            with pytest.raises(BadInputError):
                open_checkpoint(path)

    @pytest.mark.parametrize("nest", ["[", '{"a":', '{"__metadata__":'])
    def test_deep_nests(self, tmp_path: Path, nest: str) -> None:
        path = tmp_path / "model.safetensors"
        for depth in (900, 990, 1000, 100_000):
            path.write_bytes(file_with_header(nest * depth))
            with pytest.raises(BadInputError):
                open_checkpoint(path)


class TestFolders:
    def test_links_in_circles(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", {"w": random_tensor("U8", (3,))})
        (folder / "here").symlink_to("there")
        (folder / "there").symlink_to("here")
        with pytest.raises(BadInputError):
            open_checkpoint(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sub/dir/x.txt", "weights.bin"])
    @pytest.mark.parametrize("target", ["/etc/hostname", "../secret", "."])
    def test_links_out_of_the_folder(self, tmp_path: Path, name: str, target: str) -> None:
        (tmp_path / "secret").write_bytes(safetensors_bytes({"w": random_tensor("U8", (3,))}))
        folder = write_checkpoint(tmp_path / "m", {"w": random_tensor("U8", (3,))})
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to("../" * name.count("/") + target if target.startswith("..") else target)
        with pytest.raises(BadInputError, match="link"):
            open_checkpoint(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
    def test_pipes_and_devices_are_not_read(self, tmp_path: Path, name: str) -> None:
        folder = write_checkpoint(tmp_path / "m", {"w": random_tensor("U8", (3,))})
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(BadInputError):
            open_checkpoint(folder)


class _Calls:
    """Calls anything when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class TestPickles:
    @pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin", "model.pt"])
    @pytest.mark.parametrize("way", ["mkdir", "system", "eval", "bytes", "key", "getattr", "state"])
    def test_no_code_is_run(self, store: Store, tmp_path: Path, file: str, way: str) -> None:
        canary = tmp_path / "canary"
        numbers = torch.arange(3.0)
        value: Any = {
            "mkdir": {"w": numbers, "x": _Calls(os.mkdir, str(canary))},
            "system": {"w": numbers, "x": [_Calls(os.system, f"mkdir {canary}")]},
            "eval": {"w": numbers, "x": _Calls(eval, f"__import__('os').mkdir({str(canary)!r})")},
            "bytes": {"w": numbers},
            "key": {"w": numbers, ("a", _Calls(os.mkdir, str(canary))): 1},
            "getattr": {"w": numbers, "x": _Calls(getattr, _Calls(__import__, "os"), "mkdir")},
            "state": {"w": numbers, "x": _Calls(torch.load, str(tmp_path / "second"))},
        }[way]
        (tmp_path / "second").write_bytes(pickle.dumps(_Calls(os.mkdir, str(canary))))
        folder = tmp_path / "m"
        folder.mkdir()
        if way == "bytes":  # protocol 0, by hand
            (folder / file).write_bytes(f"cos\nmkdir\n(S'{canary}'\ntR.".encode())
        else:
            torch.save(value, folder / file)
        with pytest.raises(BadInputError, match=r"would run code|not a PyTorch file"):
            store.ingest([folder])
        assert not canary.exists()

    @pytest.mark.parametrize("innermost", ["a tensor", "nothing", "text"])
    def test_lists_that_hold_lists_twice(self, tmp_path: Path, innermost: str) -> None:
        """A file of two kilobytes whose tensors nobody could count."""
        value: Any = {"a tensor": [torch.ones(1)], "nothing": [], "text": ["x" * 1000]}[innermost]
        for _ in range(60):
            value = {"a": value, "b": value}
        torch.save(value, tmp_path / "model.bin")
        with pytest.raises(BadInputError, match="more values"):
            open_checkpoint(tmp_path / "model.bin")

    def test_a_long_key_again_and_again(self, tmp_path: Path) -> None:
        torch.save({"x" * 100_000: [torch.ones(1)] * 5000}, tmp_path / "model.bin")
        with pytest.raises(BadInputError, match="longer names"):
            open_checkpoint(tmp_path / "model.bin")

    @pytest.mark.parametrize("kept", [0, 1, 2])
    def test_memory_as_it_lies_is_no_tensor(self, tmp_path: Path, kept: int) -> None:
        """An old file that lacks the content of a storage that it names: torch gives whatever lies in memory there."""
        path = tmp_path / "model.bin"
        value = {"a": torch.arange(9.0), "b": torch.full((7,), 0xA5, dtype=torch.uint8)}
        torch.save(value, path, _use_new_zipfile_serialization=False)
        data = io.BytesIO(path.read_bytes())
        for _ in range(4):
            list(pickletools.genops(data))
        start = data.tell()
        keys = pickle.load(data)
        rest = data.read()
        contents = []
        while rest:  # each storage: how many elements, and they
            count = int.from_bytes(rest[:8], "little")
            size = 8 + {9: 36, 7: 7}[count]
            contents.append(rest[:size])
            rest = rest[size:]
        path.write_bytes(data.getvalue()[:start] + pickle.dumps(keys[:kept], protocol=2) + b"".join(contents[:kept]))
        if kept == 2:
            with open_checkpoint(path) as checkpoint:
                assert set(checkpoint.tensors) == {"a", "b"}
        else:
            with pytest.raises(BadInputError, match="lacks the content"):
                open_checkpoint(path)


class TestTargets:
    """Whoever can write to the folder that a checkpoint is exported to."""

    def test_a_link_in_the_place_of_the_target(self, evil: Store, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "precious").write_text("mine")
        (tmp_path / "out").symlink_to(victim)
        with pytest.raises(ConflictError):
            evil.snapshot("m").export(tmp_path / "out")
        evil.snapshot("m").export(tmp_path / "out", force=True)  # the link gives way, and not what it leads to
        assert not (tmp_path / "out").is_symlink()
        assert folder_bytes(victim) == {"precious": b"mine"}

    def test_a_link_in_the_place_of_what_is_not_yet_whole(
        self, evil: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its name has 32 random bits; even who knows them gets nothing written through it."""
        monkeypatch.setattr(secrets, "token_hex", lambda _count: "00000000")
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "precious").write_text("mine")
        (tmp_path / ".out.00000000.part").symlink_to(victim)
        with pytest.raises(EnvironmentalError):
            evil.snapshot("m").export(tmp_path / "out")
        assert folder_bytes(victim) == {"precious": b"mine"}

    def test_files_are_made_anew_and_never_opened(self, tmp_path: Path) -> None:
        """A link that somebody puts into the unfinished folder is not followed."""
        from mergepipe.store.export import _create

        (tmp_path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(FileExistsError):
            _create(tmp_path / "model.safetensors")
        assert not (tmp_path / "elsewhere").exists()


class TestPlans:
    def test_a_plan_of_other_ids_reads_nothing_of_them(self, evil: Store) -> None:
        """Its commits, and nothing else, say which blocks are read."""
        from mergepipe.merge import Expert, decode_plan, execute, plan_merge

        plan = plan_merge(evil, "m", [Expert("m", {"weight": 1.0})], "task_arithmetic").encode()
        for path in (("base", "commit"), ("experts", 0, "commit")):
            for other in (evil.snapshot("m").commit.tree, evil.snapshot("m").entry("lm_head.weight").blocks[0]):
                changed = json.loads(plan)
                place = changed
                for step in path[:-1]:
                    place = place[step]
                place[path[-1]] = other.hex()
                with pytest.raises(MergePipeError, match="not in this store"):
                    execute(evil, decode_plan(json.dumps(changed).encode(), "p"), "new")


def test_a_tensor_of_zeros_is_small_and_whole(store: Store, tmp_path: Path) -> None:
    """What is honest and folds well is no bomb."""
    zeros = np.zeros(1 << 22, np.uint8)
    content = safetensors_bytes({"w": replace(random_tensor("U8", (1 << 22,)), data=zeros.tobytes())})
    (tmp_path / "m.safetensors").write_bytes(content)
    store.ingest([tmp_path / "m.safetensors"])
    store.snapshot("m").export(tmp_path / "out")
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == content
