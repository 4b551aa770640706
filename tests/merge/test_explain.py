"""What a plan reads, tensor by tensor and expert by expert."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge.explain import explain
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError
from support.family import Weights, base_weights, fine_tune
from support.merges import FAMILIES, blocks_of, ingest_family, make_plan, without_weights


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
            assert part.read == len(planned.reads[number])
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
    assert (large_part.differing, large_part.read) == (3, 2)
    assert large_part.reason == "read in part, by gain for each byte"
    assert (small_part.differing, small_part.read) == (1, 0)
    assert small_part.reason == "left out: gains less for its bytes than what is read"
    assert (same_part.differing, same_part.reason) == (0, "is the base's own")
    whole = make_plan(store, "linear", {"large": 1.0})
    assert explain(store, whole)[0].experts[0].reason == "read whole"


def test_an_edited_plan_is_not_explained(shared_family: Store) -> None:
    from dataclasses import replace

    plan = make_plan(shared_family, "linear", {"math": 1.0}, budget="30%")
    with pytest.raises(BadInputError):
        explain(shared_family, replace(plan, bound=replace(plan.bound, absolute=0.0)))
