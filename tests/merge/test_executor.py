"""Carrying out plans: the bytes that were promised, the blocks that were touched, one commit or nothing."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergepipe.merge import Plan, decode_plan, execute
from mergepipe.merge.executor import describe
from mergepipe.store import Digest, Store
from mergepipe.store.commits import Parent
from mergepipe.store.errors import BudgetError, ConflictError, DamagedError, NotFoundError, UsageError
from mergepipe.store.frame import Kind
from mergepipe.store.publish import Changes, RefUpdate, publish
from support.family import base_weights, fine_tune
from support.merges import (
    FAMILIES,
    METHODS,
    assert_as_planned,
    bits,
    blocks_of,
    ingest_family,
    ingest_model,
    make_plan,
    merge,
    weights_of,
    without_weights,
)
from support.processes import run_python
from support.stores import assert_clean, catalog_rows, object_files, object_path, objects_of, state_of, writers_left

WEIGHTS = {"math": 0.75, "code": 0.5}
UP = "model.layers.1.mlp.up_proj.weight"


def planned_blocks(store: Store, plan: Plan) -> tuple[set[Digest], set[Digest]]:
    """The base's and the experts' blocks that a plan needs, by its reads alone (nothing is converted)."""
    base, experts = set(), set()
    entries = store.snapshot_of(plan.base.commit).tensors
    for name, tensor in plan.tensors.items():
        for expert, indices in zip(plan.experts, tensor.reads, strict=True):
            theirs = store.snapshot_of(expert.commit).entry(name)
            base |= {entries[name].blocks[index] for index in indices}
            experts |= {theirs.blocks[index] for index in indices}
    return base, experts


@pytest.mark.parametrize("dtype", [None, "F32"])
@pytest.mark.parametrize("budget", [None, "0", "15%", "50%", "100%"])
@pytest.mark.parametrize("method", FAMILIES)
def test_what_is_measured_is_what_was_planned(
    shared_family: Store, method: str, budget: str | None, dtype: str | None
) -> None:
    plan = make_plan(shared_family, method, WEIGHTS, budget=budget, dtype=dtype)
    result = execute(shared_family, plan, "merged", use_cache=False)
    assert_as_planned(plan, result)


CHILD = """
    import os, sys
    opened = []

    def hook(event, arguments):
        if event == "open" and recording and arguments[1] is not None and "/objects/" in str(arguments[0]):
            opened.append(str(arguments[0]))

    recording = False
    sys.addaudithook(hook)
    from mergepipe.merge import execute
    from mergepipe.store import Store
    from support.merges import FAMILIES, make_plan
    with Store.open(sys.argv[1]) as store:
        base = {store.layout.object_path(b) for e in store.snapshot("base").tensors.values() for b in e.blocks}
        blocks = {
            store.layout.object_path(b)
            for ref in ("math", "code")
            for e in store.snapshot(ref).tensors.values()
            for b in e.blocks
        } - base
        for method, budget in [(method, budget) for method in FAMILIES for budget in (None, "35%")]:
            plan = make_plan(store, method, {"math": 0.75, "code": 0.5}, budget=budget)
            opened.clear()
            recording = True
            result = execute(store, plan, method, use_cache=False)
            recording = False
            measured = [sum(os.stat(path).st_size for path in opened if path in kind) for kind in (blocks, base)]
            assert measured == [result.expert_bytes_read, result.base_bytes_read], (method, measured, result)
            assert 0 < measured[0] <= (plan.budget_bytes or measured[0])
"""


def test_the_files_that_are_opened_have_the_measured_bytes(shared_family: Store) -> None:
    """Counted from outside of the reader: each file that Python opens below ``objects/``."""
    run_python(CHILD, shared_family.layout.root)


KEEPING = [name for name in FAMILIES if name not in ("nuslerp", "karcher")]  # these compute all places of a tensor


@pytest.mark.parametrize("method", KEEPING)
def test_nothing_else_is_read(hurt_family: Store, method: str) -> None:
    """Without all other blocks' files the merge is the same."""
    plan = make_plan(hurt_family, method, WEIGHTS, budget="35%")
    wanted = execute(hurt_family, plan, "wanted", use_cache=False)
    base, experts = planned_blocks(hurt_family, plan)
    kept = base | experts | set(objects_of(hurt_family, Kind.NODE))
    assert without_weights(hurt_family, kept) > 20
    again = execute(hurt_family, plan, "again", use_cache=False)
    assert hurt_family.commit(again.commit).tree == hurt_family.commit(wanted.commit).tree


