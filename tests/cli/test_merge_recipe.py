"""Recipes from the command line: folders in, a ref out; plans, budgets, several documents, adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mergepipe.store import Store
from support.adapters import CONFIG, factors, write_adapter
from support.checkpoints import raw, write_checkpoint
from support.family import base_weights, fine_tune, write_model
from support.merges import tree_of, weights_of
from support.stores import object_files

TIES = """\
models:
  - model: expert0
    parameters: {weight: 0.6, density: 0.3}
  - model: expert1
    parameters: {weight: [0.4, 0.2]}
merge_method: ties
base_model: base
"""
TASK = TIES.replace("ties", "task_arithmetic").replace(", density: 0.3", "")
PLAN = {
    "plan", "method", "experts", "budget_bytes", "expert_bytes", "expert_bytes_full", "base_bytes", "computed_blocks",
    "referenced_blocks", "bound",
}  # fmt: skip
MERGE = {
    "ref", "commit", "plan", "budget_bytes", "expert_bytes_read", "base_bytes_read", "written_bytes",
    "computed_blocks", "cached_blocks", "referenced_blocks", "elapsed_seconds", "peak_memory_bytes", "unchanged",
}  # fmt: skip
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def write(here: Path) -> Callable[[str], str]:
    def to_file(text: str, name: str = "recipe.yml") -> str:
        (here / name).write_text(text)
        return name

    return to_file


def trees(store: Path, *refs: str) -> list[bytes]:
    with Store.open(store) as opened:
        return [tree_of(opened, ref) for ref in refs]


@pytest.mark.parametrize("text", [TIES, TASK], ids=["ties", "task_arithmetic"])
def test_a_recipe_and_its_plan_give_one_tree(call, filled: Path, write: Callable[..., str], text: str) -> None:
    call("merge", write(text), "--as", "merged/direct")
    planned = call("plan", "recipe.yml", "-o", "p.json").out
    assert "written to p.json: mp merge --plan p.json --as NAME" in planned
    call("merge", "--plan", "p.json", "--as", "merged/planned", "--no-cache")
    one, other, expert = trees(filled, "merged/direct", "merged/planned", "expert0")
    assert one == other != expert
    assert call("merge", "--plan", "p.json", "--as", "merged/again", "--json").json["computed_blocks"] == 0
    with Store.open(filled) as store:
        commits = [store.commit(store.resolve(ref)) for ref in ("merged/direct", "merged/planned")]
    assert commits[0].plan == commits[1].plan
    assert [(parent.role, parent.name) for parent in commits[0].parents] == [
        ("base", "base"), ("expert", "expert0"), ("expert", "expert1"),
    ]  # fmt: skip


def test_the_same_from_options(call, filled: Path, write: Callable[..., str]) -> None:
    text = TASK.replace("[0.4, 0.2]", "0.4")
    call("merge", write(text), "--as", "recipe")
    words = ["--base", "base", "--expert", "expert0:0.6", "--expert", "expert1:0.4", "--method", "task_arithmetic"]
    call("plan", *words, "-o", "p.json")
    call("merge", "--plan", "p.json", "--as", "options")
    one, other = trees(filled, "recipe", "options")
    assert one == other


def test_folders_are_ingested_once(call, here: Path, family: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first merge makes a store and stores the models; the second reads no file of theirs."""
    text = TIES
    for name in ("expert0", "expert1", "base"):
        text = text.replace(f"model: {name}", f"model: {family / name}")
    first = call("merge", write(text), "--as", "merged")
    assert "made a store" in first.err
    for name in ("base", "expert0", "expert1"):
        assert f"was ingested as {name}" in first.err
    parents = {ref["ref"]: ref for ref in call("ls", "--json").json}
    assert set(parents) == {"base", "expert0", "expert1", "merged"}
    assert call("show", "expert0", "--json").json["stored_bytes"] < call("show", "base", "--json").json["stored_bytes"]
    monkeypatch.setattr(Store, "ingest", None)
    with Store.open(here) as store:
        files = object_files(store)
    second = call("merge", "recipe.yml", "--as", "merged", "--json")
    assert second.json["unchanged"]
    assert second.json["cached_blocks"] > 0 == second.json["computed_blocks"] == second.json["expert_bytes_read"]
    assert "ingested" not in second.err
    with Store.open(here) as store:
        assert object_files(store) == files


