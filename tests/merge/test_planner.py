"""Facts in, a plan out: nothing is read, the same question has the same answer, and a larger budget a better one."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from mergepipe.merge.budget import Budget
from mergepipe.merge.methods import find_method
from mergepipe.merge.planner import coefficients_of, keeps_base, make_plan, threshold_of
from mergepipe.store import Store
from mergepipe.store.errors import BudgetError, UsageError
from mergepipe.store.kernels import HISTOGRAM_BINS
from support.facts import Problem, Question, input_named, plan_of, problems, tensor_facts
from support.merges import METHODS, facts_of_refs, without_weights
from support.merges import make_plan as plan_of_refs
from support.processes import run_python


@given(problems(), st.integers(0, 2000))
def test_the_same_question_has_the_same_answer_and_leaves_the_facts_alone(problem: Problem, size: int) -> None:
    facts, question, dtype = problem
    before = pickle.dumps(facts)
    first = plan_of(facts, question, Budget(size_bytes=size), dtype).encode()
    assert plan_of(pickle.loads(before), question, Budget(size_bytes=size), dtype).encode() == first
    assert pickle.dumps(facts) == before


@given(problems(), st.lists(st.integers(0, 4000), min_size=2, max_size=6))
def test_a_larger_budget_never_has_a_larger_bound(problem: Problem, sizes: list[int]) -> None:
    facts, question, dtype = problem
    last = math.inf
    for size in sorted(sizes):
        plan = plan_of(facts, question, Budget(size_bytes=size), dtype)
        assert plan.costs.expert_bytes <= size
        assert plan.bound.absolute <= last * (1 + 1e-12)
        last = plan.bound.absolute


@given(problems(), st.integers(0, 2000))
def test_costs_are_those_of_the_reads(problem: Problem, size: int) -> None:
    """Counted again from the plan: each group once, the base wherever something is computed."""
    facts, question, dtype = problem
    plan = plan_of(facts, question, Budget(size_bytes=size), dtype)
    everywhere = dtype is not None or not keeps_base(find_method(question[0]), question[1], question[2])
    expert = full = base = computed = total = 0
    for tensor in facts:
        reads = plan.tensors[tensor.name].reads if tensor.name in plan.tensors else ((),) * len(question[1])
        for place in tensor.places:
            for group in place.groups:
                read = {place.index in reads[member] for member in group.experts}
                assert len(read) == 1, "experts that share a block are read together"
                expert += group.stored_bytes * read.pop()
                full += group.stored_bytes
        touched = set(range(4)) if everywhere else set().union(*reads)
        base += sum(tensor.base_bytes[index] for index in touched)
        computed += len(touched)
        total += len(tensor.entry.blocks)
    assert (plan.costs.expert_bytes, plan.costs.expert_bytes_full) == (expert, full)
    assert (plan.costs.base_bytes, plan.costs.computed_blocks) == (base, computed)
    assert plan.costs.referenced_blocks == total - computed


@given(problems(), st.integers(0, 2000))
def test_the_models_bound_is_made_of_its_tensors(problem: Problem, size: int) -> None:
    facts, question, dtype = problem
    plan = plan_of(facts, question, Budget(size_bytes=size), dtype)
    together = math.sqrt(math.fsum(tensor.bound**2 for tensor in plan.tensors.values()))
    assert together == pytest.approx(plan.bound.absolute)
    assert plan.bound.absolute <= plan.bound.update * (1 + 1e-12)
    if plan.bound.update:
        assert plan.bound.relative == pytest.approx(plan.bound.absolute / plan.bound.update)


@given(problems())
def test_a_full_budget_is_no_budget(problem: Problem) -> None:
    facts, question, dtype = problem
    free = plan_of(facts, question, Budget(), dtype)
    share = plan_of(facts, question, Budget(share=1.0), dtype)
    assert replace(share, budget_bytes=None) == free
    assert free.bound.absolute == free.bound.relative == 0.0
    assert share.budget_bytes == free.costs.expert_bytes == free.costs.expert_bytes_full


@given(problems())
def test_no_budget_reads_no_expert(problem: Problem) -> None:
    facts, question, dtype = problem
    plan = plan_of(facts, question, Budget(size_bytes=0), dtype)
    assert plan.costs.expert_bytes == 0
    assert not any(any(tensor.reads) for tensor in plan.tensors.values())
    assert plan.bound.absolute == plan.bound.update


@given(problems(), st.floats(0, 1))
def test_an_error_is_kept_and_nothing_smaller_would_keep_it(problem: Problem, error: float) -> None:
    facts, question, dtype = problem
    plan = plan_of(facts, question, Budget(relative_error=error), dtype)
    assert plan.budget_bytes is None
    assert plan.bound.relative <= error * (1 + 1e-9)
    if plan.costs.expert_bytes:  # a byte less in the same order of reading does not do
        less = plan_of(facts, question, Budget(relative_error=error * (1 + 1e-6) + 1e-9), dtype)
        assert less.costs.expert_bytes <= plan.costs.expert_bytes


def test_an_error_of_nothing_reads_what_matters_and_one_of_everything_nothing() -> None:
    facts = [tensor_facts("w", {0: [([0], 3.0, 100)], 1: [([0, 1], 0.0, 100)], 3: [([1], 4.0, 150)]})]
    question = ("task_arithmetic", [input_named("a", weight=1.0), input_named("b", weight=1.0)], {"lambda": 1.0})
    assert plan_of(facts, question, Budget(relative_error=0.0)).tensors["w"].reads == ((0,), (3,))
    assert plan_of(facts, question, Budget(relative_error=1.0)).costs.expert_bytes == 0
    assert plan_of(facts, question, Budget(relative_error=0.61)).tensors["w"].reads == ((), (3,))


def test_what_has_no_bound_is_read_for_an_error_too() -> None:
    facts = [tensor_facts("w", {0: [([0], math.nan, 100)], 1: [([0], 3.0, 100)], 2: [([0], 4.0, 100)]}, experts=1)]
    question: Question = ("linear", [input_named("a", weight=1.0)], {"normalize": True})
    plan = plan_of(facts, question, Budget(relative_error=0.61))
    assert plan.tensors["w"].reads == ((0, 2),)
    assert plan.bound.absolute == pytest.approx(3.0)
    assert plan.bound.relative == pytest.approx(0.6)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize(("weight", "scale"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("method", METHODS)
def test_without_a_bound_there_is_no_plan(method: str, weight: float, scale: float, norm: float) -> None:
    """Also with a weight or a lambda of zero: zero times infinity is a NaN."""
    facts = [tensor_facts("fine", {0: [([0], 1.0, 100)]}), tensor_facts("odd", {2: [([0, 1], norm, 100)]})]
    found = find_method(method)
    own = found.settle({"weight": weight}, "test", per_expert=True)
    experts = [input_named("a", **own), input_named("b", **{**own, "weight": 1.0})]
    own = {} if method == "linear" else {"lambda": scale}
    question = (method, experts, found.settle(own, "test", per_expert=False))
    with pytest.raises(BudgetError, match="no bound exists while 'odd' is not read whole"):
        plan_of(facts, question, Budget(size_bytes=99))
    assert plan_of(facts, question, Budget(size_bytes=100)).tensors["odd"].reads == ((2,), (2,))
    assert plan_of(facts, question, Budget()).bound.absolute == 0.0


def test_ties_with_weights_of_both_signs_has_to_read_everything() -> None:
    facts = [tensor_facts("w", {0: [([0], 1.0, 100)], 1: [([1], 1.0, 100)]})]
    experts = [input_named("a", weight=1.0, density=1.0), input_named("b", weight=-1.0, density=1.0)]
    for normalize in (True, False):
        question: Question = ("ties", experts, {"lambda": 1.0, "normalize": normalize})
        assert plan_of(facts, question, Budget(size_bytes=200)).bound.absolute == 0.0
        if normalize:
            with pytest.raises(BudgetError, match="weights of both signs"):
                plan_of(facts, question, Budget(size_bytes=199))
        else:
            assert plan_of(facts, question, Budget(size_bytes=199)).bound.absolute == pytest.approx(1.0)


def test_no_experts() -> None:
    with pytest.raises(UsageError, match="at least one expert"):
        plan_of([], ("linear", [], {"normalize": True}), Budget())


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (0.1, 0.2, -0.3), (1e30, -1e30, 1e-5)])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_weights_that_sum_to_zero_cannot_be_normalized(method: str, weights: tuple[float, ...]) -> None:
    experts = [input_named(str(number), weight=weight) for number, weight in enumerate(weights)]
    with pytest.raises(UsageError, match="sum to zero"):
        coefficients_of(find_method(method), experts, {"normalize": True, "lambda": 1.0}, [0] * len(weights))
    coefficients_of(find_method(method), experts, {"normalize": False, "lambda": 1.0}, [0] * len(weights))


def test_weights_whose_sum_is_no_float32_cannot_be_normalized() -> None:
    experts = [input_named("a", weight=3e38), input_named("b", weight=3e38)]
    with pytest.raises(UsageError, match="too large together"):
        coefficients_of(find_method("linear"), experts, {"normalize": True}, [0, 0])


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
    facts = [tensor_facts("same", {}), tensor_facts("w", {1: [([0], 1.0, 100)]})]
    experts = [input_named(str(number), weight=weight, density=1.0) for number, weight in enumerate(weights)]
    plan = plan_of(facts, (method, experts, {"normalize": normalize, "lambda": 1.0}), Budget())
    assert set(plan.tensors) == ({"w"} if kept else {"same", "w"})
    assert plan.costs.computed_blocks == (1 if kept else 8)


@pytest.mark.parametrize(("dtype", "fits"), [("BF16", True), (None, True), ("F32", True), ("F64", False)])
def test_a_type_that_makes_blocks_too_large_is_refused(dtype: str | None, fits: bool) -> None:
    """Results are cut as their base is, so blocks of 64 MiB have no wider type."""
    facts = tensor_facts("w", {0: [([0], 1.0, 100)]}, blocks=1, experts=1)
    large = replace(facts, entry=replace(facts.entry, shape=(16 << 20,), chunks=(16 << 20,)))
    question: Question = ("task_arithmetic", [input_named("a", weight=1.0)], {"lambda": 1.0, "normalize": False})
    if fits:
        assert plan_of([large], question, Budget(), dtype).costs.computed_blocks == 1
        return
    with pytest.raises(UsageError, match="a block of 'w' would have 134217728 bytes") as caught:
        plan_of([large], question, Budget(), dtype)
    assert "mp export --dtype" in str(caught.value.hint)


float32 = stn.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False))


@given(float32, st.floats(0.001, 1))
def test_the_threshold_is_that_of_the_kth_largest(values: np.ndarray, density: float) -> None:
    magnitudes = np.abs(values)
    keep = max(int(density * values.size), 1)
    bits, kept = threshold_of(np.bincount(magnitudes.view(np.uint32) >> 16, minlength=HISTOGRAM_BINS), keep)
    exact = np.sort(magnitudes)[::-1][keep - 1]
    assert bits == int(exact.view(np.uint32)) >> 16 << 16
    threshold = np.uint32(bits).view(np.float32)
    assert kept == np.count_nonzero(magnitudes >= threshold) >= keep
    assert np.count_nonzero(magnitudes.view(np.uint32) >> 16 > bits >> 16) < keep


def test_the_threshold_of_many_nans_is_infinity() -> None:
    """A NaN is no magnitude: what is kept are infinities and NaNs, and the plan can be read again."""
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    histogram[[0, 0x3F80, 0x7F80, 0x7FC0, 0x7FFF]] = [10, 5, 2, 3, 4]
    assert threshold_of(histogram, 1) == (0x7F800000, 9)
    assert threshold_of(histogram, 9) == (0x7F800000, 9)
    assert threshold_of(histogram, 10) == (0x3F800000, 14)


def test_thresholds_and_counts_are_planned_for_what_is_trimmed() -> None:
    facts = [tensor_facts("w", {0: [([0], 1.0, 100)]}, experts=3)]
    densities = {"a": 0.25, "b": 0.25, "c": 1.0}
    experts = [input_named(name, weight=1.0, density=density) for name, density in densities.items()]
    plan = plan_of(facts, ("ties", experts, {"lambda": 1.0, "normalize": True}), Budget()).tensors["w"]
    assert plan.thresholds[0] > 0
    assert plan.kept[0] >= 0.25 * facts[0].entry.elements
    assert plan.thresholds[1:] == (0, 0), "the second is the base's own, the third keeps all"
    assert plan.kept[1:] == (-1, -1)


@pytest.mark.parametrize(("density", "keep"), [(1e-9, 1), (2.9 / 4096, 2), (3 / 4096, 3), (0.001, 4), (0.9999, 4095)])
def test_a_density_keeps_the_whole_number_below_its_share_and_one_at_least(density: float, keep: int) -> None:
    """4096 elements of as many magnitudes, so that the count shows what was asked for."""
    facts = tensor_facts("w", {0: [([0], 1.0, 100)]}, experts=1)
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    histogram[8000:12096] = 1
    experts = [input_named("a", weight=1.0, density=density)]
    question: Question = ("ties", experts, {"lambda": 1.0, "normalize": True})
    plan = plan_of([replace(facts, histograms=(histogram,))], question, Budget()).tensors["w"]
    assert plan.kept == (keep,)
    assert plan.thresholds == ((12096 - keep) << 16,)


@pytest.mark.parametrize("method", METHODS)
def test_planning_needs_no_store(hurt_family: Store, method: str) -> None:
    """The facts are all that there is: the plan is the same when the store is gone."""
    weights = {"math": 0.75, "code": 0.5}
    wanted = plan_of_refs(hurt_family, method, weights, budget="40%")
    facts = facts_of_refs(hurt_family, method, list(weights))
    hurt_family.close()
    shutil.rmtree(hurt_family.layout.root)
    again = make_plan(
        facts, wanted.base, wanted.experts, find_method(method), wanted.parameters, Budget(share=0.4), None
    )
    assert again.encode() == wanted.encode()


@pytest.mark.parametrize("method", METHODS)
def test_planning_reads_no_weights(hurt_family: Store, method: str) -> None:
    """With all statistics there, no block's file is needed."""
    wanted = plan_of_refs(hurt_family, method, {"math": 0.75, "code": 0.5}, budget="40%")
    assert without_weights(hurt_family) > 40
    assert plan_of_refs(hurt_family, method, {"math": 0.75, "code": 0.5}, budget="40%").encode() == wanted.encode()


CHILD = """
    import json, sys
    from mergepipe.store import Store
    from support.merges import METHODS, make_plan
    with Store.open(sys.argv[1]) as store:
        for method in METHODS:
            for budget in (None, "0", "10%", "55%", "100%"):
                plan = make_plan(store, method, {"code": 0.4, "math": 0.6}, budget=budget)
                print(plan.id, json.dumps(plan.encode().decode()))
"""


def test_processes_agree_whatever_their_hash_seeds(shared_family: Store) -> None:
    outputs = {run_python(CHILD, shared_family.layout.root, PYTHONHASHSEED=seed) for seed in ("0", "1234")}
    (lines,) = [output.splitlines() for output in outputs]
    here = [
        plan_of_refs(shared_family, method, {"code": 0.4, "math": 0.6}, budget=budget)
        for method in METHODS
        for budget in (None, "0", "10%", "55%", "100%")
    ]
    assert lines == [f"{plan.id} {json.dumps(plan.encode().decode())}" for plan in here]
    assert len(set(lines)) == len(lines)
