"""``mp blame``: a table for a tensor, a line for each of several, and the same as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergepipe.merge import execute, read_plan
from mergepipe.store import Store

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.usefixtures("merged")
def test_a_tensor_of_a_merge(call) -> None:
    (tensor,) = call("blame", "merged/v1", UP, "--json").json["tensors"]
    assert (tensor["method"], tensor["blocks"], tensor["base"]["name"]) == ("ties", 4, "base")
    assert [expert["name"] for expert in tensor["experts"]] == ["expert0", "expert1"]
    assert [index for run in tensor["runs"] for index in range(run["first"], run["last"] + 1)] == [0, 1, 2, 3]
    lines = call("blame", "merged/v1", UP).out.splitlines()
    assert lines[0].startswith("merge ")
    assert lines[0].endswith(" (merged/v1): ties")
    assert lines[1] == f"{UP}  BF16  128 × 64, 4 blocks of 32 × 64"  # noqa: RUF001
    assert lines[2].split("  ")[0] == "blocks"
    for run, line in zip(tensor["runs"], lines[3:], strict=True):
        span = str(run["first"]) if run["first"] == run["last"] else f"{run['first']}-{run['last']}"
        assert line.split()[0] == span
        assert ("computed on base" in line) == (run["origin"] == "computed")
        assert (", ".join(run["reached"]) or ", ".join(run["left_out"])) in line


@pytest.mark.usefixtures("merged")
def test_a_line_for_each(call) -> None:
    found = call("blame", "merged/v1", "model.layers.*", "--json").json["tensors"]
    assert len(found) == 9
    lines = call("blame", "merged/v1", "model.layers.*").out.splitlines()
    assert len(lines) == 11
    for tensor, line in zip(found, lines[2:], strict=True):
        name, blocks, computed, *_ = line.split()
        counted = sum(run["last"] + 1 - run["first"] for run in tensor["runs"] if run["origin"] == "computed")
        assert (name, int(blocks), int(computed)) == (tensor["name"], tensor["blocks"], counted)
        if counted and "mlp" in name:
            assert f"expert0 {counted}/4, expert1 {counted}/4" in line


@pytest.mark.usefixtures("merged")
def test_what_was_ingested(call) -> None:
    ids = {name: call("show", name, "--json").json["commit"] for name in ("base", "expert0")}
    (tensor,) = call("blame", "expert0", "lm_head.weight", "--json").json["tensors"]
    assert [(run["first"], run["last"], run["commit"]) for run in tensor["runs"]] == [(0, 3, ids["base"])]
    assert f"0-3     {ids['base'][:12]} (base)" in call("blame", "expert0", "lm_head.weight").out
    lines = call("blame", "expert0", "*").out
    assert f"{UP:<40}" in lines
    assert f"{ids['expert0'][:12]} (expert0)" in lines


@pytest.mark.usefixtures("merged")
def test_through_an_earlier_merge(call) -> None:
    answer = call("blame", "merged/v2", UP, "--deep", "--json").json
    ids = {name: call("show", name, "--json").json["commit"] for name in ("base", "expert0", "expert1", "merged/v1")}
    assert {tensor["commit"] for tensor in answer["behind"]} == set(ids.values())
    out = call("blame", "merged/v2", UP, "--deep").out
    assert "(merged/v2): task_arithmetic" in out
    assert "(merged/v1): ties" in out
    assert "ingest" not in out, "what is its own is not said twice"
    assert call("blame", "merged/v2", UP, "--json").json["behind"] == []
    assert "(merged/v1): ties" in call("blame", "merged/v2", "model.layers.1.*", "--deep").out


@pytest.mark.usefixtures("merged")
def test_names_that_are_not_there(call) -> None:
    assert UP in call("blame", "merged/v1", UP.replace("proj", "prj"), code=3).err
    assert "mp ls merged/v1" in call("blame", "merged/v1", "zzz*", code=3).err
    call("blame", "nothing", UP, code=3)


def test_names_with_line_breaks(call, merged: Path) -> None:
    """A plan's names are any text; they cannot add lines."""
    call("plan", "--base", "base", "--expert", "expert0:1", "--method", "task_arithmetic", "-o", "p.json")
    text = (merged / "p.json").read_text()
    (merged / "p.json").write_text(text.replace('"name": "expert0"', '"name": "two\\nlines\\u001b[2J"'))
    with Store.open(merged) as store:
        execute(store, read_plan(merged / "p.json"), "odd", message="plain")
    for words in (
        ["blame", "odd", UP],
        ["blame", "odd", "model.*"],
        ["log", "odd", "-n1", "--graph"],
        ["log", "odd", "-n1"],
    ):
        out = call(*words).out
        assert "\x1b" not in out
        assert any("two lines" in line for line in out.splitlines())
