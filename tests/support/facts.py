"""What a planner knows, made up: models that exist only as numbers, for tests that read nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.merge.budget import Budget
from mergepipe.merge.build import draft_of
from mergepipe.merge.certificate import Item
from mergepipe.merge.facts import Facts, Group, Place, TensorFacts
from mergepipe.merge.job import Job, Setting
from mergepipe.merge.method import Coefficients, Method, Value
from mergepipe.merge.method import Problem as MethodProblem
from mergepipe.merge.methods import METHODS
from mergepipe.merge.plan import Input, Plan
from mergepipe.merge.planner import full_bytes, make_plan
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.norms import HISTOGRAM_BINS, SKETCH_SIZE

BLOCK_ELEMENTS: Final = 1024
PLANNED: Final = (
    "linear", "task_arithmetic", "ties", "breadcrumbs", "dare_linear", "dare_ties", "model_stock", "multislerp",
)  # fmt: skip
"""Methods that questions are about: without passes at a histogram's resolution, or with one for a Gram matrix."""

Question = tuple[str, list[Input], dict[str, Value]]
"""A method, its experts, and the other parameters."""


@dataclass(frozen=True)
class Outline:
    """One float32 tensor of ``blocks`` blocks. ``places``: by block, its groups as (experts, norm, stored bytes)."""

    name: str
    places: Mapping[int, Sequence[tuple[Sequence[int], float, int]]]
    blocks: int = 4

    @property
    def entry(self) -> TensorEntry:
        ids = tuple(made_up(f"{self.name} {index}") for index in range(self.blocks))
        return TensorEntry("F32", (self.blocks * BLOCK_ELEMENTS,), (BLOCK_ELEMENTS,), ids)

    @property
    def base_bytes(self) -> tuple[int, ...]:
        return tuple(500 + index for index in range(self.blocks))


Problem = tuple[list[Outline], Question, str | None]
"""A model, what is asked of it, and the result's type."""


def made_up(text: str) -> Digest:
    return hash_bytes(text.encode())


def input_named(name: str, **parameters: Value) -> Input:
    return Input(made_up(f"commit {name}"), name, parameters)


def question_of(method: str, weights: Sequence[float], **parameters: Value) -> Question:
    """A question with an expert for each weight, and a method's defaults for all that is not given."""
    found = METHODS[method]
    own = {name: value for name, value in parameters.items() if found.parameter(name).per_expert}
    rest = {name: value for name, value in parameters.items() if name not in own}
    weighted = any(parameter.name == "weight" for parameter in found.parameters)
    experts = []
    for number, weight in enumerate(weights):
        settled = found.settle({**({"weight": weight} if weighted else {}), **own}, "test", per_expert=True)
        experts.append(input_named(str(number), **settled))
    return method, experts, found.settle(rest, "test", per_expert=False)


def facts_of(outlines: Sequence[Outline], question: Question, *, bounded: bool = True) -> Facts:
    """As the store would tell them. ``bounded``: with norms, and with the coefficients after passes."""
    method, experts, parameters = question
    found = METHODS[method]
    setting = Setting(
        0,
        found.base != "unused",
        tuple(range(1, 1 + len(experts))),
        parameters,
        tuple(expert.parameters for expert in experts),
    )
    return Facts([_tensor(outline, setting, found, bounded) for outline in outlines], [], [], 0, bounded)


def _tensor(outline: Outline, setting: Setting, method: Method, bounded: bool) -> TensorFacts:
    count = len(setting.experts)
    places = [
        Place(index, tuple(_group(outline, index, *group, bounded) for group in groups), outline.base_bytes[index])
        for index, groups in sorted(outline.places.items())
    ]
    blocks = [list(outline.entry.blocks) for _ in range(count)]
    for place in places:
        for group in place.groups:
            for expert in group.experts:
                blocks[expert][place.index] = group.block
    entries = tuple(replace(outline.entry, blocks=tuple(own)) for own in blocks)
    job = Job(outline.name, 0, None, outline.entry, entries, tuple(range(count)))
    differing = {expert for place in places for group in place.groups for expert in group.experts}
    problem = job.problem(setting)
    if method.histograms:
        made = (_histogram(outline.entry.elements, expert) if expert in differing else None for expert in range(count))
        problem = replace(problem, histograms=tuple(made))
    coefficients, passes = method.start(problem), len(method.passes(problem))
    if bounded:
        coefficients = _settled(method, problem, coefficients)
    return TensorFacts(
        job, problem, coefficients, bounded or not passes, tuple(places), outline.base_bytes, passes
    )  # fmt: skip


