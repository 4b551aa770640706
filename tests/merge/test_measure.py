"""Statistics that are missing: of virtual blocks they are those of the blocks that they stand for."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge import Expert, plan_merge
from mergepipe.merge.build import jobs_of_plan
from mergepipe.merge.facts import Missing
from mergepipe.merge.inputs import Model, open_models
from mergepipe.merge.measure import measure_missing
from mergepipe.merge.plan import Input
from mergepipe.store import Store
from mergepipe.store.errors import DamagedError
from mergepipe.store.statistics import unpack_histogram, unpack_statistics
from support.family import base_weights, fine_tune
from support.merges import ingest_family, without_weights
from support.stores import catalog_rows, state_of
from support.virtual import NORM, UP, Q, ingest_both

KINDS = {"lora": "adapter", "small": "adapter", "tv": "task_vector"}


def models_with(store: Store, name: str) -> list[Model]:
    inputs = [Input(store.resolve("base"), "base"), Input(store.resolve(name), name, {}, KINDS.get(name, "model"))]
    return open_models(store, inputs)


def gaps_of(models: list[Model], *names: str) -> list[Missing]:
    return [Missing(models[0].tensors[name], models[1].tensors[name]) for name in names]


@pytest.mark.parametrize(("name", "tensors"), [("lora", (Q, UP)), ("small", (Q,)), ("tv", (UP, NORM))])
def test_virtual_blocks_are_measured_as_the_blocks_that_they_stand_for(
    store: Store, tmp_path: Path, name: str, tensors: tuple[str, ...]
) -> None:
    ingest_both(store, tmp_path)
    models, whole = models_with(store, name), models_with(store, f"{name}-whole")
    before = catalog_rows(store, "deltas", "tensors")
    measure_missing(store, models, gaps_of(models, *tensors))
    after = catalog_rows(store, "deltas", "tensors")
    count = 0
    for tensor in tensors:
        base, virtual, real = models[0].tensors[tensor], models[1].tensors[tensor], whole[1].tensors[tensor]
        for own, block, stands_for in zip(base.blocks, virtual.blocks, real.blocks, strict=True):
            assert own + block not in before["deltas"]
            assert after["deltas"][own + block] == before["deltas"][own + stands_for]
            assert unpack_statistics(after["deltas"][own + block]).changed > 0
            count += 1
        found = unpack_histogram(after["tensors"][base.id + virtual.id])
        np.testing.assert_array_equal(found, unpack_histogram(before["tensors"][base.id + real.id]))
        assert int(found.sum()) == base.elements
    assert len(after["deltas"]) - len(before["deltas"]) == count
    assert len(after["tensors"]) - len(before["tensors"]) == len(tensors)


def test_whole_models_are_measured_by_the_store(store: Store, tmp_path: Path) -> None:
    """Both kinds in one call, each pair once."""
    ingest_both(store, tmp_path)
    known = catalog_rows(store, "deltas", "tensors")
    store.catalog.write(lambda view: [view.delete(db, key) for db, rows in known.items() for key in rows])
    models, whole = models_with(store, "lora"), models_with(store, "lora-whole")
    both = [models[0], models[1], whole[1]]
    measure_missing(store, both, [*gaps_of(models, Q), *gaps_of(whole, Q, UP)])
    after = catalog_rows(store, "deltas", "tensors")
    for tensor in (Q, UP):
        key = models[0].tensors[tensor].id + whole[1].tensors[tensor].id
        assert after["tensors"][key] == known["tensors"][key]
    assert models[0].tensors[Q].id + models[1].tensors[Q].id in after["tensors"]
    assert models[0].tensors[UP].id + models[1].tensors[UP].id not in after["tensors"]


def test_a_plan_measures_what_it_needs_once(hurt_store: Store, tmp_path: Path) -> None:
    """Later plans need no weights, neither of the model nor of the adapter."""
    ingest_both(hurt_store, tmp_path)
    experts = [Expert("lora", {"weight": 0.5}), Expert("tv", {"weight": 0.5}, "task_vector")]
    first = plan_merge(hurt_store, "base", experts, "ties")
    assert first.bound.update is None
    known = catalog_rows(hurt_store, "deltas", "tensors")
    jobs_of_plan(hurt_store, first)
    without_weights(hurt_store)
    assert plan_merge(hurt_store, "base", experts, "ties").encode() == first.encode()
    assert catalog_rows(hurt_store, "deltas", "tensors") == known


def test_progress_counts_the_decoded_bytes(store: Store, tmp_path: Path) -> None:
    ingest_both(store, tmp_path)
    models = models_with(store, "lora")
    seen: list[tuple[str, int, int]] = []
    lock = threading.Lock()

    def progress(stage: str, done: int, total: int) -> None:
        with lock:
            seen.append((stage, done, total))

    gaps = gaps_of(models, Q, UP)
    measure_missing(store, models, gaps, progress)
    total = sum(gap.expert.nbytes for gap in gaps)
    assert {(stage, size) for stage, _, size in seen} == {("analyze", total)}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == total


def test_nothing_missing_changes_nothing(family: Store) -> None:
    before = state_of(family)
    measure_missing(family, models_with(family, "math"), [])
    assert state_of(family) == before


@pytest.mark.parametrize("name", ["lora", "tv"])
def test_what_cannot_be_read_is_not_made_up(hurt_store: Store, tmp_path: Path, name: str) -> None:
    ingest_both(hurt_store, tmp_path)
    models = models_with(hurt_store, name)
    without_weights(hurt_store)
    before = catalog_rows(hurt_store, "deltas", "tensors")
    with pytest.raises(DamagedError):
        measure_missing(hurt_store, models, gaps_of(models, UP))
    assert catalog_rows(hurt_store, "deltas", "tensors") == before


def test_pairs_that_nobody_compared_are_those_of_ingest(store: Store, tmp_path: Path) -> None:
    base = base_weights()
    ingest_family(store, tmp_path, base, {"math": fine_tune(base, 1)})
    known = catalog_rows(store, "deltas", "tensors")
    store.catalog.write(lambda view: [view.delete(db, key) for db, rows in known.items() for key in rows])
    models = models_with(store, "math")
    differing = [name for name in base if models[0].tensors[name] != models[1].tensors[name]]
    measure_missing(store, models, gaps_of(models, *differing))
    assert catalog_rows(store, "deltas", "tensors") == known
