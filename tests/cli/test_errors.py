"""Everything that can go wrong ends in a line that says what, a hint that says what to do, and the right exit code."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mergepipe.store import Store
from support.checkpoints import file_with_header, random_tensor, write_checkpoint, write_safetensors
from support.stores import state_of, writers_left

TENSORS = {f"layer.{number}.weight": random_tensor("BF16", (8, 16), number) for number in range(4)}
Maker = Callable[[Path], Path]


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/mergepipe-was-here",)


def _sharded(folder: Path) -> Path:
    return write_checkpoint(folder / "model", TENSORS, shards=2)


def missing_shard(folder: Path) -> Path:
    path = _sharded(folder)
    (path / "model-00002-of-00002.safetensors").unlink()
    return path


def missing_shard_without_index(folder: Path) -> Path:
    path = missing_shard(folder)
    (path / "model.safetensors.index.json").unlink()
    return path


def disagreeing_index(folder: Path) -> Path:
    path = _sharded(folder)
    index = path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["layer.9.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(value))
    return path


def index_out_of_the_folder(folder: Path) -> Path:
    path = _sharded(folder)
    index = path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["layer.0.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(value))
    return path


def truncated(folder: Path) -> Path:
    path = write_checkpoint(folder / "model", TENSORS) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return path.parent


def truncated_header(folder: Path) -> Path:
    path = write_checkpoint(folder / "model", TENSORS) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    return path.parent


def lying_header(folder: Path) -> Path:
    path = folder / "model.safetensors"
    header = {"layer.0.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 16]}}
    path.write_bytes(file_with_header(header, bytes(16)))
    return path


def huge_header(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    return path


def unknown_dtype(folder: Path) -> Path:
    path = folder / "model.safetensors"
    header = {"layer.0.weight": {"dtype": "BF15", "shape": [2], "data_offsets": [0, 4]}}
    path.write_bytes(file_with_header(header, bytes(4)))
    return path


def link_out(folder: Path) -> Path:
    (folder / "secret.txt").write_text("secret")
    path = write_checkpoint(folder / "model", TENSORS)
    (path / "notes.txt").symlink_to(folder / "secret.txt")
    return path


def malicious_pickle(folder: Path) -> Path:
    path = folder / "model.bin"
    path.write_bytes(pickle.dumps({"weight": _Code()}))
    return path


def malicious_torch_file(folder: Path) -> Path:
    import torch

    path = folder / "model.pt"
    torch.save({"weight": torch.zeros(2), "more": _Code()}, path)
    return path


def no_weights(folder: Path) -> Path:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


def no_checkpoint(folder: Path) -> Path:
    (folder / "notes.txt").write_text("hello")
    return folder / "notes.txt"


BAD = {
    missing_shard: ("model-00002-of-00002.safetensors is missing", "layer.1.weight"),
    missing_shard_without_index: ("model-00002-of-00002.safetensors is missing",),
    disagreeing_index: ("disagrees", "layer.9.weight", "model-00001-of-00002.safetensors"),
    index_out_of_the_folder: ("outside of the folder", "../elsewhere.safetensors", "layer.0.weight"),
    truncated: ("model.safetensors",),
    truncated_header: ("model.safetensors",),
    lying_header: ("model.safetensors", "layer.0.weight"),
    huge_header: ("model.safetensors",),
    unknown_dtype: ("model.safetensors", "layer.0.weight", "BF15"),
    link_out: ("notes.txt", "leads out of the folder"),
    malicious_pickle: ("model.bin", "nothing of it was run"),
    malicious_torch_file: ("model.pt", "nothing of it was run"),
    no_weights: ("has no weights",),
    no_checkpoint: ("notes.txt",),
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_checkpoints(call, filled: Path, tmp_path: Path, make: Maker) -> None:
    with Store.open(filled) as store:
        before = state_of(store)
        folder = tmp_path / "bad"
        folder.mkdir()
        path = make(folder)
        answer = call("ingest", path, "--base", "base", code=4)
        assert answer.out == ""
        assert answer.err.startswith("error: ")
        for part in BAD[make]:
            assert part in answer.err
        assert call("ingest", path, "--json", code=4).error["error"] == "bad_input"
        assert state_of(store) == before
        assert writers_left(store) == []
    assert not Path("/tmp/mergepipe-was-here").exists()


def test_a_failed_first_ingest_leaves_no_store(call, here: Path) -> None:
    call("ingest", no_weights(here), code=4)
    assert not (here / ".mp").exists()


def test_one_bad_checkpoint_among_good_ones(call, filled: Path, tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path / "good", TENSORS)
    with Store.open(filled) as store:
        before = state_of(store)
        call("ingest", good, truncated(tmp_path), code=4)
        assert state_of(store) == before


@pytest.mark.usefixtures("filled")
def test_a_base_with_other_shapes(call, tmp_path: Path) -> None:
    wrong = {"lm_head.weight": random_tensor("BF16", (128, 65))}
    path = write_checkpoint(tmp_path / "wrong", wrong)
    answer = call("ingest", path, "--base", "base", code=4)
    for part in ("lm_head.weight", "[128, 65]", "[128, 64]", "'base'", "model.safetensors"):
        assert part in answer.err
    stranger = write_checkpoint(tmp_path / "stranger", TENSORS)
    assert "none of its 4 tensors" in call("ingest", stranger, "--base", "base", code=4).err


@pytest.mark.parametrize(
    "words",
    [["log", "expert"], ["ls", "expert"], ["show", "expert"], ["export", "expert", "out"], ["diff", "base", "expert"],
     ["rm", "expert"], ["branch", "b", "expert"], ["verify", "expert"], ["tag", "t", "expert"]],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.usefixtures("filled")
def test_an_unknown_ref_has_a_suggestion(call, words: list[str]) -> None:
    answer = call(*words, code=3)
    assert "'expert'" in answer.err
    assert "Did you mean" in answer.err
    assert "'expert0'" in answer.err


@pytest.mark.usefixtures("filled")
def test_unknown_base(call, family: Path) -> None:
    assert "Did you mean 'base'?" in call("ingest", family / "expert0", "--base", "basis", code=3).err
    call("ingest", family / "expert0", "--ref", "x", "--base", "0" * 12, code=3)


@pytest.mark.usefixtures("filled")
def test_unknown_things_in_a_commit(call) -> None:
    assert "'lm_head.weight'" in call("show", "base:lm_head.weigth", code=3).err
    assert "Did you mean" in call("ls", "base:model.layer", code=0).out + call("ls", "base:modle.layers", code=3).err
    assert "config.json" in call("show", "base:confg.json", code=3).err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["lgo"], ["no command 'lgo'", "'log'"]),
        (["log", "--grph"], ["--grph", "--graph"]),
        (["log", "-n", "many"], ["--limit", "'many' is not a whole number"]),
        (["log", "-n", "-1"], ["-1 is less than 0"]),
        (["show"], ["REF"]),
        (["export", "base"], ["DIR"]),
        (["export", "base", "out", "--dtype", "flout32"], ["'flout32'", "'float32'"]),
        (["export", "base", "out", "--max-shard-size", "2 apples"], ["'2 apples' is not a size", "2GiB"]),
        (["init", "x", "--block-size", "3MiB"], ["power of two"]),
        (["branch", "name"], ["which commit", "mp branch name REF"]),
        (["branch", "../name", "base"], ["'../name' cannot be a ref's name"]),
        (["log", "base@{x}"], ["'base@{x}' cannot be understood"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("filled")
def test_usage(call, words: list[str], parts: list[str]) -> None:
    answer = call(*words, code=2)
    assert answer.err.startswith("error: ")
    assert "hint: " in answer.err
    for part in parts:
        assert part in answer.err
    assert call(*words, "--json", code=2).error["error"] == "usage"


def test_no_store(call, here: Path) -> None:
    assert "`mp init`" in call("log", code=3).err
    call("log", "--store", "nowhere", code=3)
    call("--store", "nowhere", "log", code=3)
    call("ingest", "nowhere", "--store", "nowhere", code=3)
    assert not (here / "nowhere").exists()


@pytest.mark.usefixtures("filled")
def test_a_path_that_is_not_there(call, family: Path) -> None:
    answer = call("ingest", family / "expret0", code=3)
    assert "there is no file or folder" in answer.err
    assert "'expert0'" in answer.err


def test_export_overwrites_nothing(call, filled: Path) -> None:
    (filled / "out").mkdir()
    (filled / "out" / "mine.txt").write_text("mine")
    assert "--force" in call("export", "base", "out", code=6).err
    assert (filled / "out" / "mine.txt").read_text() == "mine"
    call("export", "base", "out", "--force")
    assert not (filled / "out" / "mine.txt").exists()


@pytest.mark.parametrize("target", [".", "..", "/", ".mp"])
@pytest.mark.usefixtures("filled")
def test_export_replaces_no_folder_that_others_live_in(call, target: str) -> None:
    assert "is not replaced" in call("export", "base", target, "--force", code=6).err
    call("verify")


def test_damage_is_reported(call, filled: Path) -> None:
    block = call("show", "base:lm_head.weight", "--json").json["blocks"][0]["id"]
    path = filled / ".mp" / "objects" / block[:2] / block[2:]
    path.unlink()
    answer = call("export", "base", "out", code=5)
    assert block[:12] in answer.err
    assert "mp verify" in answer.err
    assert not (filled / "out").exists()


def test_a_network_filesystem(call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergepipe.store.filesystem.filesystem_type", lambda *_: "nfs4")
    answer = call("init", code=8)
    assert "network filesystem (nfs4)" in answer.err
    assert "mp init --catalog" in answer.err
    assert not (here / ".mp" / "store.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(call, here: Path) -> None:
    here.chmod(0o500)
    try:
        assert "permission" in call("init", code=8).err
    finally:
        here.chmod(0o700)


@pytest.mark.usefixtures("filled")
def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from mergepipe.cli.app import main

    def broken(*_: object) -> None:
        raise AssertionError("impossible")

    monkeypatch.setattr("mergepipe.store.usage.all_refs", broken)
    assert main(["du"]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert "mistake in mp itself" in errors


@pytest.mark.usefixtures("filled")
def test_nobody_reads() -> None:
    """As in ``mp ls base | true``: no traceback, no message."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [Path(sys.executable).with_name("mp"), "log"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.usefixtures("filled")
def test_closed_and_full_outputs() -> None:
    script = f"{Path(sys.executable).with_name('mp')} ls"
    assert subprocess.run(f"{script} >&-", shell=True, capture_output=True, check=False).returncode == 0
    full = subprocess.run(f"{script} > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert full.returncode == 8
    assert "the disk is full" in full.stderr
    assert "Traceback" not in full.stderr


def test_names_cannot_move_the_cursor(call, here: Path) -> None:
    write_safetensors(here / "odd.safetensors", {"a\033[2Jb": random_tensor("U8", (3,))})
    call("ingest", "odd.safetensors")
    assert "a\\x1b[2Jb" in call("ls", "odd").out
    assert "\033" not in call("show", "odd:a\033[2J", code=3).err
