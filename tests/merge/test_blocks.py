"""All blocks of a merge: computed once, known afterwards, the same whatever the threads and the encodings are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge import MergeResult, execute
from mergepipe.merge.methods import METHODS as METHODS_BY_NAME
from mergepipe.store import Digest, Store
from mergepipe.store.check import verify
from mergepipe.store.frame import Encoding, Kind
from support.family import Weights, base_weights, fine_tune
from support.merges import (
    FAMILIES,
    METHODS,
    assert_as_planned,
    blocks_of,
    ingest_family,
    ingest_model,
    make_plan,
    merge,
    weights_of,
    without_weights,
)
from support.stores import assert_clean, flip_bit, object_files, object_path, objects_of, state_of

WEIGHTS = {"math": 0.75, "code": 0.5}
LAYER = "model.layers.1."


def tree_of(store: Store, result: MergeResult) -> Digest:
    return store.commit(result.commit).tree


def new_blocks(store: Store, ref: str) -> list[Digest]:
    """The blocks of a result that are not the base's."""
    bases = {block for blocks in blocks_of(store, "base").values() for block in blocks}
    return sorted({block for blocks in blocks_of(store, ref).values() for block in blocks} - bases)


@pytest.mark.parametrize("dtype", [None, "F32"])
@pytest.mark.parametrize("method", FAMILIES)
def test_a_repeated_merge_computes_and_reads_nothing(family: Store, method: str, dtype: str | None) -> None:
    plan = make_plan(family, method, WEIGHTS, budget="50%", dtype=dtype)
    first = execute(family, plan, "merged")
    assert_as_planned(plan, first)
    before = state_of(family)
    again = execute(family, plan, "merged")
    assert (again.computed_blocks, again.expert_bytes_read, again.base_bytes_read, again.written_bytes) == (0, 0, 0, 0)
    assert again.cached_blocks == first.computed_blocks
    assert again.referenced_blocks == first.referenced_blocks
    assert again.unchanged
    assert again.commit == first.commit
    assert state_of(family) == before
    without_budget = make_plan(family, method, WEIGHTS, dtype=dtype)
    full = execute(family, without_budget, "full")
    again = execute(family, make_plan(family, method, WEIGHTS, dtype=dtype, budget="100%"), "covered")
    assert (again.computed_blocks, again.expert_bytes_read) == (0, 0), "the question is the same"
    assert tree_of(family, again) == tree_of(family, full)
    other = execute(family, plan, "other")
    assert (other.computed_blocks, other.expert_bytes_read, other.unchanged) == (0, 0, False)
    assert tree_of(family, other) == tree_of(family, first)


@pytest.mark.parametrize("budget", [None, "50%"])
@pytest.mark.parametrize("method", FAMILIES)
def test_without_the_cache_all_is_computed_again(family: Store, method: str, budget: str | None) -> None:
    plan = make_plan(family, method, WEIGHTS, budget=budget)
    first = execute(family, plan, "merged")
    again = execute(family, plan, "again", use_cache=False)
    assert_as_planned(plan, again)
    assert again.cached_blocks == 0
    assert tree_of(family, again) == tree_of(family, first)


@pytest.mark.parametrize("method", FAMILIES)
def test_a_repeated_merge_needs_no_weights(hurt_family: Store, method: str) -> None:
    """Not even the files: only those of the result itself."""
    plan = make_plan(hurt_family, method, WEIGHTS)
    first = execute(hurt_family, plan, "merged")
    without_weights(hurt_family, set(new_blocks(hurt_family, "merged")))
    assert tree_of(hurt_family, execute(hurt_family, plan, "again")) == tree_of(hurt_family, first)


@pytest.mark.parametrize(
    ("method", "density"),
    [("linear", None), ("task_arithmetic", None), ("ties", 1.0), ("ties", 0.3), ("model_stock", None), ("sce", None)],
)
def test_a_changed_layer_is_computed_and_nothing_else(
    family: Store, tmp_path: Path, method: str, density: float | None
) -> None:
    parameters = {} if density is None else {"density": density}
    execute(family, make_plan(family, method, WEIGHTS, **parameters), "merged")
    retrained = weights_of(family, "math")
    fresh = fine_tune(base_weights(), 77)
    retrained.update({name: weight for name, weight in fresh.items() if name.startswith(LAYER)})
    ingest_model(family, tmp_path / "v2", "math", retrained, base="base")
    plan = make_plan(family, method, WEIGHTS, **parameters)
    result = execute(family, plan, "merged")
    old, new = blocks_of(family, "math~1"), blocks_of(family, "math")
    changed = sum(a != b for name in old for a, b in zip(old[name], new[name], strict=True))
    assert changed == sum(len(blocks) for name, blocks in new.items() if name.startswith(LAYER) and "norm" not in name)
    assert result.computed_blocks == changed
    assert result.cached_blocks == plan.costs.computed_blocks - changed
    assert 0 < result.expert_bytes_read < plan.costs.expert_bytes
    assert tree_of(family, result) == tree_of(family, execute(family, plan, "checked", use_cache=False))