def _group(
    outline: Outline, index: int, members: Sequence[int], norm: float, stored_bytes: int, bounded: bool
) -> Group:
    block = made_up(f"{outline.name} {index} {members}")
    if not bounded:
        return Group(tuple(members), block, math.nan, stored_bytes)
    sketch = np.random.default_rng(int.from_bytes(block[:4], "big")).standard_normal(SKETCH_SIZE)
    sketch *= norm / np.linalg.norm(sketch) if math.isfinite(norm) else 1
    return Group(tuple(members), block, norm, stored_bytes, sketch.astype(np.float32))


def _settled(method: Method, problem: MethodProblem, coefficients: Coefficients) -> Coefficients:
    """After passes over tensors whose inner products are those of some random vectors."""
    for step in method.passes(problem):
        count, _ = step.state(problem).shape
        vectors = np.random.default_rng(count).standard_normal((count, 8))
        coefficients = step.settle(problem, coefficients, vectors @ vectors.T)
    return coefficients


def _histogram(elements: int, seed: int) -> NDArray[np.int64]:
    deltas = np.random.default_rng(seed).standard_normal(elements).astype(np.float32)
    return np.bincount(np.abs(deltas).view(np.uint32) >> 16, minlength=HISTOGRAM_BINS)


def draft_for(question: Question, dtype: str | None = None) -> Plan:
    """The head of a plan that answers a question."""
    method, experts, parameters = question
    found = METHODS[method]
    return draft_of(input_named("base"), experts, found, parameters, dtype, based=found.base != "unused")


def plan_of(outlines: Sequence[Outline], question: Question, budget: Budget, dtype: str | None = None) -> Plan:
    """What the planner makes of it: without norms where everything is read."""
    loose = facts_of(outlines, question, bounded=False)
    facts = loose if budget.covers(full_bytes(loose)) else facts_of(outlines, question)
    return make_plan(draft_for(question, dtype), facts, METHODS[question[0]], budget)


norms = st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1.0, 1e-12, 1e12]))
stored_sizes = st.one_of(st.integers(96, 130), st.sampled_from([100, 1000]))


@st.composite
def partitions(draw: st.DrawFn, experts: int) -> list[list[int]]:
    """Some experts of a place in groups: each group has one block."""
    groups: dict[int, list[int]] = {}
    for expert in range(experts):
        label = draw(st.integers(-1, experts - 1))  # -1: the base's own block
        if label >= 0:
            groups.setdefault(label, []).append(expert)
    return list(groups.values())


@st.composite
def models(draw: st.DrawFn, experts: int) -> list[Outline]:
    """A model of up to three tensors with up to four blocks each."""
    tensors = []
    for number in range(draw(st.integers(1, 3))):
        places = {
            index: [(members, draw(norms), draw(stored_sizes)) for members in draw(partitions(experts))]
            for index in draw(st.sets(st.integers(0, 3)))
        }
        tensors.append(
            Outline(f"layers.{number}.weight", {index: groups for index, groups in places.items() if groups})
        )
    return tensors


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """A method, experts with its parameters, and its other parameters; no two of them contradict."""
    method = METHODS[draw(st.sampled_from(PLANNED))]
    known = {parameter.name for parameter in method.parameters}
    signed = draw(st.booleans()) and method.name != "multislerp"
    given: dict[str, Value] = {
        "normalize": not signed and draw(st.booleans()),
        "lambda": draw(st.sampled_from([1.0, 0.5, -1.5, 0.0])),
        "exact": False,
        "rescale": False,
    }
    parameters = method.settle({name: given[name] for name in given.keys() & known}, "drawn", per_expert=False)
    experts = []
    for number in range(draw(st.integers(max(1, method.experts[0]), 4))):
        own: dict[str, Value] = {
            "weight": draw(st.floats(-2.0 if signed else 0.125, 2, width=32)),
            "density": draw(st.sampled_from([0.01, 0.3, 1.0])),
        }
        settled = method.settle({name: own[name] for name in own.keys() & known}, "drawn", per_expert=True)
        experts.append(input_named(f"expert{number}", **settled))
    return method.name, experts, parameters


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    question = draw(questions())
    return draw(models(len(question[1]))), question, draw(st.sampled_from([None, None, "BF16"]))


errors = st.one_of(st.floats(0, 100), st.sampled_from([0.0, 1.0, 2.0, 1e-9, 1e9]), st.floats(1e-150, 1e60))


@st.composite
def items(draw: st.DrawFn, *, alone: bool = False, most: int = 8) -> list[Item]:
    """Items at a few places, or each at a place of its own."""
    found = []
    for number in range(draw(st.integers(0, most))):
        index = number if alone else draw(st.integers(0, 2))
        found.append(Item(0, index, (number,), draw(errors), draw(st.integers(1, 20))))
    return found
