"""The main job as a user types it, with the installed command: each step is a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from support.checkpoints import folder_bytes


def test_the_main_job(mp, here: Path, family: Path) -> None:
    assert "made a store" in mp("ingest", family / "base").err
    mp("ingest", family / "expert0", family / "expert1", "--base", "base")
    assert [line.split()[0] for line in mp("ls").out.splitlines()] == ["ref", "base", "expert0", "expert1"]

    plan = mp(
        *("plan", "--base", "base", "--expert", "expert0:0.6", "--expert", "expert1:0.4"),
        *("--method", "task_arithmetic", "--budget", "60%", "-o", "p.json", "--json"),
    ).json
    assert plan["expert_bytes"] <= plan["budget_bytes"] < plan["expert_bytes_full"]
    result = mp("merge", "--plan", "p.json", "--as", "merged/v1", "--json").json
    assert 0 < result["expert_bytes_read"] <= result["budget_bytes"]

    newest = mp("log", "merged/v1", "-n", "1", "--json").json[0]
    assert newest["commit"] == result["commit"]
    assert [parent["role"] for parent in newest["parents"]] == ["base", "expert", "expert"]
    assert newest["plan"] == plan["plan"]
    assert mp("log", "merged/v1", "--graph").out.startswith("*  ")

    shown = mp("show", "merged/v1").out
    assert "task_arithmetic" in shown
    assert "expert expert0" in shown
    assert mp("show", "merged/v1", "--json").json["plan"]["id"] == plan["plan"]
    changed = {change["name"] for change in mp("diff", "base", "merged/v1", "--json").json["tensors"]}
    assert changed

    mp("export", "merged/v1", "out")
    before, after = load_file(family / "base" / "model.safetensors"), load_file(here / "out" / "model.safetensors")
    assert {name for name in before if not np.array_equal(before[name], after[name])} == changed
    mp("export", "expert0", "again")
    assert folder_bytes(here / "again") == folder_bytes(family / "expert0")
    mp("verify")


@pytest.mark.usefixtures("filled")
def test_exit_codes_of_the_installed_command(mp) -> None:
    mp("--help")
    mp(code=0)
    mp("nonsense", code=2)
    mp("log", "nothing", code=3)
    mp("ingest", ".", code=4)
    mp("branch", "expert0", "base", code=6)
    assert mp("log", "nothing", "--json", code=3).error["error"] == "not_found"
    assert mp("ls", MP_STORE="nowhere", code=3).out == ""
