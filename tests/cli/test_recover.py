"""`mp recover`: what it says before, what it does, and that every other command points to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

DATA = ".mp/catalog/data.mdb"


def refs(call) -> dict[str, str]:
    return {row["ref"]: row["commit"] for row in call("ls", "--json").json}


def harm(here: Path, how: str) -> None:
    data = here / DATA
    if how == "gone":
        shutil.rmtree(data.parent)
    elif how == "cut":
        data.write_bytes(data.read_bytes()[:20_000])
    elif how == "noise":
        data.write_bytes(bytes(range(256)) * 200)
    else:
        data.write_bytes(b"")


@pytest.mark.parametrize("how", ["gone", "cut", "noise", "empty"])
def test_a_lost_catalog(call, merged: Path, how: str) -> None:
    before, log = refs(call), call("log", "--reflog", "--json").out
    harm(merged, how)
    for words in (["ls"], ["log"], ["verify"], ["du"], ["rm", "base"], ["gc"], ["tag", "t", "base"]):
        answer = call(*words, code=5)
        assert "mp recover" in answer.err
    assert "mp recover" in call("ls", "--json", code=5).error["hint"]
    text = call("recover").out
    assert "Nothing was changed. To rebuild the catalog: mp recover --apply" in text
    assert f"refs     {len(before)}" in text
    call("ls", code=5)
    answer = call("recover", "--apply")
    assert "The catalog was rebuilt." in answer.out
    assert "mp analyze" in answer.err
    assert refs(call) == before
    assert call("log", "--reflog", "--json").out == log
    assert "all as they should be" in call("verify").out
    assert "as it should be" in call("recover", "--apply").out


def test_as_json(call, merged: Path) -> None:
    before = refs(call)
    value = call("recover", "--json").json
    assert (value["needed"], value["applied"], value["catalog"], value["differences"]) == (False, False, None, {})
    harm(merged, "gone")
    value = call("recover", "--apply", "--json", "--full").json
    assert (value["needed"], value["applied"], value["kept"]) == (True, True, None)
    assert "is not there" in value["catalog"]
    assert {row["ref"]: row["commit"] for row in value["refs"]} == before
    assert value["refs_from"] == "journal"
    assert (value["damaged"], value["made_refs"], value["lost_refs"], value["unreadable_lines"]) == ([], [], {}, 0)


def test_without_a_journal(call, merged: Path) -> None:
    commits = set(call("recover", "--json").json["commits"])
    (merged / ".mp" / "refs.journal").unlink()
    harm(merged, "gone")
    text = call("recover", "--apply").out
    assert "there is no journal" in text
    made = refs(call)
    assert made
    assert set(made.values()) <= commits
    assert all(name == f"recovered/{commit[:12]}" for name, commit in made.items())
    assert len(call("log", *made, "--json").json) == len(commits)


def test_what_cannot_be_read_is_named(call, merged: Path) -> None:
    path = next(path for path in sorted((merged / ".mp" / "objects").glob("*/*")))
    path.unlink()
    path.write_bytes(b"nothing")
    digest = path.parent.name + path.name
    harm(merged, "gone")
    answer = call("recover")
    assert f"damaged  {digest[:12]}" in answer.out
    assert "Ingest the same checkpoints again" in answer.err
    assert [row["id"] for row in call("recover", "--json").json["damaged"]][:1] == [digest]
    with (merged / ".mp" / "refs.journal").open("ab") as file:
        file.write(b"half a li")
    assert "1 line of the journal cannot be read" in call("recover").out


def test_a_store_that_is_in_use(call, filled: Path) -> None:
    from mergepipe.store import Store

    with Store.open(filled / ".mp"):
        error = call("recover", "--apply", "--json", code=6).error
    assert json.dumps(error)
    assert error["hint"]


def test_no_store(call, here: Path) -> None:
    assert not (here / ".mp").exists()
    assert "mp init" in call("recover", code=3).err