def test_another_weight_or_parameter_is_another_recipe(family: Store) -> None:
    plan = make_plan(family, "task_arithmetic", WEIGHTS)
    execute(family, plan, "merged")
    for other in (
        make_plan(family, "task_arithmetic", {"math": 0.5, "code": 0.75}),
        make_plan(family, "task_arithmetic", WEIGHTS, **{"lambda": 0.5}),
        make_plan(family, "task_arithmetic", WEIGHTS, normalize=True),
        make_plan(family, "task_arithmetic", WEIGHTS, dtype="F32"),
        make_plan(family, "task_arithmetic", {"code": 0.5, "math": 0.75}),
        make_plan(family, "task_arithmetic", {"math": 0.75}),
        make_plan(family, "linear", WEIGHTS),
    ):
        assert execute(family, other, "merged").cached_blocks == 0


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_another_base_is_another_recipe(family: Store, method: str) -> None:
    execute(family, make_plan(family, method, {"math": 0.75}), "merged")
    plan = make_plan(family, method, {"math": 0.75}, base="code")
    result = execute(family, plan, "merged")
    assert_as_planned(plan, result)
    assert tree_of(family, result) == tree_of(family, execute(family, plan, "merged", use_cache=False))


def test_another_threshold_is_another_recipe_and_another_density_alone_is_not(family: Store) -> None:
    """Two densities whose k-th largest magnitudes lie in one bin trim alike."""
    plans = [make_plan(family, "ties", WEIGHTS, density=density, exact=False) for density in (0.3, 0.6, 0.6000001)]
    results = [execute(family, plan, "merged") for plan in plans]
    assert [result.cached_blocks for result in results] == [0, 0, plans[2].costs.computed_blocks]
    assert plans[1].tensors == plans[2].tensors
    for plan, result in zip(plans, results, strict=True):
        assert tree_of(family, result) == tree_of(family, execute(family, plan, "merged", use_cache=False))


@pytest.mark.parametrize("method", ["ties", "slerp", "karcher", "multislerp", "arcee_fusion"])
def test_what_follows_from_a_whole_tensor_depends_on_all_of_it(family: Store, tmp_path: Path, method: str) -> None:
    """One element, far away, is another angle, or another threshold, here."""
    experts = {"math": 1.0} if METHODS_BY_NAME[method].experts[1] == 1 else WEIGHTS
    execute(family, make_plan(family, method, experts), "merged")
    changed = weights_of(family, "math")
    name = "model.layers.1.mlp.up_proj.weight"
    changed[name][-1] += changed[name].dtype.type(1)
    ingest_model(family, tmp_path / "v2", "math", changed, base="base")
    plan = make_plan(family, method, experts)
    result = execute(family, plan, "merged")
    assert result.computed_blocks == len(family.snapshot("base").entry(name).blocks)
    assert tree_of(family, result) == tree_of(family, execute(family, plan, "checked", use_cache=False))


def test_a_larger_budget_reuses_what_a_smaller_one_computed(family: Store) -> None:
    """Blocks with the same inputs are the same recipe, whatever else was read."""
    small = execute(family, make_plan(family, "ties", WEIGHTS, budget="40%"), "small")
    plan = make_plan(family, "ties", WEIGHTS, exact=False)
    large = execute(family, plan, "large")
    assert large.cached_blocks == small.computed_blocks > 0
    assert large.computed_blocks == plan.costs.computed_blocks - small.computed_blocks


