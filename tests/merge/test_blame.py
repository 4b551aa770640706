"""Blame: every block of every merge accounted for, against a brute-force look at the plan and the blocks themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge import Plan, execute
from mergepipe.merge.assemble import in_order, jobs_from
from mergepipe.merge.blame import Fate, TensorBlame, blame, matching_tensors
from mergepipe.merge.budget import Budget
from mergepipe.merge.build import plan_jobs
from mergepipe.merge.inputs import open_models
from mergepipe.merge.job import Setting
from mergepipe.merge.methods.task_arithmetic import TASK_ARITHMETIC
from mergepipe.store import Digest, Store
from mergepipe.store.commits import Commit, Parent
from mergepipe.store.errors import NotFoundError
from mergepipe.store.publish import Changes, RefUpdate, publish
from support.adapters import CONFIG, base_tensors, factors, write_adapter
from support.family import Weights, base_weights, fine_tune
from support.merges import ingest_family, ingest_model, make_plan, merge, weights_of, without_weights

UP = "model.layers.1.mlp.up_proj.weight"


def blamed(store: Store, ref: str, name: str, *, deep: bool = False) -> tuple[TensorBlame, list[TensorBlame]]:
    (found,), behind = blame(store, store.snapshot(ref), [name], deep=deep)
    return found, behind


def fates(found: TensorBlame) -> list[Fate]:
    """One for each block; and that runs are as long as they can be, and leave no gap."""
    listed = [(index, run.fate) for run in found.runs for index in run.blocks]
    assert [index for index, _ in listed] == list(range(len(found.entry.blocks)))
    assert all(one.fate != other.fate for one, other in zip(found.runs, found.runs[1:], strict=False))
    return [fate for _, fate in listed]


def with_budget(store: Store, method: str = "task_arithmetic", ref: str = "merged") -> Plan:
    plan = make_plan(store, method, {"math": 0.6, "code": 0.4}, budget="50%")
    execute(store, plan, ref)
    return plan


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "model_stock"])
def test_every_block_of_a_merge(family: Store, method: str) -> None:
    experts = (
        {"math": {"weight": 0.6}, "code": {"weight": 0.4}} if method != "model_stock" else {"math": {}, "code": {}}
    )
    plan = make_plan(family, method, experts, budget="50%")
    execute(family, plan, "merged")
    base, merged = family.snapshot("base"), family.snapshot("merged")
    others = [family.snapshot(name) for name in ("math", "code")]
    left = 0
    for name, entry in merged.tensors.items():
        planned = plan.tensors.get(name)
        found, _ = blamed(family, "merged", name)
        assert (found.method, found.kind, found.based) == (method, "merge", True)
        for index, fate in enumerate(fates(found)):
            differ = [n for n in (0, 1) if others[n].tensors[name].blocks[index] != base.tensors[name].blocks[index]]
            read = [n for n in differ if planned is not None and index in planned.reads[n]]
            assert list(fate.reached) == read
            assert list(fate.left_out) == [n for n in differ if n not in read]
            assert list(fate.same) == [n for n in (0, 1) if n not in differ]
            assert fate.origin == ("computed" if read else "own")
            if fate.origin == "own":
                assert entry.blocks[index] == base.tensors[name].blocks[index]
            left += len(fate.left_out)
    assert left > 0


def test_no_weights_are_read(hurt_family: Store) -> None:
    with_budget(hurt_family)
    merge(hurt_family, "task_arithmetic", {"merged": 1.0, "code": 0.5}, "second")
    assert without_weights(hurt_family) > 50
    snapshot = hurt_family.snapshot("second")
    asked, behind = blame(hurt_family, snapshot, list(snapshot.tensors), deep=True)
    assert len(asked) == len(snapshot.tensors)
    assert {each.commit for each in behind} >= {hurt_family.resolve("merged"), hurt_family.resolve("base")}


def test_what_came_out_the_same(store: Store, tmp_path: Path) -> None:
    """A weight of 0 gives the base's block, one of 1 the expert's: computed all the same, and said so."""
    base = {"w": np.zeros((64, 64), np.float32) + 1}
    ingest_family(store, tmp_path, base, {"math": {"w": base["w"] + 1}, "code": {"w": base["w"] * 4}})
    merge(store, "task_arithmetic", {"math": 0.0, "code": 1.0}, "one")
    assert fates(blamed(store, "one", "w")[0]) == [Fate("computed", reached=(0, 1), equals=2)] * 4
    merge(store, "task_arithmetic", {"math": 0.0}, "none")
    assert fates(blamed(store, "none", "w")[0]) == [Fate("computed", reached=(0,), equals=0)] * 4


def test_converted_blocks_are_computed_from_the_base_alone(family: Store) -> None:
    merge(family, "task_arithmetic", {"math": 0.5}, dtype="float32")
    assert set(fates(blamed(family, "merged", "lm_head.weight")[0])) == {Fate("computed", same=(0,))}


def test_types_that_are_not_merged(store: Store, tmp_path: Path) -> None:
    base = {"ids": np.arange(4096, dtype=np.int64), "w": np.ones(64, np.float32)}
    ingest_family(store, tmp_path, base, {"math": {"ids": base["ids"] + 1, "w": base["w"] * 2}})
    merge(store, "task_arithmetic", {"math": 0.5})
    assert set(fates(blamed(store, "merged", "ids")[0])) == {Fate("own", unmerged=(0,))}


def test_a_tensor_without_blocks(store: Store, tmp_path: Path) -> None:
    base = {"none": np.zeros((0, 4), np.float32), "w": np.ones(64, np.float32)}
    ingest_family(store, tmp_path, base, {"math": {**base, "w": base["w"] * 2}})
    merge(store, "task_arithmetic", {"math": 0.5})
    assert blamed(store, "merged", "none")[0].runs == ()
    assert blamed(store, "math", "none")[0].runs == ()


def test_experts_that_share_a_block(store: Store, tmp_path: Path) -> None:
    base = base_weights()
    tuned = fine_tune(base, 1)
    ingest_family(store, tmp_path, base, {"math": tuned, "twin": tuned})
    merge(store, "task_arithmetic", {"math": 0.5, "twin": 0.25})
    assert {fate.reached for fate in fates(blamed(store, "merged", UP)[0])} == {(0, 1)}


class TestIngested:
    def test_blocks_are_the_bases_or_its_own(self, family: Store) -> None:
        base, math = family.resolve("base"), family.resolve("math")
        assert set(fates(blamed(family, "math", "lm_head.weight")[0])) == {Fate("brought", commit=base)}
        assert set(fates(blamed(family, "math", UP)[0])) == {Fate("brought", commit=math)}
        assert set(fates(blamed(family, "base", UP)[0])) == {Fate("brought", commit=base)}

    def test_it_goes_back_to_the_first(self, family: Store, tmp_path: Path) -> None:
        """Through commits of the same ref, block by block."""
        weights = fine_tune(base_weights(), 1)
        first = family.resolve("math")
        changed: list[Digest] = []
        for step in range(3):
            weights = {**weights, UP: weights[UP].copy()}
            weights[UP][step * 32] += 1  # rows of block 0, 1, 2
            changed.append(ingest_model(family, tmp_path / str(step), "math", weights))
        found, behind = blamed(family, "math", UP, deep=True)
        assert [fate.commit for fate in fates(found)] == [*changed, first]
        assert [each.commit for each in behind] == [*changed[:2], first]

    def test_what_a_merge_brought(self, family: Store, tmp_path: Path) -> None:
        """A merge that was trained on: its blocks are its own, and with ``deep`` the experts' that reached them."""
        with_budget(family)
        weights: Weights = {name: array.copy() for name, array in weights_of(family, "merged").items()}
        weights[UP][0] += 1
        ingest_model(family, tmp_path, "tuned", weights, base="merged")
        found, behind = blamed(family, "tuned", UP, deep=True)
        tuned, merged = family.resolve("tuned"), family.resolve("merged")
        assert [fate.commit for fate in fates(found)] == [tuned, merged, merged, merged]
        assert (behind[0].commit, behind[0].runs[0].first) == (merged, 1)