@pytest.mark.parametrize("method", KEEPING)
def test_blocks_that_nothing_touches_are_the_bases_own(family: Store, method: str) -> None:
    """Referred to and not written: the new objects are the computed blocks, the tree's nodes, the plan, the commit."""
    plan = make_plan(family, method, WEIGHTS, budget="35%")
    before = object_files(family)
    blocks_before = set(objects_of(family, Kind.BLOCK))
    result = execute(family, plan, "merged", use_cache=False)
    new = set(object_files(family)) - set(before)
    new_blocks = set(objects_of(family, Kind.BLOCK)) - blocks_before
    ours, bases = blocks_of(family, "merged"), blocks_of(family, "base")
    computed = 0
    for name in bases:
        reads = plan.tensors[name].reads if name in plan.tensors else ()
        touched = {index for indices in reads for index in indices}
        for index, (block, base) in enumerate(zip(ours[name], bases[name], strict=True)):
            assert (block == base) == (index not in touched), (name, index)
        computed += len(touched)
    assert computed == result.computed_blocks == len(new_blocks)
    assert sum(map(len, ours.values())) - computed == result.referenced_blocks
    assert sum(object_files(family)[digest] for digest in new) == result.written_bytes
    kinds = {kind: len(set(map(str, objects_of(family, kind))) & new) for kind in (Kind.PLAN, Kind.COMMIT, Kind.FILE)}
    assert kinds == {Kind.PLAN: 1, Kind.COMMIT: 1, Kind.FILE: 0}


@pytest.mark.parametrize("method", FAMILIES)
def test_a_full_budget_is_the_full_merge(shared_family: Store, method: str) -> None:
    free = execute(shared_family, make_plan(shared_family, method, WEIGHTS), "free", use_cache=False)
    full = execute(shared_family, make_plan(shared_family, method, WEIGHTS, budget="100%"), "full", use_cache=False)
    given = {"exact": True} if method == "ties" else {}  # asked for, so that a bound does not give it up
    bounded = make_plan(shared_family, method, WEIGHTS, max_error=0.0, **given)
    exact = execute(shared_family, bounded, "exact", use_cache=False)
    assert bounded.bound.update
    trees = {shared_family.commit(result.commit).tree for result in (free, full, exact)}
    assert len(trees) == 1


def test_no_budget_at_all_is_the_base(shared_family: Store) -> None:
    for method in KEEPING:
        result = execute(
            shared_family, make_plan(shared_family, method, WEIGHTS, budget="0"), "merged", use_cache=False
        )
        assert shared_family.commit(result.commit).tree == shared_family.commit(shared_family.resolve("base")).tree
        assert result.expert_bytes_read == result.base_bytes_read == result.computed_blocks == 0


def test_a_commit_says_what_it_was_made_from(family: Store) -> None:
    plan = make_plan(family, "ties", {"math": 0.75, "code": {"weight": 0.5, "density": 0.5}}, budget="50%")
    first = execute(family, plan, "merged/v1", message="a half", author="ann")
    commit = family.commit(first.commit)
    assert family.resolve("merged/v1") == first.commit
    assert commit.parents == (
        Parent(family.resolve("base"), "base", "base"),
        Parent(family.resolve("math"), "expert", "math"),
        Parent(family.resolve("code"), "expert", "code"),
    )
    assert (commit.kind, commit.message, commit.author) == ("merge", "a half", "ann")
    assert commit.plan == first.plan == plan.id
    stored = family.reader.read_record(Kind.PLAN, plan.id)
    assert stored == plan.encode()
    assert decode_plan(stored, "the plan's object") == plan
    measured = {name: value for name, value in commit.measured.items() if name != "elapsed_seconds"}
    assert measured == {
        "expert_bytes_read": plan.costs.expert_bytes,
        "base_bytes_read": plan.costs.base_bytes,
        "written_bytes": measured["written_bytes"],
        "computed_blocks": plan.costs.computed_blocks,
        "cached_blocks": 0,
        "referenced_blocks": plan.costs.referenced_blocks,
    }
    second = execute(family, make_plan(family, "linear", {"math": 1.0}), "merged/v1")
    assert family.commit(second.commit).parents[0] == Parent(first.commit, "previous", "merged/v1")
    assert family.commit(second.commit).message == "linear of math:1", "an average has no base"


def test_descriptions(shared_family: Store) -> None:
    plan = make_plan(shared_family, "ties", {"math": 0.75, "code": -0.5})
    assert describe(plan) == "ties of math:0.75 and code:-0.5 on base"
    assert describe(replace(plan, experts=(*plan.experts, plan.experts[0]))) == (
        "ties of math:0.75, code:-0.5 and math:0.75 on base"
    )