@pytest.mark.parametrize("harm", ["removed", "cut", "damaged"])
def test_a_known_result_that_was_harmed_is_computed_again(hurt_family: Store, harm: str) -> None:
    plan = make_plan(hurt_family, "ties", WEIGHTS)
    first = execute(hurt_family, plan, "merged")
    block = new_blocks(hurt_family, "merged")[0]
    path = object_path(hurt_family, block)
    if harm == "removed":
        path.unlink()
    elif harm == "cut":
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-1])
    else:  # its size says nothing: what `mp verify` found is what is known
        flip_bit(path, path.stat().st_size - 1)
        assert [item.id for item in verify(hurt_family).damaged] == [block]
    again = execute(hurt_family, plan, "merged")
    assert again.computed_blocks == 1
    assert again.cached_blocks == first.computed_blocks - 1
    assert tree_of(hurt_family, again) == tree_of(hurt_family, first)
    assert_clean(hurt_family)


def test_threads_do_not_matter(shared_family: Store) -> None:
    for method in FAMILIES:
        for budget in (None, "70%"):
            plan = make_plan(shared_family, method, WEIGHTS, budget=budget)
            results = [execute(shared_family, plan, f"merged{n}", workers=n, use_cache=False) for n in (1, 2, 7)]
            assert len({tree_of(shared_family, result) for result in results}) == 1
            for result in results:
                assert_as_planned(plan, result)


@pytest.mark.parametrize(("method", "budget"), [("linear", "50%"), ("ties", None), ("model_stock", None)])
def test_progress_goes_from_nothing_to_all(shared_family: Store, method: str, budget: str | None) -> None:
    plan = make_plan(shared_family, method, WEIGHTS, budget=budget)
    total = sum(shared_family.snapshot("base").entry(name).nbytes for name in plan.tensors)
    seen: list[tuple[str, int, int]] = []
    for _ in range(2):  # computed, and known from before
        seen.clear()
        execute(shared_family, plan, "merged", workers=3, progress=lambda *step: seen.append(step))
        assert {(stage, size) for stage, _, size in seen} == {("merge", total)}
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
        assert seen[-1][1] == total


def encodings(store: Store, ref: str) -> set[Encoding]:
    found = set()
    with store.catalog.reading() as view:
        for blocks in blocks_of(store, ref).values():
            for block in blocks:
                row = view.object_row(block)
                assert row is not None
                found.add(row.encoding)
    return found


Arrange = Callable[[Store, Path], None]
BASE = base_weights()
TUNES = {"math": fine_tune(BASE, 1), "code": fine_tune(BASE, 2, scale=3e-3)}


def alone(store: Store, folder: Path) -> None:
    ingest_family(store, folder, BASE, TUNES, against_base=False)


def against_another(store: Store, folder: Path) -> None:
    """Experts that are deltas to a model that has no part in the merge."""
    ingest_model(store, folder, "base", BASE)
    ingest_model(store, folder, "other", fine_tune(BASE, 50))
    for name, weights in TUNES.items():
        ingest_model(store, folder, name, weights, base="other")
    assert Encoding.DELTA in encodings(store, "math")


def base_is_a_delta(store: Store, folder: Path) -> None:
    ingest_model(store, folder, "first", fine_tune(BASE, 50))
    ingest_model(store, folder, "base", BASE, base="first")
    for name, weights in TUNES.items():
        ingest_model(store, folder, name, weights, base="base")
    assert Encoding.DELTA in encodings(store, "base")
    assert Encoding.DELTA in encodings(store, "math")


def all_against_the_first(store: Store, folder: Path) -> None:
    """The base and the experts are deltas to one model, which is no part of the merge."""
    ingest_model(store, folder, "first", fine_tune(BASE, 50))
    for name, weights in {"base": BASE, **TUNES}.items():
        ingest_model(store, folder, name, weights, base="first")


def base_came_last(store: Store, folder: Path) -> None:
    """The base is a delta to one of its own experts."""
    for name, weights in TUNES.items():
        ingest_model(store, folder, name, weights)
    ingest_model(store, folder, "base", BASE, base="math")
    assert Encoding.DELTA in encodings(store, "base")


def mixed(store: Store, folder: Path) -> None:
    """One expert by itself, the other against it."""
    ingest_model(store, folder, "base", BASE)
    ingest_model(store, folder, "math", TUNES["math"])
    ingest_model(store, folder, "code", TUNES["code"], base="math")


ARRANGEMENTS = [alone, against_another, base_is_a_delta, all_against_the_first, base_came_last, mixed]


