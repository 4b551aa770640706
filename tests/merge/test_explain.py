"""What a plan reads, tensor by tensor and expert by expert; and what the result's card and blame say of previews."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge import Plan, execute
from mergepipe.merge.blame import blame
from mergepipe.merge.card import model_card
from mergepipe.merge.explain import LEVELS, by_layer, counts, explain, layer_of, reading
from mergepipe.merge.hints import preview_notes
from mergepipe.merge.methods import METHODS
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError
from support.facts import Outline, facts_of, question_of
from support.family import Weights, base_weights, fine_tune
from support.levels import BLOCK_BYTES, fixed_family, ingest_levels, level_plan
from support.merges import FAMILIES, blocks_of, facts_of_refs, ingest_family, make_plan, weights_of, without_weights
from support.stores import assert_clean


@pytest.fixture
def shared(hurt_store: Store, tmp_path: Path) -> Store:
    """Three experts: two have one layer in common, and one of them leaves a layer alone."""
    base = base_weights()
    experts = {"a": fine_tune(base, 1), "b": fine_tune(base, 2), "c": fine_tune(base, 3)}
    for name, weight in experts["a"].items():
        if ".layers.0." in name:
            experts["b"][name] = weight
    for name in experts["c"]:
        if ".layers.1." in name:
            experts["c"][name] = base[name]
    ingest_family(hurt_store, tmp_path, base, experts)
    return hurt_store


@pytest.mark.parametrize("dtype", [None, "F32"])
@pytest.mark.parametrize("budget", [None, "0", "30%", "100%"])
@pytest.mark.parametrize("method", [name for name in FAMILIES if name != "nuslerp"])
def test_it_covers_what_differs_and_adds_up(shared: Store, method: str, budget: str | None, dtype: str | None) -> None:
    plan = make_plan(shared, method, {"a": 0.5, "b": 0.25, "c": 1.0}, budget=budget, dtype=dtype)
    without_weights(shared)
    found = explain(shared, plan)
    blocks = {ref: blocks_of(shared, ref) for ref in ("base", "a", "b", "c")}
    differing = [name for name in blocks["base"] if any(blocks[ref][name] != blocks["base"][name] for ref in "abc")]
    assert [tensor.name for tensor in found] == differing
    for tensor in found:
        planned = plan.tensors[tensor.name]
        assert tensor.bound == planned.bound
        assert tensor.blocks == len(blocks["base"][tensor.name])
        for number, (ref, part) in enumerate(zip("abc", tensor.experts, strict=True)):
            theirs = zip(blocks[ref][tensor.name], blocks["base"][tensor.name], strict=True)
            assert part.expert == ref
            assert part.differing == sum(block != base for block, base in theirs)
            assert part.exact.blocks == len(planned.reads[number])
            assert (part.preview.blocks, part.levels.count(1)) == (0, 0)
            assert part.nothing.blocks + part.exact.blocks == part.differing
            assert part.number == number
            assert part.kept_elements == (planned.pinned["kept"][number] if "kept" in planned.pinned else -1)
    if method == "ties" and budget in ("0", "30%"):
        assert all(part.kept_elements > 0 for tensor in found for part in tensor.experts)
    read = sum(part.stored_bytes_read for tensor in found for part in tensor.experts)
    left = sum(part.stored_bytes_left for tensor in found for part in tensor.experts)
    assert read == plan.costs.expert_bytes
    assert read + left == plan.costs.expert_bytes_full


def test_reasons(store: Store, tmp_path: Path) -> None:
    base: Weights = {"w": np.zeros(3000, np.float32)}
    large = {"w": np.repeat(np.array([1, 1, 0.1], np.float32), 1024)[:3000]}
    small = {"w": np.repeat(np.array([0, 0, 0.1], np.float32), 1024)[:3000] * 0.01}
    ingest_family(store, tmp_path, base, {"large": large, "small": small, "same": base})
    plan = make_plan(store, "linear", {"large": 1.0, "small": 1.0, "same": 1.0}, max_error=0.2)
    ((large_part, small_part, same_part),) = [tensor.experts for tensor in explain(store, plan)]
    assert (large_part.differing, large_part.exact.blocks, large_part.levels) == (3, 2, b"\2\2\0")
    assert large_part.reason == "read in part, by gain for each byte"
    assert (small_part.differing, small_part.exact.blocks) == (1, 0)
    assert small_part.reason == "left out: gains less for its bytes than what is read"
    assert (same_part.differing, same_part.reason) == (0, "is the base's own")
    whole = make_plan(store, "linear", {"large": 1.0})
    assert explain(store, whole)[0].experts[0].reason == "read whole"


def test_an_edited_plan_is_not_explained(shared_family: Store) -> None:
    plan = make_plan(shared_family, "linear", {"math": 1.0}, budget="30%")
    with pytest.raises(BadInputError):
        explain(shared_family, replace(plan, bound=replace(plan.bound, absolute=0.0)))


# Previews.


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("levels")
    with Store.create(folder / "store", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, folder, fixed_family())
        yield store
        assert_clean(store)


@pytest.fixture
def mixed(levels: Store) -> Plan:
    return level_plan(levels, fixed_family(), "40%")


@pytest.mark.parametrize("budget", ["5%", "20%", "40%", "80%"])
def test_bytes_and_blocks_of_each_level_add_up(levels: Store, budget: str) -> None:
    plan = level_plan(levels, fixed_family(), budget)
    found = explain(levels, plan)
    parts = [part for tensor in found for part in tensor.experts]
    by_level = {name: [getattr(part, name) for part in parts] for name in LEVELS}
    blocks = {name: sum(share.blocks for share in shares) for name, shares in by_level.items()}
    sizes = {name: sum(share.stored_bytes for share in shares) for name, shares in by_level.items()}
    assert (blocks["preview"], blocks["exact"]) == counts(plan)
    assert blocks["preview"] > 0
    assert sum(blocks.values()) == sum(part.differing for part in parts) == 24
    assert sizes["preview"] + sizes["exact"] == plan.costs.expert_bytes
    told = reading(levels, plan)
    assert (told.preview_bytes, told.exact_bytes) == (sizes["preview"], sizes["exact"])
    assert (told.preview_blocks, told.exact_blocks) == (blocks["preview"], blocks["exact"])
    for tensor in found:
        for part in tensor.experts:
            exact, coarse = plan.tensors[tensor.name].levels[part.number]
            assert part.levels == bytes(2 if n in exact else 1 if n in coarse else 0 for n in range(4))
            assert bool(part.preview.blocks) == ("preview" in part.reason)


def test_layers() -> None:
    assert layer_of("model.layers.3.mlp.experts.7.up.weight") == "model.layers.3"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_of("lm_head.weight") == "lm_head"
    assert layer_of("scale") == "scale"


def test_a_model_by_layers(levels: Store, mixed: Plan) -> None:
    found = by_layer(explain(levels, mixed))
    assert list(found) == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_blame_says_what_was_reached_by_a_preview(levels: Store, mixed: Plan) -> None:
    execute(levels, mixed, "merged")
    snapshot = levels.snapshot("merged")
    (base, *experts) = (blocks_of(levels, ref) for ref in ("base", "expert0", "expert1"))
    asked, _ = blame(levels, snapshot, list(snapshot.tensors))
    seen = 0
    for tensor in asked:
        planned = mixed.tensors.get(tensor.name)
        for run in tensor.runs:
            for index in run.blocks:
                fate = run.fate
                levels_here = planned.levels if planned is not None else ()
                assert fate.reached == tuple(n for n, (exact, _) in enumerate(levels_here) if index in exact)
                assert fate.coarse == tuple(n for n, (_, coarse) in enumerate(levels_here) if index in coarse)
                differ = {n for n in (0, 1) if experts[n][tensor.name][index] != base[tensor.name][index]}
                assert set(fate.left_out) == differ - {*fate.reached, *fate.coarse}
                assert fate.origin == ("computed" if fate.reached or fate.coarse else "own")
                seen += bool(fate.coarse)
    assert seen > 0
    _, behind = blame(levels, snapshot, list(snapshot.tensors), deep=True)
    reaching = {n for tensor in asked for run in tensor.runs for n in (*run.fate.reached, *run.fate.coarse)}
    assert {each.commit for each in behind} >= {levels.resolve(f"expert{n}") for n in reaching}


def test_a_block_that_a_preview_left_as_it_was(tmp_path: Path) -> None:
    """What came out may be the base's block all the same: it was computed."""
    family = fixed_family()
    base = {name: np.full_like(array, 1e6) for name, array in family.base.items()}
    experts = {
        name: {tensor: base[tensor] + np.round(array * 100) for tensor, array in weights.items()}
        for name, weights in family.experts.items()
    }
    small = {name: {"weight": 1e-3} for name in experts}
    with Store.create(tmp_path / "store", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, tmp_path, replace(family, base=base, experts=experts, settings=small))
        plan = level_plan(store, replace(family, base=base, experts=experts, settings=small), "20%")
        execute(store, plan, "merged")
        assert counts(plan)[0] > 0
        found, _ = blame(store, store.snapshot("merged"), list(plan.tensors))
        coarse = [run.fate for tensor in found for run in tensor.runs if run.fate.coarse]
        assert coarse
        assert all(fate.origin == "computed" and fate.equals == 0 for fate in coarse)
        assert weights_of(store, "merged").keys() == base.keys()


