"""Facts in, a plan out: nothing is read, the same question has the same answer, and a larger budget a better one."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from mergepipe.merge.budget import Budget
from mergepipe.merge.build import facts_of as gather_facts
from mergepipe.merge.build import jobs_of_plan
from mergepipe.merge.method import Value
from mergepipe.merge.methods import METHODS as ALL_METHODS
from mergepipe.merge.methods import find_method
from mergepipe.merge.methods.thresholds import Cut, cut_at_bins
from mergepipe.merge.plan import Bound, Costs
from mergepipe.merge.planner import make_plan
from mergepipe.store import Store
from mergepipe.store.errors import BudgetError, UsageError
from mergepipe.store.norms import HISTOGRAM_BINS
from support.facts import (
    Outline,
    Problem,
    Question,
    draft_for,
    facts_of,
    input_named,
    plan_of,
    problems,
    question_of,
)
from support.family import base_weights, fine_tune
from support.merges import FAMILIES, METHODS, ingest_family, weights_of, without_weights
from support.merges import make_plan as plan_of_refs
from support.processes import run_python
from support.stores import catalog_rows


@given(problems(), st.integers(0, 2000))
def test_the_same_question_has_the_same_answer_and_leaves_the_facts_alone(problem: Problem, size: int) -> None:
    tensors, question, dtype = problem
    draft, method, budget = draft_for(question, dtype), ALL_METHODS[question[0]], Budget(size_bytes=size)
    facts = facts_of(tensors, question)
    before = pickle.dumps(facts)
    first = make_plan(draft, facts, method, budget).encode()
    assert make_plan(draft, pickle.loads(before), method, budget).encode() == first
    assert make_plan(draft, facts_of(tensors, question), method, budget).encode() == first
    assert pickle.dumps(facts) == before


@given(problems(), st.lists(st.integers(0, 4000), min_size=2, max_size=6))
def test_a_larger_budget_never_has_a_larger_bound(problem: Problem, sizes: list[int]) -> None:
    tensors, question, dtype = problem
    last = math.inf
    for size in sorted(sizes):
        plan = plan_of(tensors, question, Budget(size_bytes=size), dtype)
        assert plan.costs.expert_bytes <= size
        assert plan.bound.absolute <= last * (1 + 1e-12)
        last = plan.bound.absolute


@given(problems(), st.integers(0, 2000))
def test_costs_are_those_of_the_reads(problem: Problem, size: int) -> None:
    """Counted again from the plan: each group once, the base wherever something is computed."""
    tensors, question, dtype = problem
    plan = plan_of(tensors, question, Budget(size_bytes=size), dtype)
    whole = plan.bound.update is None  # then Gram matrices are found in the merge, which reads all of a tensor
    method = ALL_METHODS[question[0]]
    found = facts_of(tensors, question, bounded=not whole).tensors
    expert = full = base = computed = total = 0
    for tensor in found:
        reads = plan.tensors[tensor.name].reads if tensor.name in plan.tensors else ((),) * len(question[1])
        for place in tensor.places:
            for group in place.groups:
                read = {place.index in reads[member] for member in group.experts}
                assert len(read) == 1, "experts that share a block are read together"
                expert += group.stored_bytes * read.pop()
                full += group.stored_bytes
        everywhere = dtype is not None or not method.keeps(tensor.problem, tensor.coefficients)
        touched = set(range(4)) if everywhere else set().union(*reads)
        passed = whole and method.passes(tensor.problem) and (tensor.places or (everywhere and dtype is None))
        base += sum(tensor.base_bytes[index] for index in (range(4) if passed else touched))
        computed += len(touched)
        total += len(tensor.entry.blocks)
    assert (plan.costs.expert_bytes, plan.costs.expert_bytes_full) == (expert, full)
    assert (plan.costs.base_bytes, plan.costs.computed_blocks) == (base, computed)
    assert plan.costs.referenced_blocks == total - computed


@given(problems(), st.integers(0, 2000))
def test_the_models_bound_is_made_of_its_tensors(problem: Problem, size: int) -> None:
    tensors, question, dtype = problem
    plan = plan_of(tensors, question, Budget(size_bytes=size), dtype)
    together = math.sqrt(math.fsum(tensor.bound**2 for tensor in plan.tensors.values()))
    assert together == pytest.approx(plan.bound.absolute)
    assert plan.bound.estimate <= plan.bound.absolute
    if plan.bound.update is None:
        assert plan.costs.expert_bytes == plan.costs.expert_bytes_full
        assert (plan.bound.absolute, plan.bound.relative, plan.bound.estimate) == (0, 0, 0)
        return
    assert plan.bound.absolute <= plan.bound.update * (1 + 1e-12)
    if plan.bound.update:
        assert plan.bound.relative == pytest.approx(plan.bound.absolute / plan.bound.update)


@given(problems())
def test_a_full_budget_is_no_budget(problem: Problem) -> None:
    tensors, question, dtype = problem
    free = plan_of(tensors, question, Budget(), dtype)
    share = plan_of(tensors, question, Budget(share=1.0), dtype)
    assert replace(share, budget_bytes=None) == free
    assert free.bound == Bound(0.0, 0.0, 0.0, None)
    assert share.budget_bytes == free.costs.expert_bytes == free.costs.expert_bytes_full


@given(problems())
def test_no_budget_reads_no_expert(problem: Problem) -> None:
    tensors, question, dtype = problem
    plan = plan_of(tensors, question, Budget(size_bytes=0), dtype)
    assert plan.costs.expert_bytes == 0
    assert not any(any(tensor.reads) for tensor in plan.tensors.values())
    assert plan.bound.absolute == (plan.bound.update or 0.0)
    assert (plan.bound.update is None) == (plan.costs.expert_bytes_full == 0)


@given(problems(), st.floats(0, 1))
def test_an_error_is_kept_and_nothing_smaller_would_keep_it(problem: Problem, error: float) -> None:
    tensors, question, dtype = problem
    plan = plan_of(tensors, question, Budget(relative_error=error), dtype)
    assert plan.budget_bytes is None
    assert plan.bound.relative <= error * (1 + 1e-9)
    if plan.costs.expert_bytes:  # a byte less in the same order of reading does not do
        less = plan_of(tensors, question, Budget(relative_error=error * (1 + 1e-6) + 1e-9), dtype)
        assert less.costs.expert_bytes <= plan.costs.expert_bytes


def test_an_error_of_nothing_reads_what_matters_and_one_of_everything_nothing() -> None:
    tensors = [Outline("w", {0: [([0], 3.0, 100)], 1: [([0, 1], 0.0, 100)], 3: [([1], 4.0, 150)]})]
    question = question_of("task_arithmetic", (1.0, 1.0))
    assert plan_of(tensors, question, Budget(relative_error=0.0)).tensors["w"].reads == ((0,), (3,))
    assert plan_of(tensors, question, Budget(relative_error=1.0)).costs.expert_bytes == 0
    assert plan_of(tensors, question, Budget(relative_error=0.61)).tensors["w"].reads == ((), (3,))


def test_what_has_no_bound_is_read_for_an_error_too() -> None:
    tensors = [Outline("w", {0: [([0], math.nan, 100)], 1: [([0], 3.0, 100)], 2: [([0], 4.0, 100)]})]
    plan = plan_of(tensors, question_of("linear", (1.0,)), Budget(relative_error=0.61))
    assert plan.tensors["w"].reads == ((0, 2),)
    assert plan.bound.absolute == pytest.approx(3.0)
    assert plan.bound.relative == pytest.approx(0.6)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize(("weight", "scale"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("method", [*METHODS, "dare_linear", "breadcrumbs"])
def test_without_a_bound_there_is_no_plan(method: str, weight: float, scale: float, norm: float) -> None:
    """Also with a weight or a lambda of zero: zero times infinity is a NaN."""
    tensors = [Outline("fine", {0: [([0], 1.0, 100)]}), Outline("odd", {2: [([0, 1], norm, 100)]})]
    known = {parameter.name for parameter in find_method(method).parameters}
    given = {name: value for name, value in {"lambda": scale, "exact": False}.items() if name in known}
    question = question_of(method, (weight, 1.0), **given)
    with pytest.raises(BudgetError, match="no bound exists while 'odd' is not read whole"):
        plan_of(tensors, question, Budget(size_bytes=99))
    assert plan_of(tensors, question, Budget(size_bytes=100)).tensors["odd"].reads == ((2,), (2,))
    assert plan_of(tensors, question, Budget()).bound.absolute == 0.0


def test_a_method_without_a_bound_has_to_read_everything() -> None:
    """Rows with arcs of their own: no factor for the tensor, and so no bound, not even for a delta of zeros."""
    for norm in (1.0, 0.0):
        tensors = [Outline("w", {0: [([0], norm, 100)], 1: [([1], norm, 100)]})]
        question = question_of("model_stock", (1.0, 1.0), filter_wise=True)
        with pytest.raises(BudgetError, match="a method that has none"):
            plan_of(tensors, question, Budget(size_bytes=199))
        assert plan_of(tensors, question, Budget(size_bytes=200)).costs.expert_bytes == 200


def test_ties_with_weights_of_both_signs_has_to_read_everything() -> None:
    tensors = [Outline("w", {0: [([0], 1.0, 100)], 1: [([1], 1.0, 100)]})]
    for normalize in (True, False):
        question = question_of("ties", (1.0, -1.0), normalize=normalize)
        assert plan_of(tensors, question, Budget(size_bytes=200)).bound.absolute == 0.0
        if normalize:
            with pytest.raises(BudgetError, match="weights of both signs"):
                plan_of(tensors, question, Budget(size_bytes=199))
        else:  # by Cauchy and Schwarz, the root of two times what is missing
            assert plan_of(tensors, question, Budget(size_bytes=199)).bound.absolute == pytest.approx(
                math.sqrt(2), 1e-5
            )


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (0.1, 0.2, -0.3), (1e30, -1e30, 1e-5)])
def test_weights_that_sum_to_zero_cannot_be_normalized(weights: tuple[float, ...]) -> None:
    tensors = [Outline("w", {0: [([0], 1.0, 100)]})]
    with pytest.raises(UsageError, match="sum to zero"):
        plan_of(tensors, question_of("linear", weights), Budget())
    plan_of(tensors, question_of("linear", weights, normalize=False), Budget())


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_weights_whose_sum_is_no_float32_cannot_be_normalized(method: str) -> None:
    with pytest.raises(UsageError, match="too large together"):
        plan_of([Outline("w", {0: [([0], 1.0, 100)]})], question_of(method, (3e38, 3e38), normalize=True), Budget())


@pytest.mark.parametrize(
    ("method", "normalize", "weights", "kept"),
    [
        ("linear", True, (0.3, 0.3), True),
        ("linear", False, (0.3, 0.7), True),
        ("linear", False, (0.3, 0.3), False),
        ("task_arithmetic", False, (0.3, 0.3), True),
        ("ties", False, (5.0, 5.0), True),
    ],
)
def test_where_no_expert_differs_the_base_is_kept(
    method: str, normalize: bool, weights: tuple[float, float], kept: bool
) -> None:
    """But for an average whose weights do not sum to one: that scales every tensor."""
    tensors = [Outline("same", {}), Outline("w", {1: [([0], 1.0, 100)]})]
    plan = plan_of(tensors, question_of(method, weights, normalize=normalize), Budget())
    assert set(plan.tensors) == ({"w"} if kept else {"same", "w"})
    assert plan.costs.computed_blocks == (1 if kept else 8)


def test_a_tensor_in_which_nobody_differs_is_not_read_for_its_angle() -> None:
    """Where equal inputs give themselves; what the places of another tensor become is known after its pass alone."""
    tensors = [Outline("same", {}), Outline("w", {1: [([0], 1.0, 100)]})]
    plan = plan_of(tensors, question_of_slerp(0.5), Budget())
    assert set(plan.tensors) == {"w"}
    assert (plan.costs.computed_blocks, plan.costs.base_bytes) == (4, 500 + 501 + 502 + 503)


def question_of_slerp(t: float) -> Question:
    return "slerp", [input_named("a")], {"t": t}


@pytest.mark.parametrize(("dtype", "fits"), [("BF16", True), (None, True), ("F32", True), ("F64", False)])
def test_a_type_that_makes_blocks_too_large_is_refused(dtype: str | None, fits: bool) -> None:
    """Results are cut as their base is, so blocks of 64 MiB have no wider type."""
    question = question_of("task_arithmetic", (1.0,))
    facts = facts_of([Outline("w", {0: [([0], 1.0, 100)]}, blocks=1)], question, bounded=False)
    (tensor,) = facts.tensors
    entry = replace(tensor.entry, shape=(16 << 20,), chunks=(16 << 20,))
    large = replace(facts, tensors=[replace(tensor, job=replace(tensor.job, reference=entry))])
    draft, method = draft_for(question, dtype), find_method("task_arithmetic")
    if fits:
        assert make_plan(draft, large, method, Budget()).costs.computed_blocks == 1
        return
    with pytest.raises(UsageError, match="a block of 'w' would have 134217728 bytes") as caught:
        make_plan(draft, large, method, Budget())
    assert "mp export --dtype" in str(caught.value.hint)


float32 = stn.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False))


def threshold_of(histogram: np.ndarray, keep: int) -> tuple[int, int]:
    """The threshold of a histogram's resolution, and how many elements reach it."""
    cut = cut_at_bins(histogram, (1, keep), 1 << 60)
    return cut.floor, cut.kept