def test_a_folder_that_changed_is_read_again(call, here: Path, write: Callable[..., str]) -> None:
    """Paths are looked for beside the recipe first; a ref of that name would come before them."""
    folder = here / "deep" / "models"
    write_model(folder / "one", base_weights())
    write_model(folder / "two", fine_tune(base_weights(), 1))
    text = "models:\n- model: ./models/two\n- model: models/one\nmerge_method: linear\nbase_model: models/one\n"
    write(text, "deep/recipe.yml")
    call("merge", "deep/recipe.yml", "--as", "before")
    write_model(folder / "two", fine_tune(base_weights(), 2, scale=0.1))
    call("merge", "deep/recipe.yml", "--as", "after")
    before, after = trees(here, "before", "after")
    assert before != after
    assert len(call("log", "two", "--json").json) == 3  # base, before, after


def test_a_budget_is_held_and_audited(call, filled: Path, write: Callable[..., str]) -> None:
    full = call("plan", write(TASK), "--json").json
    assert set(full) >= PLAN
    assert full["bound"]["absolute"] == 0
    planned = call("plan", "recipe.yml", "--budget", "20%", "--json").json
    found = call("merge", "recipe.yml", "--as", "cheap", "--budget", "20%", "--audit", "--json").json
    assert set(found) >= MERGE | {"audit"}
    assert found["plan"] == planned["plan"]
    assert 0 < found["expert_bytes_read"] == planned["expert_bytes"] <= found["budget_bytes"]
    assert found["budget_bytes"] == int(0.2 * full["expert_bytes_full"])
    audit = found["audit"]
    assert audit["holds"]
    assert 0 < audit["deviation"] <= audit["bound"] == planned["bound"]["absolute"]
    assert audit["read_bytes"] >= full["expert_bytes_full"]
    call("merge", "recipe.yml", "--as", "full")
    with Store.open(filled) as store:
        cheap, whole, base = (weights_of(store, ref) for ref in ("cheap", "full", "base"))
    off = {name: cheap[name].astype(np.float64) - whole[name].astype(np.float64) for name in base}
    moved = {name: whole[name].astype(np.float64) - base[name].astype(np.float64) for name in base}
    distance = np.sqrt(sum((array**2).sum() for array in off.values()))
    assert distance == pytest.approx(audit["deviation"], rel=0.05)  # that is before rounding to bfloat16
    assert audit["relative"] == pytest.approx(audit["deviation"] / audit["update"])
    assert audit["update"] == pytest.approx(np.sqrt(sum((array**2).sum() for array in moved.values())), rel=0.05)
    text = call("merge", "recipe.yml", "--as", "cheap", "--budget", "20%", "--audit").out
    assert "within the bound" in text
    assert " allowed, " in text
    exact = call("merge", "recipe.yml", "--as", "full", "--audit").out
    assert "the deviation is 0" in exact


def test_a_largest_error_is_kept(call, filled: Path, write: Callable[..., str]) -> None:  # noqa: ARG001
    found = call("plan", write(TASK), "--max-error", "0.5", "--json").json
    assert 0 < found["bound"]["relative"] <= 0.5
    assert 0 < found["expert_bytes"] < found["expert_bytes_full"]


def test_a_dry_run_shows_the_plan_and_merges_nothing(call, filled: Path, write: Callable[..., str]) -> None:
    with Store.open(filled) as store:
        before = object_files(store)
    shown = call("merge", write(TIES), "--dry-run").out
    assert shown.startswith("plan ")
    assert "equal to the merge that reads everything" in shown
    value = call("merge", "recipe.yml", "--dry-run", "--json", "--as", "unused").json
    assert value == call("plan", "recipe.yml", "-o", "p.json", "--json").json
    assert value == call("merge", "--plan", "p.json", "--dry-run", "--json").json
    with Store.open(filled) as store:
        assert object_files(store) == before
    assert {ref["ref"] for ref in call("ls", "--json").json} == {"base", "expert0", "expert1"}


def test_what_some_models_lack(call, filled: Path, write: Callable[..., str]) -> None:
    """With --allow-missing a tensor is merged from the models that have it; one that only the base has is its own."""
    weights = fine_tune(base_weights(), 5)
    del weights[f"{UP}.weight"], weights["lm_head.weight"]
    call("ingest", write_model(filled / "short", weights), "--base", "base")
    text = TASK.replace("expert1", "short")
    call("merge", write(text), "--as", "merged", code=4)
    call("merge", "recipe.yml", "--as", "merged", "--allow-missing")
    call("merge", write("".join(text.splitlines(True)[:3]) + text[text.index("merge_method") :]), "--as", "alone")
    with Store.open(filled) as store:
        merged, alone = (store.snapshot(ref).tensors for ref in ("merged", "alone"))
    assert merged.keys() == alone.keys()
    assert merged[f"{UP}.weight"].blocks == alone[f"{UP}.weight"].blocks
    other = "model.layers.0.mlp.up_proj.weight"
    assert merged[other].blocks != alone[other].blocks