@pytest.mark.parametrize("arrange", ARRANGEMENTS, ids=lambda arrange: str(arrange.__name__))
def test_encodings_change_costs_and_nothing_else(
    family: Store, make_store: Callable[..., Store], tmp_path: Path, arrange: Arrange
) -> None:
    """Costs are of the files as they lie, so they differ; they are still what is measured, and the trees are equal."""
    store = make_store()
    arrange(store, tmp_path / "arranged")
    for method in (*METHODS, "model_stock", "nuslerp", "sce"):
        usual = execute(family, make_plan(family, method, WEIGHTS), method, use_cache=False)
        for budget in (None, "50%"):
            plan = make_plan(store, method, WEIGHTS, budget=budget)
            result = execute(store, plan, method, use_cache=False)
            assert_as_planned(plan, result)
            assert budget is None or result.expert_bytes_read <= (plan.budget_bytes or 0)
            if budget is None:
                assert blocks_of(store, method) == blocks_of(family, method)
                assert tree_of(store, result) == tree_of(family, usual)


def test_one_block_that_many_need_is_read_once_a_place(store: Store, tmp_path: Path) -> None:
    """Experts that share blocks, one that is there twice, and a tensor that is another's copy."""
    base: Weights = {name: np.zeros((64, 32), np.float32) for name in ("a", "b")}
    tuned = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    half = np.concatenate([tuned[:32], np.ones((32, 32), np.float32)])
    ingest_family(store, tmp_path, base, {"x": {"a": tuned, "b": tuned}, "y": {"a": half, "b": base["b"]}})
    for method in METHODS:
        plan = make_plan(store, method, {"x": 0.5, "y": 0.25})
        result = execute(store, plan, "merged", use_cache=False)
        assert_as_planned(plan, result)
        tuned_size, ones_size = (
            [object_files(store)[block.hex()] for block in blocks_of(store, ref)["a"]] for ref in ("x", "y")
        )
        assert plan.costs.expert_bytes == 2 * sum(tuned_size) + ones_size[1]
        assert blocks_of(store, "x")["a"] == blocks_of(store, "x")["b"]
    alike = make_plan(store, "task_arithmetic", {"x": 0.5, "x~0": 0.25})
    assert execute(store, alike, "merged", use_cache=False).expert_bytes_read == 2 * sum(tuned_size)


def test_merges_can_be_merged(family: Store) -> None:
    """A result as an expert, as a base, and both; what it is compared with is measured already."""
    merge(family, "ties", WEIGHTS, "first")
    merge(family, "linear", WEIGHTS, "second")
    rows = objects_of(family, Kind.BLOCK)
    for base, experts in (
        ("base", {"first": 0.5, "second": 0.5}),
        ("first", {"second": 1.0, "math": 0.5}),
        ("first", {"first": 1.0}),
    ):
        for method in METHODS:
            plan = make_plan(family, method, experts, base=base, budget="60%")
            assert_as_planned(plan, execute(family, plan, "merged", use_cache=False))
    assert len(objects_of(family, Kind.BLOCK)) > len(rows)
    plan = make_plan(family, "linear", {"first": 1.0}, base="first")
    result = execute(family, plan, "itself")
    assert plan.costs.expert_bytes_full == 0
    assert tree_of(family, result) == family.commit(family.resolve("first")).tree


@pytest.mark.parametrize("method", FAMILIES)
def test_a_result_carries_its_statistics(hurt_family: Store, method: str) -> None:
    """An average of a result needs no weights to be planned: its distance to the base was measured as it was made."""
    merge(hurt_family, method, WEIGHTS, "first")
    without_weights(hurt_family)
    plan = make_plan(hurt_family, "linear", {"first": 0.5, "math": 0.5}, budget="50%")
    assert plan.bound.update


def names_of(tensors: Iterable[str], layer: str) -> set[str]:
    return {name for name in tensors if name.startswith(layer)}


def test_a_merge_keeps_the_subtrees_that_it_does_not_touch(store: Store, tmp_path: Path) -> None:
    """Of an expert that changes one layer, all other layers' nodes are the base's: equal ids, not equal copies."""
    tuned = {name: (TUNES["math"] if name.startswith(LAYER) else BASE)[name] for name in BASE}
    ingest_family(store, tmp_path, BASE, {"math": tuned})
    nodes = len(objects_of(store, Kind.NODE))
    result = merge(store, "task_arithmetic", {"math": 0.5})
    assert len(objects_of(store, Kind.NODE)) - nodes == 4, "the root, model, layers, and layer 1"
    ours, bases = blocks_of(store, "merged"), blocks_of(store, "base")
    assert {name for name in ours if ours[name] != bases[name]} <= names_of(ours, LAYER)
    assert result.computed_blocks == sum(len(ours[name]) for name in names_of(ours, LAYER) if "norm" not in name)
