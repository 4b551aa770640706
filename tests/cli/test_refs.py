"""Branches move, tags do not, removed refs can be had back; nothing is lost on the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergepipe.store import Store


def commit_of(filled: Path, name: str) -> str:
    with Store.open(filled) as store:
        return store.resolve(name).hex()


def test_a_branch_is_made_moved_and_listed(call, filled: Path) -> None:
    call("branch", "experts/zero", "expert0")
    assert commit_of(filled, "experts/zero") == commit_of(filled, "expert0")
    assert "experts/zero" in call("branch").out
    answer = call("branch", "experts/zero", "base", code=6)
    assert "--force" in answer.err
    assert "it was at" in call("branch", "experts/zero", "base", "--force").out
    assert commit_of(filled, "experts/zero") == commit_of(filled, "base")
    assert commit_of(filled, "experts/zero@{1}") == commit_of(filled, "expert0")


@pytest.mark.usefixtures("filled")
def test_a_branch_that_is_there_already(call) -> None:
    call("branch", "expert0", "expert0", "--force")
    assert len(call("log", "expert0", "--reflog", "--json").json) == 1, "a move to where it is, is no move"
    assert call("branch", "expert0", "expert0", code=6)


@pytest.mark.usefixtures("filled")
def test_a_tag_does_not_move(call, family: Path) -> None:
    call("tag", "v1", "expert0")
    assert call("tag", "--json").json[0]["type"] == "tag"
    for words in (["tag", "v1", "base"], ["branch", "v1", "base"], ["branch", "v1", "base", "--force"]):
        assert "mp rm v1" in call(*words, code=6).err
    assert "tags do not move" in call("ingest", family / "expert1", "--ref", "v1", code=6).err
    assert "v1" not in call("branch").out
    assert "tag" in call("ls").out


@pytest.mark.usefixtures("filled")
def test_a_name_can_be_one_thing_only(call) -> None:
    call("tag", "expert0", "base", code=6)


def test_ids_and_steps_name_commits(call, filled: Path) -> None:
    base = commit_of(filled, "base")
    call("branch", "a", base)
    call("branch", "b", base[:10])
    call("branch", "c", "expert0~1")
    call("branch", "d", "expert1^1")
    assert {commit_of(filled, name) for name in "abcd"} == {base}


def test_rm_says_how_to_have_it_back(call, filled: Path) -> None:
    before = commit_of(filled, "expert0")
    answer = call("rm", "expert0")
    assert "stays in the store" in answer.out
    again = answer.out.split("mp branch ")[1].split()
    call("log", "expert0", code=3)
    call("branch", *again)
    assert commit_of(filled, "expert0") == before
    moves = call("log", "expert0", "--reflog", "--json").json
    assert [move["new"] for move in moves] == [before, None, before]
    assert [move["ago"] for move in moves] == [0, 1, 2]


def test_rm_removes_all_or_none(call, filled: Path) -> None:
    call("rm", "expert0", "nothing", code=3)
    assert commit_of(filled, "expert0")
    call("tag", "t", "base")
    removed = call("rm", "expert0", "t", "expert0", "--json").json
    assert [(item["ref"], item["type"]) for item in removed] == [("expert0", "branch"), ("t", "tag")]
    assert "expert0" not in call("ls").out


@pytest.mark.usefixtures("filled")
def test_reflog_of_all(call) -> None:
    call("rm", "expert1")
    moves = call("log", "--reflog", "--json").json
    assert [(move["ref"], move["reason"]) for move in moves[:2]] == [("expert1", "rm"), ("expert1", "ingest")]
    assert moves[0]["author"] == "ada"
    assert "expert1@{0}" in call("log", "--reflog").out
    assert "expert1@{0}" not in call("log", "--reflog", "-n", "0", "base").out
    call("log", "never", "--reflog", code=3)


def test_the_store_is_found(call, filled: Path, monkeypatch) -> None:
    expected = call("ls").out
    (filled / "deep" / "down").mkdir(parents=True)
    monkeypatch.chdir(filled / "deep" / "down")
    assert call("ls").out == expected
    monkeypatch.chdir("/")
    call("ls", code=3)
    assert call("--store", filled, "ls").out == expected
    assert call("ls", "--store", filled / ".mp").out == expected
    assert call("--store", "/nowhere", "ls", "--store", filled).out == expected
    monkeypatch.setenv("MP_STORE", os.fspath(filled))
    assert call("ls").out == expected


def test_init(call, here: Path) -> None:
    made = call("init", "--block-size", "4KiB", "--json").json
    assert made["block_bytes"] == 4096
    assert Path(made["store"]) == here / ".mp"
    assert "there is a store" in call("init", code=6).err
    call("init", "other", "--catalog", "elsewhere")
    assert (here / "elsewhere" / "data.mdb").exists()
    call("ls", "--store", "other")


@pytest.mark.usefixtures("here")
def test_an_empty_store(call) -> None:
    call("init")
    for words in (["ls"], ["log"], ["branch"], ["tag"], ["du"], ["verify"], ["log", "--graph"], ["log", "--reflog"]):
        call(*words)
    assert call("log", "--json").json == call("ls", "--json").json == []
    assert "The store is empty" in call("show", "base", code=3).err
