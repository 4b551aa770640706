"""What passes find: summed in one order, kept under what it depends on, and found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.merge import execute, passes
from mergepipe.merge.build import facts_of, jobs_of_plan
from mergepipe.merge.facts import TensorFacts
from mergepipe.merge.inputs import Model
from mergepipe.merge.method import Coefficients, Pass, Problem, Tile
from mergepipe.merge.methods import METHODS
from mergepipe.merge.passes import Totals, keys_of, pack_arrays, recall_all, remember, settle_all, unpack_arrays
from mergepipe.merge.plan import Plan
from mergepipe.store import Store
from mergepipe.store.errors import DamagedError
from mergepipe.store.publish import Changes, publish
from support.merges import ingest_family, make_plan, weights_of, without_weights
from support.stores import catalog_rows, object_files

WEIGHTS = {"math": 0.75, "code": 0.5}
PROBLEM = Problem((4,), {}, ({},), True, (0,), (None,))


def unsettled(store: Store, plan: Plan) -> tuple[list[Model], list[TensorFacts]]:
    """A plan's models, and its tensors that take passes."""
    models, jobs = jobs_of_plan(store, plan)
    facts = facts_of(store, models, jobs, plan.settings, METHODS[plan.method], bounded=False)
    return models, [tensor for tensor in facts.tensors if tensor.places and not tensor.settled]


def pass_rows(store: Store) -> dict[bytes, bytes]:
    """The catalog's rows for tensors that are no histograms of a pair of tensors."""
    return {key: row for key, row in catalog_rows(store, "tensors")["tensors"].items() if len(key) == 32}


def step_with(kind: str, elements: int = 3) -> Pass:
    def state(_: Problem) -> NDArray[Any]:
        return np.zeros(elements, kind)

    def add(_tile: Tile, _: Coefficients, _state: NDArray[Any]) -> None:
        raise AssertionError

    def settle(_: Problem, coefficients: Coefficients, found: NDArray[Any]) -> Coefficients:
        return {**coefficients, "found": found}

    return Pass("test", state, add, settle, uses=("used",))


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.sampled_from(["<f8", "<i8"]), st.data())
def test_parts_are_summed_in_the_blocks_order(seed: int, count: int, kind: str, data: st.DataObject) -> None:
    """Whichever comes first: a sum of floats depends on its order, and may not depend on time."""
    generator = np.random.default_rng(seed)
    parts = (generator.standard_normal((count, 3)) * 10.0 ** generator.integers(-9, 9, (count, 3))).astype(kind)
    expected = np.zeros(3, kind)
    for part in parts:
        expected = expected + part
    totals = Totals(PROBLEM, step_with(kind))
    for index in data.draw(st.permutations(range(count))):
        totals.add(index, parts[index])
    assert totals.total().dtype == expected.dtype
    assert totals.total().tobytes() == expected.tobytes()


arrays = st.dictionaries(
    st.text(max_size=5),
    st.builds(
        lambda kind, shape, seed: np.random.default_rng(seed).integers(0, 99, shape).astype(kind),
        st.sampled_from(["<f4", "<f8", "<i8", "<u4", "|b1"]),
        st.sampled_from([(), (0,), (3,), (2, 3), (1, 0, 4)]),
        st.integers(0, 9),
    ),
    max_size=3,
)


@given(arrays)
def test_arrays_survive_their_row(found: dict[str, NDArray[Any]]) -> None:
    again = unpack_arrays(pack_arrays(found))
    assert list(again) == list(found)
    for name, array in found.items():
        assert (again[name].dtype, again[name].shape) == (array.dtype, array.shape)
        assert again[name].tobytes() == array.tobytes()


@given(arrays, st.data())
def test_a_changed_row_is_read_or_called_damaged(found: dict[str, NDArray[Any]], data: st.DataObject) -> None:
    """No other error, whatever happened to it."""
    row = bytearray(pack_arrays(found))
    place = data.draw(st.integers(0, len(row) - 1))
    if data.draw(st.booleans()):
        row[place] = data.draw(st.integers(0, 255))
    else:
        del row[place:]
    try:
        unpack_arrays(bytes(row))
    except DamagedError as error:
        assert "mp verify" in str(error.hint)


