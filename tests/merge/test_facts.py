"""What is gathered of the inputs: who differs where, what reading it costs, and how large it is at most."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from mergepipe.merge.facts import norm_bound
from mergepipe.store import Digest, Store
from mergepipe.store.codecs import Bytes
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import UsageError
from mergepipe.store.frame import Encoding
from mergepipe.store.statistics import DeltaStatistics, block_statistics
from support.family import Weights, base_weights, fine_tune
from support.merges import facts_of_refs, ingest_family, ingest_model, make_plan
from support.stores import object_path

ROWS = 3000  # of float32: blocks of 1024 elements, so three, and the last one shorter


def vector(*parts: float) -> Weights:
    """A tensor whose blocks are filled with one number each."""
    return {"w": np.repeat(np.array(parts, np.float32), 1024)[:ROWS]}


def stored(store: Store, digest: Digest) -> int:
    return object_path(store, digest).stat().st_size


def test_experts_with_one_block_are_one_group_and_the_bases_own_are_none(store: Store, tmp_path: Path) -> None:
    experts = {"a": vector(0, 2, 3), "b": vector(0, 2, 4), "c": vector(0, 5, 0)}
    ingest_family(store, tmp_path, vector(0, 0, 0), experts)
    (facts,) = facts_of_refs(store, "linear", ["a", "b", "c"]).tensors
    assert [(place.index, [group.experts for group in place.groups]) for place in facts.places] == [
        (1, [(0, 1), (2,)]),
        (2, [(0,), (1,)]),
    ]
    entries = {name: store.snapshot(name).entry("w") for name in ("base", "a", "b", "c")}
    assert facts.places[0].groups[0].block == entries["a"].blocks[1] == entries["b"].blocks[1]
    assert facts.places[0].groups[0].norm == pytest.approx(2 * 32, rel=1e-5)
    assert facts.places[1].groups[1].norm == pytest.approx(4 * math.sqrt(ROWS - 2048), rel=1e-5)
    for place in facts.places:
        assert place.base_bytes == facts.base_bytes[place.index] == stored(store, entries["base"].blocks[place.index])
        for group in place.groups:
            assert group.stored_bytes == stored(store, group.block)


def test_histograms_are_for_methods_that_trim(store: Store, tmp_path: Path) -> None:
    ingest_family(store, tmp_path, vector(0, 0, 0), {"a": vector(0, 2, 3), "same": vector(0, 0, 0)})
    (facts,) = facts_of_refs(store, "linear", ["a", "same"]).tensors
    assert facts.problem.histograms == (None, None)
    for bounded in (True, False):
        (facts,) = facts_of_refs(store, "ties", ["a", "same"], bounded=bounded).tensors
        assert len(facts.problem.histograms) == 2
        assert facts.problem.histograms[1] is None
        assert facts.problem.histograms[0] is not None
        assert int(facts.problem.histograms[0].sum()) == ROWS


def test_norms_and_sketches_are_for_budgets(store: Store, tmp_path: Path) -> None:
    ingest_family(store, tmp_path, vector(0, 0, 0), {"a": vector(0, 2, 3), "b": vector(1, 0, 0)})
    for bounded in (True, False):
        facts = facts_of_refs(store, "linear", ["a", "b"], bounded=bounded)
        assert facts.bounded == bounded
        groups = [group for place in facts.tensors[0].places for group in place.groups]
        assert len(groups) == 3
        assert all(math.isnan(group.norm) != bounded for group in groups)
        assert all((group.sketch is None) != bounded for group in groups)
        assert all(group.stored_bytes == stored(store, group.block) for group in groups)


def test_coefficients_are_settled_for_budgets(store: Store, tmp_path: Path) -> None:
    """The angle is known once its tensors were read; of a tensor without a difference nobody asks."""
    base = {**vector(1, 2, 3), "same": np.ones(10, np.float32)}
    ingest_family(store, tmp_path, base, {"a": {**base, **vector(3, 2, 1)}})
    loose = {facts.name: facts for facts in facts_of_refs(store, "slerp", ["a"], bounded=False).tensors}
    assert not loose["w"].settled
    assert loose["w"].passes == 1
    assert set(loose["w"].coefficients) == {"t"}
    final = {facts.name: facts for facts in facts_of_refs(store, "slerp", ["a"]).tensors}
    assert final["w"].settled
    assert {"factors", "base_factor"} <= set(final["w"].coefficients)
    assert not final["same"].settled


def test_rows_that_are_longer_than_a_block_are_for_methods_that_need_no_rows(store: Store, tmp_path: Path) -> None:
    """Half a row is none: no tile would be whole rows. A row that nobody changes is in nobody's way."""
    experts = {"a": vector(0, 2, 3), "b": vector(0, 2, 4), "same": vector(0, 0, 0), "too": vector(0, 0, 0)}
    ingest_family(store, tmp_path, vector(0, 0, 0), experts)
    for method in ("della", "model_stock", "nuslerp"):
        with pytest.raises(UsageError, match=f"{method} needs whole rows, and those of 'w' are longer than a block"):
            make_plan(store, method, {"a": 0.5, "b": 0.5})
        assert not make_plan(store, method, {"same": 0.5, "too": 0.5}).tensors
    with pytest.raises(UsageError, match="needs whole rows"):
        make_plan(store, "arcee_fusion", {"a": 1.0})


