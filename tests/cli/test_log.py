"""``mp log``: newest first, as far as asked for, with lines between the commits where wanted."""

from __future__ import annotations

import time
from pathlib import Path

from mergepipe.store import Store
from mergepipe.store.commits import Commit, Parent
from mergepipe.store.digest import Digest
from mergepipe.store.publish import Changes, RefUpdate, publish


def add_commit(store: Store, ref: str, parents: list[Parent], minute: int, kind: str = "ingest") -> Digest:
    """A commit with some tree of the store, at a minute of the year 2030."""
    tree = store.snapshot("base").commit.tree
    time = f"2030-01-01T{minute // 60:02}:{minute % 60:02}:00.000000Z"
    commit = Commit(tree, tuple(parents), kind, f"{ref} at {minute}", "ada", time, "test")
    with store.catalog.reading() as view:
        known = view.get("refs", ref.encode())
    before = store.resolve(ref) if known else None
    publish(store.catalog, None, Changes([commit], [RefUpdate(ref, before, commit.id)]))
    return commit.id


def merged(filled: Path) -> None:
    with Store.open(filled) as store:
        ids = {name: store.resolve(name) for name in ("base", "expert0", "expert1")}
        parents = [Parent(ids["base"], "base", "base")]
        parents += [Parent(ids[name], "expert", name) for name in ("expert0", "expert1")]
        first = add_commit(store, "merged", parents, 1, "merge")
        add_commit(store, "merged", [Parent(first, "previous", "merged"), *parents], 2, "merge")


def test_the_graph_of_a_merge(call, filled: Path) -> None:
    merged(filled)
    lines = [line.split("  ") for line in call("log", "merged", "--graph").out.splitlines()]
    assert [line[0] or "  " + line[1] for line in lines] == [
        "*",
        "+-.-.-.",
        "* | | |",
        "'-+-+-+",
        "  | | *",
        "  +-|-'",
        "  | *",
        "  +-'",
        "  *",
    ]
    assert lines[1][1:] == ["previous; base: base; experts: expert0, expert1"]
    assert lines[0][-1] == "merged at 2"
    assert lines[-1][-1] == "the base"


def test_plain_log_names_the_parents(call, filled: Path) -> None:
    merged(filled)
    out = call("log", "merged").out
    assert "previous; base: base; experts: expert0, expert1" in out
    assert "first\n" in out
    assert "second line" not in out


def test_the_limit(call, filled: Path) -> None:
    merged(filled)
    assert len(call("log", "--json").json) == 5
    assert [entry["message"] for entry in call("log", "-n", "2", "--json").json] == ["merged at 2", "merged at 1"]
    assert len(call("log", "-n", "0", "--json").json) == 5
    assert "-n 0 shows all" in call("log", "-n", "2").err
    assert call("log", "-n", "5").err == ""


def test_ten_thousand_commits(call, filled: Path) -> None:
    """Only what is shown is read; the default shows twenty."""
    with Store.open(filled) as store:
        tree = store.snapshot("base").commit.tree
        last = store.resolve("base")
        commits = []
        for number in range(10_000):
            moment = f"2030-01-{number // 1440 + 1:02}T{number // 60 % 24:02}:{number % 60:02}:00.000000Z"
            commits.append(Commit(tree, (Parent(last, "previous", "long"),), "ingest", str(number), "ada", moment, "t"))
            last = commits[-1].id
        publish(store.catalog, None, Changes(commits, [RefUpdate("long", None, last)]))
    start = time.perf_counter()
    assert [entry["message"] for entry in call("log", "long", "--json").json][:2] == ["9999", "9998"]
    few = time.perf_counter() - start
    assert few < 0.3
    start = time.perf_counter()
    assert len(call("log", "long", "-n", "0", "--graph").out.splitlines()) == 10_001
    assert time.perf_counter() - start < 10


def test_ids_are_shortened_to_what_is_unique(call, filled: Path) -> None:
    ids = [line.split()[0] for line in call("log").out.splitlines() if not line.startswith(" ")]
    assert all(len(digits) == 8 for digits in ids)
    with Store.open(filled) as store:
        assert len({store.resolve(digits) for digits in ids}) == 3


def test_a_commit_without_a_message(call, filled: Path) -> None:
    with Store.open(filled) as store:
        commit = Commit(store.snapshot("base").commit.tree, (), "ingest", "", "ada", "no time", "test")
        publish(store.catalog, None, Changes([commit], [RefUpdate("odd", None, commit.id)]))
    assert "no time" in call("log", "odd").out
    call("ls")
    call("show", "odd")
