"""The contracts of ``--json``: these fields, and on stdout nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.stores import flip_bit

INGEST = {
    "ref", "commit", "tensors", "blocks", "raw_bytes", "stored_bytes", "written_bytes", "reused_blocks",
    "elapsed_seconds",
}  # fmt: skip
LOG = {"commit", "kind", "refs", "parents", "message", "time", "author"}


def test_ingest(call, family: Path) -> None:
    answer = call("ingest", family / "base", family / "expert0", "--json")
    assert [item["ref"] for item in answer.json] == ["base", "expert0"]
    for item in answer.json:
        assert set(item) >= INGEST
        assert re.fullmatch("[0-9a-f]{64}", item["commit"])
        assert item["tensors"] == 12
        assert 0 < item["stored_bytes"] < item["raw_bytes"]
        assert isinstance(item["elapsed_seconds"], float)
    assert "made a store" in answer.err


@pytest.mark.usefixtures("filled")
def test_ingest_again_writes_nothing(call, family: Path) -> None:
    (item,) = call("ingest", family / "expert0", "--json").json
    assert item["written_bytes"] == 0
    assert item["unchanged"]
    assert item["reused_blocks"] == item["blocks"]


@pytest.mark.usefixtures("filled")
def test_log(call) -> None:
    entries = call("log", "--json").json
    assert [entry["refs"] for entry in entries] == [["expert1"], ["expert0"], ["base"]]
    for entry in entries:
        assert set(entry) >= LOG
    assert entries[1]["parents"] == [{"commit": entries[2]["commit"], "role": "base", "name": "base"}]
    assert entries[1]["message"] == "first\nwith a second line"
    assert entries[1]["author"] == "ada"
    assert entries[1]["kind"] == "ingest"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entries[1]["time"])


@pytest.mark.usefixtures("filled")
def test_verify(call) -> None:
    found = call("verify", "--json").json
    assert set(found) >= {"objects", "checked_bytes", "damaged"}
    assert found["objects"] > 50
    assert found["damaged"] == []


def test_verify_of_a_damaged_store(call, filled: Path) -> None:
    block = call("show", "expert0:model.layers.0.mlp.up_proj.weight", "--json").json["blocks"][1]["id"]
    flip_bit(filled / ".mp" / "objects" / block[:2] / block[2:], -1)
    (damage,) = call("verify", "--json", code=5).json["damaged"]
    assert set(damage) >= {"id", "kind", "reason", "used_by"}
    assert damage["id"] == block
    assert damage["kind"] == "block"
    assert damage["used_by"] == ["expert0:model.layers.0.mlp.up_proj.weight"]


def test_verify_says_it_in_words(call, filled: Path, family: Path) -> None:
    assert "all as they should be" in call("verify").out
    block = call("show", "expert0:model.layers.0.mlp.up_proj.weight", "--json").json["blocks"][1]["id"]
    flip_bit(filled / ".mp" / "objects" / block[:2] / block[2:], -1)
    answer = call("verify", "expert0", code=5)
    assert f"block {block[:12]}" in answer.out
    assert "expert0:model.layers.0.mlp.up_proj.weight" in answer.out
    assert "again" in answer.err
    call("ingest", family / "expert0")
    call("verify")


@pytest.mark.parametrize(
    "words",
    [
        ["init", "elsewhere"], ["ls"], ["ls", "expert0"], ["ls", "expert0:model.layers.1"], ["show", "expert0"],
        ["show", "expert0:lm_head.weight"], ["show", "expert0:config.json"], ["diff", "base", "expert0"],
        ["branch"], ["branch", "b", "base"], ["tag"], ["tag", "t", "base"], ["rm", "expert0"], ["du"],
        ["log", "--reflog"], ["export", "base", "out"], ["verify", "base", "--fast"], ["log", "-n", "1"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.usefixtures("filled")
def test_all_that_prints_prints_one_value(call, words: list[str]) -> None:
    assert call(*words, "--json").json is not None


@pytest.mark.usefixtures("filled")
def test_ls(call) -> None:
    refs = call("ls", "--json").json
    assert [(ref["ref"], ref["type"], ref["kind"]) for ref in refs] == [
        ("base", "branch", "ingest"),
        ("expert0", "branch", "ingest"),
        ("expert1", "branch", "ingest"),
    ]
    content = call("ls", "expert0", "--json").json
    assert content["commit"] == refs[1]["commit"]
    assert content["tensors"][0] == {
        "name": "lm_head.weight", "dtype": "BF16", "shape": [128, 64], "chunk_shape": [32, 64], "bytes": 16384,
        "blocks": 4,
    }  # fmt: skip
    assert {file["path"] for file in content["files"]} == {"config.json", "tokenizer.json"}


@pytest.mark.usefixtures("filled")
def test_show_a_tensor(call) -> None:
    tensor = call("show", "expert0:model.layers.0.mlp.up_proj.weight", "--json").json
    assert (tensor["dtype"], tensor["shape"], tensor["chunk_shape"]) == ("BF16", [128, 64], [32, 64])
    assert tensor["base"] == "base"
    assert len(tensor["blocks"]) == 4
    for block in tensor["blocks"]:
        assert block["encoding"] == "delta"
        assert 0 < block["stored_bytes"] < block["bytes"] == 4096
        assert block["delta_norm"] > block["largest"] > 0
        assert not block["same_as_base"]
    same = call("show", "expert0:lm_head.weight", "--json").json
    assert all(block["same_as_base"] and block["delta_norm"] is None for block in same["blocks"])


@pytest.mark.usefixtures("filled")
def test_show_a_commit(call) -> None:
    commit = call("show", "base", "--json").json
    assert commit["refs"] == ["base"]
    assert [child["role"] for child in commit["children"]] == ["base", "base"]
    assert commit["tensors"] == 12
    assert commit["plan"] is None
    assert 0 < commit["stored_bytes"] < commit["logical_bytes"]


@pytest.mark.usefixtures("filled")
def test_diff(call) -> None:
    found = call("diff", "base", "expert0", "--json").json
    assert len(found["tensors"]) == 6
    for tensor in found["tensors"]:
        assert tensor["change"] == "changed"
        assert tensor["changed_blocks"] == tensor["blocks"]
        assert tensor["delta_norm"] > 0
    assert found["files"] == []


@pytest.mark.usefixtures("filled")
def test_du(call) -> None:
    found = call("du", "--json").json
    assert found["logical_bytes"] > found["unique_bytes"] > found["stored_bytes"] > 0
    by_ref = {ref["ref"]: ref for ref in found["refs"]}
    assert by_ref["expert0"]["alone_bytes"] < by_ref["expert0"]["stored_bytes"]


def test_export(call, filled: Path, family: Path) -> None:
    found = call("export", "expert0", "out", "--json").json
    assert found["identical"]
    assert found["files"] == 3
    assert {path.name: path.read_bytes() for path in (filled / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (family / "expert0").iterdir()
    }
