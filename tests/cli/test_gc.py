"""``mp gc`` as people type it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergepipe.store import Store
from mergepipe.store.digest import hash_bytes
from support.collecting import CALM, put_block
from support.family import write_family
from support.stores import object_path

pytestmark = pytest.mark.usefixtures("tidy")


@pytest.fixture
def tidy(call, tmp_path, monkeypatch) -> None:
    base, experts = write_family(tmp_path / "family")
    monkeypatch.chdir(tmp_path)
    call("ingest", str(base))
    call("ingest", *map(str, experts), "--base", "base", "--previews")


def test_it_says_what_it_would_do_and_does_it(call) -> None:
    assert "nothing to remove" in call("gc").out
    call("rm", "expert1")
    answer = call("gc")
    assert "nothing to remove" in answer.out
    planned = call("gc", "--grace", "0", "--json").json
    assert planned["applied"] is False
    assert planned["commits"] == planned["objects"]["commit"] == 1
    words = call("gc", "--grace", "0").out
    assert "Nothing was changed" in words
    assert "would be removed" in words
    before = call("du", "--json").json["stored_bytes"]
    done = call("gc", "--grace", "0", "--apply", "--json").json
    assert {**done, "applied": False} == planned
    assert call("du", "--json").json["stored_bytes"] == before - done["freed_bytes"]
    assert "nothing to remove" in call("gc", "--grace", "0").out
    call("verify")


def test_what_is_young_is_named(call) -> None:
    call("rm", "expert0")
    kept = call("gc", "--grace", "1h")
    assert "nothing to remove" in kept.out
    assert "last 1h" in kept.err
    (move,) = [move for move in call("log", "--reflog", "expert0", "--json").json if move["new"] is None]
    call("gc", "--grace", "0", "--apply")
    assert "no ref or commit" in call("branch", "expert0", move["old"], "--json", code=3).error["message"]


def test_what_a_crash_left_and_what_is_too_young_to_go(call) -> None:
    with Store.open(Path(".mp")) as store:
        young = object_path(store, put_block(store, CALM))
        crashed = object_path(store, hash_bytes(b"crashed"))
    crashed.write_bytes(bytes(3000))
    os.utime(crashed, (0, 0))
    answer = call("gc")
    assert "1 file that a crash left" in answer.out
    assert "that nothing needs: younger than 14d, so kept" in answer.err
    done = call("gc", "--apply", "--json").json
    assert (done["stray_files"], done["freed_bytes"]) == (1, 3000)
    assert (done["kept_young"], done["kept_young_bytes"]) == (1, young.stat().st_size)
    assert not crashed.exists()
    call("gc", "--apply", "--grace", "0s")
    assert not young.exists()


@pytest.mark.parametrize("words", [["--grace", "soon"], ["--grace", "5"], ["--previews", "--grace", "0"]])
def test_what_it_does_not_understand(call, words: list[str]) -> None:
    assert call("gc", *words, "--json", code=2).error["hint"]
