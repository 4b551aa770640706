"""``mp log``: newest first, as far as asked for, with lines between the commits where wanted."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from mergepipe.cli.plan_head import ModelHead, PlanHead
from mergepipe.cli.show_plan import default_message, origin_line
from mergepipe.store import Store
from mergepipe.store.commits import Commit, Parent
from mergepipe.store.digest import Digest, hash_bytes
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


def with_merges(filled: Path) -> None:
    with Store.open(filled) as store:
        ids = {name: store.resolve(name) for name in ("base", "expert0", "expert1")}
        parents = [Parent(ids["base"], "base", "base")]
        parents += [Parent(ids[name], "expert", name) for name in ("expert0", "expert1")]
        first = add_commit(store, "merged", parents, 1, "merge")
        add_commit(store, "merged", [Parent(first, "previous", "merged"), *parents], 2, "merge")


def test_the_graph_of_a_merge(call, filled: Path) -> None:
    with_merges(filled)
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
    with_merges(filled)
    out = call("log", "merged").out
    assert "previous; base: base; experts: expert0, expert1" in out
    assert "first\n" in out
    assert "second line" not in out


def test_the_limit(call, filled: Path) -> None:
    with_merges(filled)
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


@pytest.mark.usefixtures("merged")
def test_the_graph_says_how_a_merge_was_made(call) -> None:
    lines = call("log", "merged/v2", "--graph").out.splitlines()
    second, first = (next(line for line in lines if method in line) for method in ("task_arithmetic of", "ties of"))
    assert second.endswith("  task_arithmetic of merged/v1:0.5, expert1:0.5 on base")
    found = re.search(
        r"  ties of expert0:0.6, expert1:0.4 on base · (\S+)% of \S+ KiB read · bound [1-9]\.\de-\d$", first
    )
    assert found
    assert 30 < float(found[1]) <= 60
    heads = [line for line in lines if "*" in line.split("  ")[0]]
    assert [line.split("  ")[-1] for line in heads[:2]] == ["again", "ada"], "a message that says the same is left out"


@pytest.mark.usefixtures("merged")
def test_the_json_of_merges(call) -> None:
    second, first, *others = call("log", "--json").json
    assert first["merge"]["method"] == "ties"
    assert [expert["parameters"]["weight"] for expert in first["merge"]["experts"]] == [0.6, 0.4]
    assert first["merge"]["experts"][0]["commit"] == first["parents"][1]["commit"]
    assert 0 < first["measured"]["expert_bytes_read"] <= first["merge"]["budget_bytes"]
    assert first["merge"]["bound"]["absolute"] > 0
    assert first["merge"]["id"] == first["plan"]
    assert (second["merge"]["budget_bytes"], second["merge"]["bound"]["update"]) == (None, None)
    assert all(entry["merge"] is None for entry in others)


def head(**changes: object) -> PlanHead:
    """A plan's head, with weights or without."""
    model = ModelHead(hash_bytes(b"m"), "base", "model", None, {}, {})
    fields: dict[str, object] = {
        "id": hash_bytes(b"p"), "method": "slerp", "method_version": 1, "parameters": {"t": 0.5},
        "values": {"t": (0.25, 0.5)}, "base": model, "based": False, "settings": 1, "dtype": None,
        "experts": tuple(ModelHead(hash_bytes(b"e"), name, "model", None, {}, {}) for name in ("a", "b\nc")),
        "budget_bytes": None, "costs": {"expert_bytes": 1, "expert_bytes_full": 3 << 30},
        "bound": {"absolute": 0.0, "relative": 0.0, "estimate": 0.0, "update": None},
    }  # fmt: skip
    return PlanHead(**{**fields, **changes})  # type: ignore[arg-type]


class TestTheLineOfAMerge:
    def test_without_weights_the_method_has_its_parameters(self) -> None:
        assert origin_line(head()) == "slerp (t 0.25..0.5) of a, b c"
        assert default_message(head()) == "slerp of a and b\nc"

    def test_a_weight_that_differs_from_tensor_to_tensor(self) -> None:
        expert = ModelHead(hash_bytes(b"e"), "math", "model", None, {"weight": 0.5}, {"weight": (0.25, 0.5, 1.0)})
        assert origin_line(head(experts=(expert,), based=True)) == "slerp of math:0.25..1 on base"
        assert default_message(head(experts=(expert,))) == "slerp of math:0.5"

    def test_budgets(self) -> None:
        assert origin_line(head(budget_bytes=9)).endswith(" · 3.1e-08% of 3.0 GiB read · equal to the full merge")
        bound = {"absolute": 1.0, "relative": 0.0031, "estimate": 0.5, "update": 300.0}
        costs = {"expert_bytes": 322122547, "expert_bytes_full": 3 << 30}
        assert origin_line(head(bound=bound, costs=costs)).endswith(" · 10% of 3.0 GiB read · bound 3.1e-3")
        assert origin_line(head(budget_bytes=0, costs={"expert_bytes": 0, "expert_bytes_full": 0})).endswith(
            "b c · equal to the full merge"
        )