@given(float32, st.floats(0.001, 1))
def test_the_threshold_is_that_of_the_kth_largest(values: np.ndarray, density: float) -> None:
    magnitudes = np.abs(values)
    keep = max(int(density * values.size), 1)
    bits, kept = threshold_of(np.bincount(magnitudes.view(np.uint32) >> 16, minlength=HISTOGRAM_BINS), keep)
    exact = np.sort(magnitudes)[::-1][keep - 1]
    assert bits == int(exact.view(np.uint32)) >> 16 << 16
    if bits:  # where it is zero all are kept, those that count as zero in the histogram too
        threshold = np.uint32(bits).view(np.float32)
        assert kept == np.count_nonzero(magnitudes >= threshold) >= keep
    assert np.count_nonzero(magnitudes.view(np.uint32) >> 16 > bits >> 16) < keep


def test_the_threshold_of_many_nans_is_infinity() -> None:
    """A NaN is no magnitude: what is kept are infinities and NaNs, and the plan can be read again."""
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    histogram[[0, 0x3F80, 0x7F80, 0x7FC0, 0x7FFF]] = [10, 5, 2, 3, 4]
    assert threshold_of(histogram, 1)[0] == 0x7F800000
    assert threshold_of(histogram, 9)[0] == 0x7F800000
    assert threshold_of(histogram, 10) == (0x3F800000, 14)