def test_documents_that_feed_each_other(call, filled: Path, write: Callable[..., str]) -> None:
    text = f"name: both\n{TASK}---\nname: third\nmodels:\n- model: expert1\nmerge_method: passthrough\n---\n"
    text += "models:\n- model: both\n- model: third\nmerge_method: linear\nparameters: {weight: 0.5}\n"
    answer = call("plan", write(text), code=4)
    assert "needs the result of 'both', which is not merged yet" in answer.err
    found = call("merge", "recipe.yml", "--as", "all", "--json").json
    assert found["ref"] == "all"
    assert [earlier["ref"] for earlier in found["earlier"]] == ["all.both", "all.third"]
    refs = {ref["ref"]: ref["commit"] for ref in call("ls", "--json").json}
    assert {"all", "all.both", "all.third"} <= set(refs)
    parents = [(parent["role"], parent["commit"]) for parent in call("show", "all", "--json").json["parents"]]
    assert [commit for role, commit in parents if role == "expert"] == [refs["all.both"], refs["all.third"]]
    call("merge", write(TASK), "--as", "by-hand")
    one, other = trees(filled, "all.both", "by-hand")
    assert one == other
    lines = call("merge", write(text), "--as", "all").out
    assert lines.count(" as it was") == 3


def lora(here: Path) -> np.ndarray:
    """An adapter folder on the family's base; returns the delta that it stands for."""
    (here / "lora").mkdir()
    tensors = {name: array * np.float32(0.05) for name, array in factors(UP, 128, 64).items()}
    write_adapter(here / "lora", tensors, CONFIG)
    a, b = (next(array for name, array in tensors.items() if f"lora_{side}" in name) for side in "AB")
    return np.asarray(b @ a * (CONFIG["lora_alpha"] / CONFIG["r"]))


def test_an_adapter_as_an_expert(call, filled: Path, write: Callable[..., str]) -> None:
    """``--expert lora:0.5`` and ``base+lora`` in a recipe: half of what the adapter adds, for the adapter's bytes."""
    delta = lora(filled)
    call("ingest", "lora")
    words = ["--base", "base", "--method", "task_arithmetic", "--dtype", "float32", "--expert", "lora:0.5"]
    planned = call("plan", *words, "-o", "p.json", "--json").json
    stored = call("show", "lora", "--json").json["stored_bytes"]
    assert 0 < planned["expert_bytes"] <= stored
    found = call("merge", "--plan", "p.json", "--as", "options", "--json").json
    assert found["expert_bytes_read"] == planned["expert_bytes"]
    recipe = "models:\n- model: base+lora\nmerge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 0.5}\n"
    call("merge", write(recipe + "dtype: float32\n"), "--as", "recipe")
    with Store.open(filled) as store:
        base, *merged = (weights_of(store, ref) for ref in ("base", "options", "recipe"))
    for weights in merged:
        for name, array in weights.items():
            wanted = base[name].astype(np.float32) + (delta / 2 if name == f"{UP}.weight" else 0)
            np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-6)


def test_a_task_vector_as_an_expert(call, filled: Path) -> None:
    """Deltas saved alone: ``as=task_vector``; what it lacks stays the base's."""
    delta = np.random.default_rng(3).standard_normal((128, 64)).astype(np.float32) * np.float32(0.01)
    call("ingest", write_checkpoint(filled / "tv", {f"{UP}.weight": raw(delta)}), "--base", "base")
    words = ["plan", "--base", "base", "--method", "task_arithmetic", "--dtype", "float32", "-o", "p.json"]
    call(*words, "--expert", "tv:0.5,as=task_vector")
    call("merge", "--plan", "p.json", "--as", "merged")
    with Store.open(filled) as store:
        base, merged = (weights_of(store, ref) for ref in ("base", "merged"))
    for name, array in merged.items():
        wanted = base[name].astype(np.float32) + (delta / 2 if name == f"{UP}.weight" else 0)
        np.testing.assert_array_equal(array, wanted)
    assert "is missing" in call(*words, "--expert", "tv:0.5", code=4).err
    assert "no adapter_config.json" in call(*words, "--expert", "tv:0.5,as=adapter", code=4).err
    assert "kept as one of" in call(*words, "--expert", "tv:0.5,as=vector", code=2).err


def test_what_the_log_says(call, filled: Path, write: Callable[..., str]) -> None:  # noqa: ARG001
    call("merge", write(TASK), "--as", "merged", "-m", "why not")
    entry = call("log", "merged", "--json", "-n", "1").json[0]
    assert (entry["kind"], entry["message"], entry["author"]) == ("merge", "why not", "ada")
    call("merge", "recipe.yml", "--as", "other")
    assert call("log", "other", "--json", "-n", "1").json[0]["message"].startswith("task_arithmetic of expert0:0.6 and")