def test_files_come_from_the_base(shared_family: Store) -> None:
    merge(shared_family, "linear", WEIGHTS)
    assert shared_family.snapshot("merged").files == shared_family.snapshot("base").files
    assert shared_family.snapshot("merged").read_file("config.json") == shared_family.snapshot("base").read_file(
        "config.json"
    )


@pytest.mark.parametrize("dtype", [None, "F32", "F16"])
def test_an_export_holds_the_merged_tensors(family: Store, tmp_path: Path, dtype: str | None) -> None:
    merge(family, "task_arithmetic", WEIGHTS, dtype=dtype)
    family.snapshot("merged").export(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = weights_of(family, "merged")
    assert set(found) == set(expected)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        assert array.shape == expected[name].shape
        assert bits(array) == bits(expected[name])


def test_a_tag_does_not_move(family: Store) -> None:
    commit = family.resolve("base")
    publish(family.catalog, None, Changes(refs=[RefUpdate("v1", None, commit, "tag", "tag", "ann")]))
    plan = make_plan(family, "linear", {"math": 1.0})
    before = state_of(family)
    with pytest.raises(ConflictError, match="'v1' is a tag") as caught:
        execute(family, plan, "v1")
    assert "--as" in str(caught.value.hint)
    assert state_of(family) == before


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/abs", "a b", "a~1", "x" * 300, "a.lock", "-f"])
def test_a_name_that_no_ref_can_have(shared_family: Store, name: str) -> None:
    plan = make_plan(shared_family, "linear", {"math": 1.0})
    before = state_of(shared_family)
    with pytest.raises(UsageError, match="cannot be a ref's name"):
        execute(shared_family, plan, name)
    assert state_of(shared_family) == before


def test_a_plan_of_another_store(family: Store, make_store: Any, tmp_path: Path) -> None:
    other = make_store()
    ingest_model(other, tmp_path / "other", "base", base_weights(seed=9))
    with pytest.raises(NotFoundError, match="which is not in this store"):
        execute(other, make_plan(family, "linear", {"math": 1.0}), "merged")


class StoppedError(Exception):
    """What a callback raises in these tests."""


def test_a_ref_that_moves_meanwhile_is_a_conflict(family: Store) -> None:
    """Whoever moved it keeps it; the merge is not published."""
    execute(family, make_plan(family, "linear", {"math": 1.0}), "merged")
    seen, other = family.resolve("merged"), family.resolve("code")
    plan = make_plan(family, "ties", WEIGHTS)
    moved: list[int] = []

    def progress(_stage: str, done: int, _total: int) -> None:
        if not moved:
            moved.append(done)
            publish(family.catalog, None, Changes(refs=[RefUpdate("merged", seen, other, "branch", "moved", "bob")]))

    with pytest.raises(ConflictError, match=r"was .* and is now") as caught:
        execute(family, plan, "merged", progress=progress)
    assert seen.short in caught.value.message
    assert other.short in caught.value.message
    assert family.resolve("merged") == other
    assert writers_left(family) == []
    again = execute(family, plan, "merged")
    assert (again.computed_blocks, again.cached_blocks) == (0, plan.costs.computed_blocks), "the blocks are kept"
    assert family.commit(family.resolve("merged")).parents[0].commit == other


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock"])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupted_merge_shows_nothing(family: Store, workers: int, method: str) -> None:
    """No ref, no commit; blocks that were published already are those of the result."""
    plan = make_plan(family, method, WEIGHTS)
    before, blocks = visible(family), set(objects_of(family, Kind.BLOCK))

    def progress(_stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        execute(family, plan, "merged", workers=workers, progress=progress)
    assert visible(family) == before
    assert writers_left(family) == []
    left = set(objects_of(family, Kind.BLOCK)) - blocks
    execute(family, plan, "merged")
    assert left <= {block for blocks in blocks_of(family, "merged").values() for block in blocks}


def visible(store: Store) -> dict[str, dict[bytes, bytes]]:
    return catalog_rows(store, "refs", "commits", "children", "reflog")


def test_more_bytes_than_the_budget_fail_the_merge(hurt_family: Store) -> None:
    """The catalog says of a block that it is smaller than its file is: the plan believes it, the measuring does not."""
    block = hurt_family.snapshot("code").entry(UP).blocks[0]
    with hurt_family.catalog.reading() as view:
        row = view.object_row(block)
    assert row is not None
    smaller = replace(row, stored_bytes=row.stored_bytes - 1)
    hurt_family.catalog.write(lambda view: view.put("objects", block, smaller.pack()))
    plan = make_plan(hurt_family, "linear", {"code": 1.0}, budget="100%")
    before = visible(hurt_family)
    with pytest.raises(BudgetError, match="nothing was published") as caught:
        execute(hurt_family, plan, "merged")
    assert f"{plan.costs.expert_bytes + 1} expert bytes were read" in caught.value.message
    assert caught.value.exit_code == 7
    assert visible(hurt_family) == before
    assert (
        execute(hurt_family, replace(plan, budget_bytes=None), "merged", use_cache=False).expert_bytes_read
        == plan.costs.expert_bytes + 1
    )


SEEDLESS = [name for name in FAMILIES if name not in ("dare_linear", "della")]  # masks are of the commits


def test_the_same_question_in_two_stores_has_one_plan_and_one_tree(make_store: Any, tmp_path: Path) -> None:
    """Commits carry times and differ; so the plan is moved to the other store's commits, and gives the same tree."""
    base = base_weights()
    stores = [make_store(), make_store()]
    for store in stores:
        ingest_family(
            store, tmp_path / store.layout.root.name, base, {n: fine_tune(base, k) for k, n in enumerate(WEIGHTS)}
        )
    for method, budget in itertools.product(SEEDLESS, (None, "40%")):
        trees, texts = set(), set()
        for store in stores:
            plan = make_plan(store, method, WEIGHTS, budget=budget)
            result = execute(store, plan, "merged", use_cache=False)
            trees.add(store.commit(result.commit).tree)
            value = plan.as_json()
            for item in (value["base"], *value["experts"]):
                item["commit"] = ""
            texts.add(json.dumps(value))
        assert len(trees) == len(texts) == 1


def test_a_store_with_the_same_objects_carries_out_the_same_plan(make_store: Any, tmp_path: Path) -> None:
    """A copy of the store elsewhere: one plan id, one tree."""
    import shutil

    base = base_weights()
    first = make_store()
    ingest_family(first, tmp_path, base, {"math": fine_tune(base, 1), "code": fine_tune(base, 2)})
    plan = make_plan(first, "ties", WEIGHTS, budget="40%")
    shutil.copytree(first.layout.root, tmp_path / "copy")
    with Store.open(tmp_path / "copy") as second:
        again = make_plan(second, "ties", WEIGHTS, budget="40%")
        assert again.id == plan.id
        results = [execute(store, plan, "merged") for store in (first, second)]
        trees = {store.commit(result.commit).tree for store, result in zip((first, second), results, strict=True)}
        assert len(trees) == 1
        assert len({result.plan for result in results}) == 1
        assert_clean(second)


def test_whole_numbers_scalars_and_empty_tensors(store: Store, tmp_path: Path) -> None:
    """Integers and flags are the base's, whatever the experts have; the rest is merged whatever its shape."""
    base = {
        "ids": np.arange(10),
        "mask": np.array([True, False]),
        "scale": np.array(2.0, np.float32),
        "none": np.zeros((0, 5), np.float32),
        "flat": np.ones((3, 0, 2), np.float32),
        "w": np.ones(5, np.float32),
    }
    tuned = {**base, "ids": np.arange(10) * 2, "mask": ~base["mask"], "scale": np.array(4.0, np.float32)}
    ingest_family(store, tmp_path, base, {"tuned": {**tuned, "w": np.full(5, 3, np.float32)}})
    for method in METHODS:
        for dtype in (None, "BF16"):
            merge(store, method, {"tuned": 1.0}, dtype=dtype, **({"density": 1.0} if method == "ties" else {}))
            found = store.snapshot("merged").tensors
            assert found["ids"] == store.snapshot("base").entry("ids")
            assert found["mask"] == store.snapshot("base").entry("mask")
            assert {name: entry.shape for name, entry in found.items()} == {n: array.shape for n, array in base.items()}
            assert found["none"].dtype == found["w"].dtype == (dtype or "F32")
            weights = weights_of(store, "merged")
            assert weights["scale"].astype(np.float32) == 4.0
            assert (weights["w"].astype(np.float32) == 3.0).all()
            store.snapshot("merged").export(tmp_path / "out", force=True)


def test_a_missing_block_of_an_expert_is_reported(hurt_family: Store) -> None:
    object_path(hurt_family, hurt_family.snapshot("math").entry(UP).blocks[0]).unlink()
    before = visible(hurt_family)
    for method in ("linear", "ties", "model_stock"):
        plan = make_plan(hurt_family, method, {"math": 1.0, "code": 1.0})
        with pytest.raises(DamagedError, match="is missing") as caught:
            execute(hurt_family, plan, "merged")
        assert caught.value.exit_code == 5
    assert visible(hurt_family) == before