def test_thresholds_and_counts_are_planned_for_what_is_trimmed() -> None:
    tensor = Outline("w", {0: [([0], 1.0, 100)]})
    densities = {"a": 0.25, "b": 0.25, "c": 1.0}
    experts = [input_named(name, weight=1.0, density=density) for name, density in densities.items()]
    parameters: dict[str, Value] = {"lambda": 1.0, "normalize": True, "rescale": False}
    plan = plan_of([tensor], ("ties", experts, {**parameters, "exact": False}), Budget())
    thresholds, kept = (plan.tensors["w"].pinned[name] for name in ("thresholds", "kept"))
    elements = tensor.entry.elements
    assert thresholds[0] > 0
    assert 0.25 * elements <= kept[0] < elements
    assert thresholds[1:] == (0, 0), "the second is the base's own, the third keeps all"
    assert kept[1:] == (elements, elements)
    exact = plan_of([tensor], ("ties", experts, {**parameters, "exact": True}), Budget())
    assert not exact.tensors["w"].pinned, "they are found in the merge"


@pytest.mark.parametrize(("density", "keep"), [(1e-9, 1), (2.9 / 4096, 2), (3 / 4096, 3), (0.001, 4), (0.9999, 4095)])
def test_a_density_keeps_the_whole_number_below_its_share_and_one_at_least(density: float, keep: int) -> None:
    """4096 elements of as many magnitudes, so that the count shows what was asked for."""
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    histogram[8000:12096] = 1
    question = question_of("ties", (1.0,), density=density, exact=False)
    (tensor,) = facts_of([Outline("w", {0: [([0], 1.0, 100)]})], question).tensors
    found = find_method("ties").start(replace(tensor.problem, histograms=(histogram,)))
    assert found["kept"].tolist() == [keep]
    assert found["thresholds"].tolist() == [(12096 - keep) << 16]