def test_integers_have_no_places(store: Store, tmp_path: Path) -> None:
    base: Weights = {"ids": np.arange(4), "mask": np.array([True]), "w": np.ones(4, np.float32)}
    ingest_family(
        store, tmp_path, base, {"a": {"ids": np.arange(4) + 1, "mask": np.array([False]), "w": base["w"] * 2}}
    )
    places = {facts.name: facts.places for facts in facts_of_refs(store, "ties", ["a"]).tensors}
    assert places["ids"] == places["mask"] == ()
    assert len(places["w"]) == 1


def test_a_delta_to_another_block_costs_that_one_too(store: Store, tmp_path: Path) -> None:
    """Stored against another model than the merge's base: both files are read."""
    base = base_weights()
    other = fine_tune(base, 5, scale=1e-2)
    ingest_model(store, tmp_path, "base", base)
    ingest_model(store, tmp_path, "other", other)
    ingest_model(store, tmp_path, "math", fine_tune(other, 6), base="other")
    found = 0
    for facts in facts_of_refs(store, "linear", ["math"]).tensors:
        for place in facts.places:
            (group,) = place.groups
            with store.catalog.reading() as view:
                row = view.object_row(group.block)
            assert row is not None
            if row.encoding is Encoding.DELTA:
                assert row.base == store.snapshot("other").entry(facts.name).blocks[place.index]
                assert group.stored_bytes == stored(store, group.block) + stored(store, row.base)
                found += 1
            else:
                assert group.stored_bytes == stored(store, group.block)
    assert found > 5


def test_a_fine_tune_as_the_base_costs_what_it_is_a_delta_to(store: Store, tmp_path: Path) -> None:
    """And an expert that is a delta to the same block costs itself alone: that block is at hand."""
    base = base_weights()
    ingest_family(store, tmp_path, base, {"math": fine_tune(base, 1), "code": fine_tune(base, 2)})
    deltas = 0
    for facts in facts_of_refs(store, "linear", ["code"], base="math").tensors:
        for place in facts.places:
            with store.catalog.reading() as view:
                row, expert = (
                    view.object_row(block) for block in (facts.entry.blocks[place.index], place.groups[0].block)
                )
            assert row is not None
            assert expert is not None
            if row.base is not None:
                assert place.base_bytes == row.stored_bytes + stored(store, row.base)
                assert place.groups[0].stored_bytes == expert.stored_bytes
                deltas += 1
    assert deltas > 5


magnitudes = st.one_of(
    st.floats(-(2.0**59), 2.0**59, width=32),
    st.sampled_from([0.0, 1e-45, 1e-30, 1.0842022e-19, 5e-20, 1e-3, 1.0, 2.0**59]),
)


def measured(delta: np.ndarray) -> DeltaStatistics:
    kind = DTYPES["F32"]
    new: Bytes = np.ascontiguousarray(delta).view(np.uint8)
    return block_statistics(new, np.zeros_like(new), kind, kind, None)


@given(stn.arrays(np.float32, st.integers(1, 300), elements=magnitudes))
def test_the_norm_is_never_too_small(delta: np.ndarray) -> None:
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in delta))
    assert exact <= norm_bound(measured(delta)) * (1 + 1e-15)


@pytest.mark.parametrize("size", [1, 64, 5000, 300_000])
def test_the_norm_is_hardly_too_large(size: int) -> None:
    delta = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in delta))
    assert exact <= norm_bound(measured(delta)) <= exact * (1 + 1e-5)
    assert norm_bound(measured(np.zeros(size, np.float32))) == 0.0


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e30])
def test_there_is_no_norm_of_what_is_not_finite_when_squared(odd: float) -> None:
    assert not math.isfinite(norm_bound(measured(np.array([1.0, odd, 2.0], np.float32))))


def test_facts_of_two_stores_are_the_same(make_store: Callable[..., Store], tmp_path: Path) -> None:
    base = base_weights()
    found = []
    for number in range(2):
        store = make_store()
        ingest_family(store, tmp_path / str(number), base, {"math": fine_tune(base, 1)})
        facts = facts_of_refs(store, "linear", ["math"], bounded=False).tensors
        found.append([(f.name, f.entry, [repr(place) for place in f.places], f.base_bytes) for f in facts])
    assert found[0] == found[1]