def test_the_card_says_it(levels: Store, mixed: Plan) -> None:
    execute(levels, mixed, "carded")
    commit_id = levels.resolve("carded")
    coarse, exact = counts(mixed)
    text = model_card(commit_id, levels.commit(commit_id), mixed, title="t")
    assert f": previews of {coarse:,} of their blocks, and {exact:,} blocks whole" in text
    plain = level_plan(levels, fixed_family(), "40%", previews=False)
    assert (
        "preview" not in model_card(commit_id, levels.commit(commit_id), plan=plain, title="t").split("## Measured")[0]
    )


def test_what_a_user_is_told_of_previews(levels: Store, tmp_path: Path) -> None:
    names = ["expert0", "expert1"]
    taking, ties = METHODS["task_arithmetic"], METHODS["ties"]
    facts = facts_of_refs(levels, "task_arithmetic", names)
    assert preview_notes(facts, taking) == []
    (note,) = preview_notes(facts_of_refs(levels, "ties", names), ties)
    assert note.startswith("ties reads exact blocks alone, no previews: ")
    assert preview_notes(facts_of_refs(levels, "ties", names), ties, previews=False) == []
    assert preview_notes(facts_of_refs(levels, "ties", names, bounded=False), ties) == []
    with Store.create(tmp_path / "plain", block_bytes=BLOCK_BYTES) as plain:
        ingest_levels(plain, tmp_path, fixed_family(), previews=False)
        without = facts_of_refs(plain, "task_arithmetic", names)
        (hint,) = preview_notes(without, taking)
        assert "mp analyze EXPERT --previews" in hint
        assert preview_notes(replace(without, adapter_bytes=1), taking) == []
        assert preview_notes(facts_of_refs(plain, "ties", names), ties) == []
    small = facts_of([Outline("w", {0: [([0], 1.0, 100)]})], question_of("task_arithmetic", (1.0,)))
    assert preview_notes(small, taking) == [], "blocks too small for previews"