def test_nothing_is_kept_of_a_density_of_zero() -> None:
    histogram = np.full(HISTOGRAM_BINS, 1, np.int64)
    assert cut_at_bins(histogram, (1, 0), HISTOGRAM_BINS) == Cut(floor=1 << 31, kept=0)


@pytest.mark.parametrize("method", FAMILIES)
def test_planning_needs_no_store(hurt_family: Store, method: str) -> None:
    """The facts are all that there is: the plan is the same when the store is gone."""
    weights = {"math": 0.75, "code": 0.5}
    wanted = plan_of_refs(hurt_family, method, weights, budget="40%")
    models, jobs = jobs_of_plan(hurt_family, wanted)
    facts = gather_facts(hurt_family, models, jobs, wanted.settings, find_method(method), bounded=True)
    hurt_family.close()
    shutil.rmtree(hurt_family.layout.root)
    draft = replace(wanted, tensors={}, costs=Costs(0, 0, 0, 0, 0), bound=Bound(0, 0, 0, None), budget_bytes=None)
    again = make_plan(draft, facts, find_method(method), Budget(share=0.4))
    assert again.encode() == wanted.encode()


@pytest.mark.parametrize("method", FAMILIES)
def test_planning_reads_no_weights(hurt_family: Store, method: str) -> None:
    """With all statistics there, those of passes too, no block's file is needed."""
    wanted = plan_of_refs(hurt_family, method, {"math": 0.75, "code": 0.5}, budget="40%")
    assert without_weights(hurt_family) > 40
    assert plan_of_refs(hurt_family, method, {"math": 0.75, "code": 0.5}, budget="40%").encode() == wanted.encode()


