"""What ``mp ingest`` says while it works: the store it makes, the base it suggests, a line for each checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from support.checkpoints import random_tensor, write_safetensors


def test_a_store_is_made(call, here: Path, family: Path) -> None:
    answer = call("ingest", family / "base")
    assert f"made a store in {here / '.mp'}" in answer.err
    assert answer.out.startswith("base  ")
    assert "made a store" not in call("ingest", family / "expert0").err


@pytest.mark.usefixtures("filled")
def test_the_base_is_suggested(call, family: Path) -> None:
    call("rm", "expert0")
    answer = call("ingest", family / "expert0", "--ref", "new-one")
    assert "looks like a fine-tune of base" in answer.err
    command = answer.err.split("and run: ")[1].strip()
    words = shlex.split(command)
    assert words[:2] == ["mp", "ingest"]
    line = call(*words[1:]).out
    assert line.startswith("new-one  ")
    assert "base: base" in call("log", "new-one", "-n", "1").out


@pytest.mark.usefixtures("filled")
def test_nothing_is_suggested_where_the_base_is_known(call, family: Path) -> None:
    answer = call("ingest", family / "expert0")
    assert answer.err == ""
    assert "as it was" in answer.out


@pytest.mark.usefixtures("filled")
def test_base_auto(call, family: Path) -> None:
    call("rm", "expert1")
    call("ingest", family / "expert1", "--base", "auto", "--ref", "again")
    (parent,) = call("log", "again", "-n", "1", "--json").json[0]["parents"]
    assert (parent["role"], parent["name"]) == ("base", "base")


def test_base_auto_finds_none(call, filled: Path) -> None:
    write_safetensors(filled / "other.safetensors", {"x": random_tensor("BF16", (4, 4))})
    assert "no ref in the store looks like" in call("ingest", "other.safetensors", "--base", "auto", code=3).err


@pytest.mark.usefixtures("here")
def test_message_and_ref(call, family: Path) -> None:
    call("ingest", family / "base", "--ref", "models/base", "-m", "as it came")
    assert call("log", "models/base", "--json").json[0]["message"] == "as it came"
    assert "--ref names one" in call("ingest", family / "base", family / "expert0", "--ref", "x", code=2).err


@pytest.mark.usefixtures("here")
def test_the_line_says_what_it_cost(call, family: Path) -> None:
    line = call("ingest", family / "base").out
    assert "KiB in 12 tensors, 12 blocks" in line
    assert "written (" in line
    shared = call("ingest", family / "expert0", "--base", "base").out
    assert "of them known already" in shared


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_ref_names_come_from_file_names(call, here: Path, family: Path, suffix: str) -> None:
    source = family / "base" / "model.safetensors"
    target = here / f"My Model v1.0{suffix or '.safetensors'}"
    target.write_bytes(source.read_bytes())
    assert call("ingest", target).out.startswith("My-Model-v1.0  ")
