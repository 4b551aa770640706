"""What a planner knows, made up: models that exist only as numbers, for tests that read nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import strategies as st

from mergepipe.merge.budget import Budget
from mergepipe.merge.certificate import Item
from mergepipe.merge.facts import Group, Place, TensorFacts
from mergepipe.merge.method import Value
from mergepipe.merge.methods import METHODS
from mergepipe.merge.plan import Input, Plan
from mergepipe.merge.planner import make_plan
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.kernels import HISTOGRAM_BINS
from mergepipe.store.manifest import TensorEntry

BLOCK_ELEMENTS = 1024
Question = tuple[str, list[Input], dict[str, Value]]
Problem = tuple[list[TensorFacts], Question, str | None]
"""A model's facts, what is asked of them, and the result's type."""


def made_up(text: str) -> Digest:
    return hash_bytes(text.encode())


def input_named(name: str, **parameters: Value) -> Input:
    return Input(made_up(f"commit {name}"), name, parameters)


def tensor_facts(
    name: str, places: Mapping[int, Sequence[tuple[Sequence[int], float, int]]], *, blocks: int = 4, experts: int = 2
) -> TensorFacts:
    """One float32 tensor. ``places``: for each block index its groups as (experts, norm, stored bytes)."""
    entry = TensorEntry(
        "F32",
        (blocks * BLOCK_ELEMENTS,),
        (BLOCK_ELEMENTS,),
        tuple(made_up(f"{name} {index}") for index in range(blocks)),
    )
    made = []
    for index, groups in sorted(places.items()):
        found = tuple(
            Group(tuple(members), made_up(f"{name} {index} {members}"), norm, size) for members, norm, size in groups
        )
        made.append(Place(index, found, 500 + index))
    differing = {expert for groups in places.values() for members, _, _ in groups for expert in members}
    histograms = tuple(_histogram(entry.elements, expert) if expert in differing else None for expert in range(experts))
    return TensorFacts(name, entry, tuple(made), histograms, tuple(500 + index for index in range(blocks)))


def _histogram(elements: int, seed: int) -> np.ndarray:
    deltas = np.random.default_rng(seed).standard_normal(elements).astype(np.float32)
    return np.bincount(np.abs(deltas).view(np.uint32) >> 16, minlength=HISTOGRAM_BINS)


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
def model_facts(draw: st.DrawFn, experts: int) -> list[TensorFacts]:
    """A model of up to three tensors with up to four blocks each."""
    tensors = []
    for number in range(draw(st.integers(1, 3))):
        places = {
            index: [(members, draw(norms), draw(stored_sizes)) for members in draw(partitions(experts))]
            for index in draw(st.sets(st.integers(0, 3)))
        }
        places = {index: groups for index, groups in places.items() if groups}
        tensors.append(tensor_facts(f"layers.{number}.weight", places, experts=experts))
    return tensors


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """A method, experts with its parameters, and its other parameters; no two of them contradict."""
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    signed = draw(st.booleans())
    low = -2.0 if signed else 0.125
    parameters = method.settle({"normalize": not signed and draw(st.booleans())}, "drawn", per_expert=False)
    if "lambda" in parameters:
        parameters["lambda"] = draw(st.sampled_from([1.0, 0.5, -1.5, 0.0]))
    experts = []
    for number in range(draw(st.integers(1, 4))):
        own: dict[str, Value] = {"weight": draw(st.floats(low, 2, width=32))}
        if method.thresholds:
            own["density"] = draw(st.sampled_from([0.01, 0.3, 1.0]))
        experts.append(input_named(f"expert{number}", **own))
    return method.name, experts, parameters


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    question = draw(questions())
    return draw(model_facts(len(question[1]))), question, draw(st.sampled_from([None, None, "BF16"]))


def plan_of(facts: Sequence[TensorFacts], question: Question, budget: Budget, dtype: str | None = None) -> Plan:
    """What the planner makes of it."""
    method, experts, parameters = question
    return make_plan(facts, input_named("base"), experts, METHODS[method], parameters, budget, dtype)


errors = st.one_of(st.floats(0, 100), st.sampled_from([0.0, 1.0, 2.0, 1e-9, 1e9]), st.floats(1e-150, 1e60))


@st.composite
def items(draw: st.DrawFn, *, alone: bool = False, most: int = 8) -> list[Item]:
    """Items at a few places, or each at a place of its own."""
    found = []
    for number in range(draw(st.integers(0, most))):
        index = number if alone else draw(st.integers(0, 2))
        found.append(Item(0, index, (number,), draw(errors), draw(st.integers(1, 20))))
    return found