@pytest.mark.parametrize("method", FAMILIES)
def test_a_plan_without_a_budget_needs_no_statistics_but_histograms(
    hurt_store: Store, tmp_path: Path, method: str
) -> None:
    """Of models that nobody compared: no norms are measured where nothing is left out."""
    base = base_weights()
    ingest_family(hurt_store, tmp_path, base, {n: fine_tune(base, k) for k, n in enumerate("ab")}, against_base=False)
    if not find_method(method).histograms:
        without_weights(hurt_store)
    before = catalog_rows(hurt_store, "deltas", "tensors")
    for budget in (None, "100%"):
        assert plan_of_refs(hurt_store, method, {"a": 0.5, "b": 0.5}, budget=budget).bound.update is None
    assert (catalog_rows(hurt_store, "deltas", "tensors") == before) != find_method(method).histograms


@pytest.mark.parametrize("budget", [None, "100%", "40%"])
@pytest.mark.parametrize("exact", [None, True, False])
def test_exact_thresholds_are_given_up_under_a_budget_alone(
    shared_family: Store, budget: str | None, exact: bool | None
) -> None:
    """Unless they were asked for: then the tensors are read for them when the plan is made."""
    given = {} if exact is None else {"exact": exact}
    plan = plan_of_refs(shared_family, "ties", {"math": 0.75, "code": 0.5}, budget=budget, **given)
    assert plan.parameters["exact"] == (budget != "40%" if exact is None else exact)
    name, tensor = next(iter(plan.tensors.items()))
    base, tuned = (weights_of(shared_family, ref)[name].astype(np.float32) for ref in ("base", "math"))
    magnitudes = np.sort(np.abs(tuned - base).reshape(-1))[::-1]
    reach = int(np.count_nonzero(magnitudes >= magnitudes[int(0.3 * magnitudes.size) - 1]))
    if exact is False or (exact is None and budget == "40%"):
        assert reach <= tensor.pinned["kept"][0] < magnitudes.size
    elif budget == "40%":
        assert tensor.pinned["kept"][0] == reach
    else:
        assert not tensor.pinned


CHILD = """
    import json, sys
    from mergepipe.store import Store
    from support.merges import FAMILIES, make_plan
    with Store.open(sys.argv[1]) as store:
        for method in FAMILIES:
            for budget in (None, "0", "10%", "55%", "100%"):
                plan = make_plan(store, method, {"code": 0.4, "math": 0.6}, budget=budget)
                print(plan.id, json.dumps(plan.encode().decode()))
"""


def test_processes_agree_whatever_their_hash_seeds(shared_family: Store) -> None:
    outputs = {run_python(CHILD, shared_family.layout.root, PYTHONHASHSEED=seed) for seed in ("0", "1234")}
    (lines,) = [output.splitlines() for output in outputs]
    here = [
        plan_of_refs(shared_family, method, {"code": 0.4, "math": 0.6}, budget=budget)
        for method in FAMILIES
        for budget in (None, "0", "10%", "55%", "100%")
    ]
    assert lines == [f"{plan.id} {json.dumps(plan.encode().decode())}" for plan in here]
    assert len(set(lines)) == len(lines)