class TestDeep:
    def test_a_merge_of_a_merge(self, family: Store) -> None:
        with_budget(family, ref="first")
        merge(family, "task_arithmetic", {"first": 1.0}, "second")
        found, behind = blamed(family, "second", UP, deep=True)
        first = blamed(family, "first", UP)[0]
        assert (found.experts[0].name, found.experts[0].commit) == ("first", family.resolve("first"))
        reached = {index for run in found.runs if run.fate.reached for index in run.blocks}
        assert reached == {index for run in first.runs if run.fate.reached for index in run.blocks}
        by_commit = {each.commit: each for each in behind}
        (again,) = (each for each in behind if each.kind == "merge")
        assert {index for run in again.runs for index in run.blocks} == reached
        reaching = {again.experts[number].name for run in again.runs for number in run.fate.reached}
        assert set(by_commit) == {family.resolve(name) for name in {"base", "first"} | reaching}
        assert reaching

    def test_only_what_took_part_is_followed(self, family: Store) -> None:
        """A block that no expert reached has no more to it than the base."""
        merge(family, "task_arithmetic", {"math": 1.0}, "first")
        merge(family, "task_arithmetic", {"first": 1.0}, "second")
        _, behind = blamed(family, "second", "lm_head.weight", deep=True)
        assert [each.commit for each in behind] == [family.resolve("base")]

    def test_a_commit_that_is_met_twice(self, family: Store) -> None:
        merge(family, "task_arithmetic", {"math": 1.0}, "first")
        merge(family, "task_arithmetic", {"first": 1.0, "math": 0.5}, "left")
        merge(family, "task_arithmetic", {"first": 1.0, "code": 0.5}, "right")
        merge(family, "task_arithmetic", {"left": 0.5, "right": 0.5}, "top")
        _, behind = blamed(family, "top", UP, deep=True)
        commits = [each.commit for each in behind]
        assert len(commits) == len(set(commits)) == 6
        assert all(len(fates(each)) == 4 for each in behind)


