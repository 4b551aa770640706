"""``mp show`` of a merge: what its plan says beside what it cost, and the plan as a file again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergepipe.merge import decode_plan
from mergepipe.store import Store
from mergepipe.store.commits import Commit, Parent
from mergepipe.store.frame import Kind
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.staging import Staging
from support.processes import run_python
from support.stores import object_path


@pytest.mark.usefixtures("merged")
def test_a_merge_in_words(call) -> None:
    shown = call("show", "merged/v1", "--json").json
    out = call("show", "merged/v1").out
    plan, measured = shown["plan"], shown["measured"]
    for id_ in (shown["commit"], shown["tree"], plan["id"]):
        assert id_ in out
    for model in (plan["base"], *plan["experts"]):
        assert model["commit"][:12] in out
    assert re.search(r"method +ties, version 2 \(exact false, lambda 1, normalize true, rescale false\)", out)
    assert re.search(r"expert expert0 +[0-9a-f]{12} \(weight 0.6, density 0.3\)", out)
    assert re.search(r"bound +at most .* \(L2\) from the full merge, [1-9]\.\de-\d+ of its update", out)
    counts = (plan["costs"]["computed_blocks"], measured["computed_blocks"])
    assert re.search(r"blocks computed +{} +{}\n".format(*counts), out)
    assert counts[0] == counts[1] > 0
    assert "mp show merged/v1 --plan -o" in out


@pytest.mark.usefixtures("merged")
def test_the_json_of_a_merge(call) -> None:
    plan = call("show", "merged/v1", "--json").json["plan"]
    assert plan["method"] == "ties"
    assert [(expert["name"], expert["parameters"]) for expert in plan["experts"]] == [
        ("expert0", {"density": 0.3, "weight": 0.6}),
        ("expert1", {"density": 0.3, "weight": 0.4}),
    ]
    assert plan["budget_bytes"] > plan["costs"]["expert_bytes"] * 0.5
    assert 0 < plan["bound"]["relative"] < 1
    assert plan["settings"] == 1
    assert "tensors" not in plan
    assert call("show", "base", "--json").json["plan"] is None


@pytest.mark.usefixtures("merged")
def test_a_full_merge_is_called_so(call) -> None:
    out = call("show", "merged/v2").out
    assert "equal to the merge that reads everything" in out
    assert "budget" not in out


def test_the_plan_runs_again(call, merged: Path) -> None:
    shown = call("show", "merged/v1", "--json").json
    written = call("show", "merged/v1", "--plan", "-o", "p.json", "--json").json
    assert written == {"plan": shown["plan"]["id"], "file": "p.json"}
    assert call("show", "merged/v1", "--plan").out == (merged / "p.json").read_text()
    again = call("merge", "--plan", "p.json", "--as", "again", "--json").json
    assert again["plan"] == shown["plan"]["id"]
    assert call("show", "again", "--json").json["tree"] == shown["tree"]


def test_the_plan_as_the_engine_writes_it(call, merged: Path) -> None:
    """Two writers of one format: this holds them together."""
    call("show", "merged/v1", "--plan", "-o", "p.json")
    decode_plan((merged / "p.json").read_bytes(), "p.json").write(merged / "q.json")
    assert (merged / "p.json").read_bytes() == (merged / "q.json").read_bytes()


@pytest.mark.usefixtures("merged")
def test_where_there_is_no_plan(call, here: Path) -> None:
    assert "no merge" in call("show", "base", "--plan", code=3).err
    assert "--plan" in call("show", "merged/v1", "-o", "p.json", code=2).err
    assert "--plan" in call("show", "merged/v1:config.json", "--plan", code=2).err
    (here / "folder").mkdir()
    call("show", "merged/v1", "--plan", "-o", "folder", code=8)


def test_a_plan_that_cannot_be_read(call, merged: Path) -> None:
    """The commit is shown all the same, and its log; asked for the plan itself, it is damage."""
    with Store.open(merged) as store:
        plan = store.commit(store.resolve("merged/v1")).plan
        assert plan is not None
        object_path(store, plan).unlink()
    shown = call("show", "merged/v1", "--json").json
    assert set(shown["plan"]) == {"id", "error"}
    assert "cannot be read" in call("show", "merged/v1").out
    assert "base: base" in call("log", "merged/v1", "--graph").out
    assert call("log", "merged/v1", "-n", "1", "--json").json[0]["merge"] is None
    call("show", "merged/v1", "--plan", code=5)


@pytest.mark.parametrize(
    "record", [b"{}", b"[]", b'{"format":1}', b'{"format":2}', b'{"format":2,"experts":[7]}', b"\xff"]
)
def test_a_record_that_is_no_plan(call, filled: Path, record: bytes) -> None:
    with Store.open(filled) as store:
        tree, base = store.snapshot("base").commit.tree, store.resolve("base")
        with Staging(store.layout, store.catalog) as staging:
            plan = staging.add_record(Kind.PLAN, record)
            commit = Commit(tree, (Parent(base, "base", "base"),), "merge", "odd", "ada", "no time", "test", plan)
            staging.add_record(Kind.COMMIT, commit.encode())
            publish(store.catalog, staging, Changes([commit], [RefUpdate("odd", None, commit.id)]))
    assert "cannot be read" in call("show", "odd").out
    assert "base: base" in call("log", "odd", "--graph").out
    call("export", "odd", "out")
    assert not (filled / "out" / "README.md").exists()


@pytest.mark.parametrize(
    "words", [["show", "merged/v1"], ["show", "merged/v1", "--plan"], ["log", "--graph"]], ids=" ".join
)
@pytest.mark.usefixtures("merged")
def test_plans_are_read_without_the_engine(words: list[str]) -> None:
    code = """
        import sys
        from mergepipe.cli.app import main
        assert main(sys.argv[1:]) == 0
        heavy = {"numpy", "torch", "numba", "zarr", "mergepipe.merge"}
        print("\\nloaded:", sorted(heavy & set(sys.modules)))
    """
    assert run_python(code, *words).splitlines()[-1] == "loaded: []"