def row_with(head: Any, body: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(4, "little") + text + body


@pytest.mark.parametrize(
    "row",
    [
        b"", b"\0", b"\xff\xff\xff\xff", row_with(b"{"), row_with(b"\xff"), row_with(1), row_with([1]), row_with([[]]),
        row_with({"state": 1}), row_with([["state", "<f8"]]), row_with([["state", "<f8", [1]]]),
        row_with([["state", "<f8", [1]]], b"1234567"), row_with([["state", "<f8", [1]]], b"123456789"),
        row_with([["state", "|O", [1]]], b"12345678"), row_with([["state", "zz", [1]]], b"12345678"),
        row_with([["state", "<f8", [-1]]], b"12345678"), row_with([["state", "<f8", "ab"]], b"12345678"),
        row_with([["state", "<f8", [1 << 70]]], b"12345678"), row_with([["state", "<f8", [1 << 40, 1 << 40]]]),
        row_with([["state", "<f8", {"a": 1}]], b"12345678"), row_with(b"[" * 60_000), row_with([], b"1"),
        row_with([["state", "|V0", [1]]]), row_with([[["a"], "<f8", [1]]], b"12345678"),
    ],
    ids=lambda row: repr(row[4:34]),
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_called_damaged(row: bytes) -> None:
    with pytest.raises(DamagedError, match="what is kept of a pass cannot be read"):
        unpack_arrays(row)


@pytest.mark.parametrize("row", [b"\0\0\0\0", row_with([]), row_with([["other", "<f8", [1]]], b"12345678")])
def test_a_kept_state_that_is_damaged_stops_a_merge(family: Store, row: bytes) -> None:
    execute(family, make_plan(family, "slerp", {"math": 1.0}), "merged")
    rows = pass_rows(family)
    publish(family.catalog, None, Changes(tensors=dict.fromkeys(rows, row)))
    again = make_plan(family, "slerp", {"math": 1.0}, t=0.5)
    with pytest.raises(DamagedError, match="what is kept of a pass"):
        execute(family, again, "merged")
    execute(family, again, "merged", use_cache=False)
    assert pass_rows(family) == rows, "made anew"


def test_a_sweep_over_a_parameter_that_the_pass_does_not_use_reads_for_it_once(hurt_family: Store) -> None:
    """For slerp's t: plans under a budget need no weights once one was made."""
    first = make_plan(hurt_family, "slerp", {"math": 1.0}, budget="50%", t=0.3)
    rows = pass_rows(hurt_family)
    assert len(rows) == len(first.tensors)
    without_weights(hurt_family)
    bounds = {make_plan(hurt_family, "slerp", {"math": 1.0}, budget="50%", t=t).bound.absolute for t in (0.1, 0.3, 0.9)}
    assert len(bounds) == 3
    assert pass_rows(hurt_family) == rows
    for other in ({"base": "code", "t": 0.3}, {"t": 0.3}):
        experts = {"code": 1.0} if "base" not in other else {"math": 1.0}
        with pytest.raises(DamagedError):
            make_plan(hurt_family, "slerp", experts, budget="50%", **other)


def test_what_a_merge_found_serves_a_plan_and_the_other_way_round(hurt_family: Store) -> None:
    execute(hurt_family, make_plan(hurt_family, "model_stock", WEIGHTS), "merged")
    rows = pass_rows(hurt_family)
    assert rows
    without_weights(hurt_family)
    assert make_plan(hurt_family, "model_stock", WEIGHTS, budget="50%").bound.update
    assert pass_rows(hurt_family) == rows


@pytest.mark.parametrize(("method", "kept"), [("slerp", "state"), ("model_stock", "state"), ("ties", "settled")])
def test_small_states_are_kept_and_large_ones_as_what_follows(family: Store, method: str, kept: str) -> None:
    """A Gram matrix is some bytes. A count for each of 65,536 magnitudes is not: its thresholds are."""
    experts = {"math": 1.0} if method == "slerp" else WEIGHTS
    plan = make_plan(family, method, experts)
    _, tensors = unsettled(family, plan)
    assert tensors
    execute(family, plan, "merged")
    rows = pass_rows(family)
    for facts in tensors:
        (step,) = METHODS[method].passes(facts.problem)
        keys = keys_of(METHODS[method], step, facts.job, facts.problem, facts.coefficients)
        assert {"state": keys.state, "settled": keys.settled}[kept] in rows
        assert {"state": keys.settled, "settled": keys.state}[kept] not in rows
    assert all(len(row) < 70_000 for row in rows.values())


@pytest.mark.parametrize("method", ["slerp", "model_stock", "ties", "sce", "dare_linear"])
def test_what_is_recalled_is_what_was_found(family: Store, method: str) -> None:
    plan = make_plan(family, method, {"math": 1.0} if method == "slerp" else WEIGHTS)
    found, (models, tensors) = METHODS[method], unsettled(family, plan)
    facts = tensors[0]
    with family.catalog.reading() as view:
        assert recall_all(view, found, facts.job, facts.problem, facts.coefficients) is None
    read = settle_all(family, models, [facts], found)
    differing = {block for entry in facts.job.experts for block in entry.blocks} - set(facts.entry.blocks)
    assert read == facts.passes * sum(object_files(family)[block.hex()] for block in differing)
    with family.catalog.reading() as view:
        known = recall_all(view, found, facts.job, facts.problem, facts.coefficients)
        other = replace(facts.job, experts=(*facts.job.experts[:-1], tensors[1].job.experts[0]))
        assert recall_all(view, found, other, facts.problem, facts.coefficients) is None
    assert known is not None
    assert settle_all(family, models, [facts], found) == read
    with family.catalog.reading() as view:
        again = recall_all(view, found, facts.job, facts.problem, facts.coefficients)
    assert again is not None
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in known.items()
    }


@pytest.mark.parametrize("elements", [10, 100_000])
def test_rows_are_under_all_that_they_depend_on(family: Store, elements: int) -> None:
    """A state under its inputs and the coefficients that it uses; what follows from it under all parameters as well."""
    _, tensors = unsettled(family, make_plan(family, "slerp", {"math": 1.0}))
    job, method, step = tensors[0].job, METHODS["slerp"], step_with("<f8", elements)
    problem = tensors[0].problem
    before = {"used": np.array(1.0), "other": np.array(2.0)}
    state = np.arange(elements, dtype=np.float64)
    after = {"found": state[:3]}
    rows = remember(method, step, job, problem, before, state, after)
    small = elements == 10

    def same(**changes: Any) -> bool:
        given: dict[str, Any] = {"method": method, "step": step, "job": job, "problem": problem, "before": before}
        given.update(changes)
        return remember(**given, state=state, after=after).keys() == rows.keys()

    assert same()
    assert same(before={**before, "other": np.array(3.0)}) == small
    assert same(problem=replace(problem, parameters={"t": 0.9})) == small
    assert not same(before={**before, "used": np.array(3.0)})
    assert not same(before={**before, "used": np.array(1.0, np.float32)})
    assert not same(problem=replace(problem, based=not problem.based))
    assert not same(step=replace(step, name="another"))
    assert same(method=replace(method, version=99)) == small
    assert not same(job=replace(job, experts=tensors[1].job.experts))
    assert not same(job=replace(job, reference=tensors[1].job.reference))
    publish(family.catalog, None, Changes(tensors=rows))
    with family.catalog.reading() as view:
        recalled = passes.recall(view, method, step, job, problem, before)
    assert recalled is not None
    assert recalled["found"].tolist() == (state if small else state[:3]).tolist()


def test_passes_give_the_numbers_themselves(store: Store, tmp_path: Path) -> None:
    """Blocks of any length, put together: the inner products that NumPy finds in float64."""
    generator = np.random.default_rng(0)
    base = {"w": generator.standard_normal((70, 41)).astype(np.float32)}
    tuned = {name: {"w": generator.standard_normal((70, 41)).astype(np.float32)} for name in "ab"}
    ingest_family(store, tmp_path, base, tuned)
    execute(store, make_plan(store, "multislerp", {"a": 1.0, "b": 1.0}), "merged")
    (row,) = pass_rows(store).values()
    deltas = [weights_of(store, name)["w"] - base["w"] for name in "ab"]
    expected = [[float((x.astype(np.float64) * y).sum()) for y in deltas] for x in deltas]
    np.testing.assert_allclose(unpack_arrays(row)["state"], np.triu(expected), rtol=1e-12)


@pytest.mark.parametrize("base", ["base", None])
def test_methods_that_take_the_same_of_the_experts_share_it(hurt_family: Store, base: str | None) -> None:
    """One reading of the tensors for both: of their deltas where there is a base, of their weights where not."""
    execute(hurt_family, make_plan(hurt_family, "multislerp", WEIGHTS, base=base), "merged")
    rows = pass_rows(hurt_family)
    execute(hurt_family, make_plan(hurt_family, "nuslerp", WEIGHTS, base=base), "merged")
    assert pass_rows(hurt_family) == rows
    execute(hurt_family, make_plan(hurt_family, "nuslerp", WEIGHTS, base=None if base else "base"), "merged")
    assert len(pass_rows(hurt_family)) > len(rows)