def test_an_adapter_reaches_its_targets(store: Store, tmp_path: Path) -> None:
    ingest_model(store, tmp_path, "base", base_tensors())
    store.ingest([write_adapter(tmp_path / "lora", factors("model.layers.0.up_proj", 80, 32), CONFIG)], ref="lora")
    merge(store, "task_arithmetic", {"lora": 1.0})
    found, behind = blamed(store, "merged", "model.layers.0.up_proj.weight", deep=True)
    assert {fate.reached for fate in fates(found)} == {(0,)}
    assert found.experts[0].kind == "adapter"
    assert [each.commit for each in behind] == [store.resolve("base")], "an adapter has no tensor of that name"
    assert {fate.same for fate in fates(blamed(store, "merged", "model.layers.0.q_proj.weight")[0])} == {(0,)}


class TestNames:
    def test_patterns(self, family: Store) -> None:
        snapshot = family.snapshot("base")
        assert matching_tensors(snapshot, UP, "base") == [UP]
        assert len(matching_tensors(snapshot, "model.layers.1.*", "base")) == 3
        assert matching_tensors(snapshot, "*", "base") == list(snapshot.tensors)

    @pytest.mark.parametrize("pattern", ["model.layers.1.mlp.up_prj.weight", "x*", "", "MODEL.*"])
    def test_none(self, family: Store, pattern: str) -> None:
        with pytest.raises(NotFoundError) as error:
            matching_tensors(family.snapshot("base"), pattern, "base")
        assert error.value.hint
        if "prj" in pattern:
            assert UP in error.value.hint

    def test_blame_of_an_unknown_tensor(self, family: Store) -> None:
        with pytest.raises(NotFoundError):
            blame(family, family.snapshot("base"), ["nothing"])


def test_a_merge_without_a_plan(hurt_family: Store) -> None:
    tree, base = hurt_family.snapshot("base").commit.tree, hurt_family.resolve("base")
    commit = Commit(tree, (Parent(base, "base", "base"),), "merge", "", "ada", "no time", "test")
    publish(hurt_family.catalog, None, Changes([commit], [RefUpdate("odd", None, commit.id)]))
    with pytest.raises(NotFoundError, match="no plan"):
        blame(hurt_family, hurt_family.snapshot("odd"), [UP])


def test_tensors_from_other_places_of_a_model(family: Store) -> None:
    """As slices of layers have them: with other names there, another reference, or nothing to merge."""
    head = make_plan(family, "task_arithmetic", {"math": 0.5, "code": 0.5})
    own = head.experts[0].parameters
    variants = (Setting(0, True, (1,), head.parameters, (own,)), Setting(2, False, ()))
    draft = replace(head, variants=variants, complete=True, tensors={})
    other = UP.replace(".1.", ".2.")
    models = open_models(family, draft.models)
    tensors = {UP: (1, (other, UP)), other: (2, (UP,)), "lm_head.weight": (0, None)}
    jobs = jobs_from(models, draft.settings, {name: tensors[name] for name in in_order(tensors)})
    execute(family, plan_jobs(family, draft, models, jobs, TASK_ARITHMETIC, Budget(), True, None), "merged")

    found, behind = blamed(family, "merged", UP, deep=True)
    assert found.reference is not None
    assert (found.reference.tensor, found.experts[0].tensor) == (other, UP)
    assert {(fate.origin, fate.reached) for fate in fates(found)} == {("computed", (0,))}
    assert [(each.commit, each.name) for each in behind] == [
        (family.resolve("base"), other),
        (family.resolve("math"), UP),
    ]
    copied, behind = blamed(family, "merged", other, deep=True)
    assert copied.reference is not None
    assert (copied.reference.name, copied.reference.tensor, copied.experts) == ("code", UP, ())
    assert set(fates(copied)) == {Fate("own")}
    assert [(each.commit, each.name) for each in behind] == [(family.resolve("code"), UP)]
