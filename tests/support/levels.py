"""Previews in tests: made-up groups that have one, and families of models whose blocks are large enough for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.merge import Expert, Plan, parse_budget, plan_merge
from mergepipe.merge.certificate import Item, items_of
from mergepipe.merge.facts import TensorFacts
from mergepipe.merge.methods import METHODS
from mergepipe.store import Digest, Store
from mergepipe.store.errors import UsageError
from mergepipe.store.previews import PreviewRow, content_size, find_preview, read_preview
from support.facts import Outline, facts_of, made_up, question_of
from support.family import Weights
from support.merges import NUMPY, ingest_model, write_weights

Floats = NDArray[np.float32]

BLOCK_BYTES: Final = 16384  # 4096 float32 elements: the fewest that have a preview
TAKING: Final = (
    "linear", "task_arithmetic", "dare_linear", "passthrough", "slerp", "nuslerp", "multislerp", "karcher",
    "model_stock",
)  # fmt: skip
"""Methods that take previews, with the parameters of :data:`ASKED`."""
ASKED: Final[Mapping[str, Mapping[str, Any]]] = {
    "dare_linear": {"density": 0.5, "rescale": False},
    "slerp": {"t": 0.3},
    "nuslerp": {"nuslerp_flatten": True},
    "passthrough": {"scale": 0.7},
}
SHAPES: Final = ((64, 64), (130, 64), (3, 64, 64), (50,), (16, 512))


@dataclass(frozen=True)
class Choice:
    """One group: its norm and bytes, and its preview's bytes and what that leaves out, where it has one."""

    norm: float
    stored_bytes: int
    preview: tuple[int, float] | None


@st.composite
def choices(draw: st.DrawFn, most: int = 8) -> list[Choice]:
    """Groups of all kinds: previews that are worth it, that are not, that leave out nearly all or nearly nothing."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        norm = draw(st.one_of(st.floats(0.01, 10), st.sampled_from([1.0, 2.0, 0.1])))
        stored = draw(st.one_of(st.integers(2, 40), st.sampled_from([10, 20])))
        preview = None
        if draw(st.integers(0, 3)):
            preview = draw(st.integers(1, stored - 1)), norm * draw(st.sampled_from([0.05, 0.3, 0.5, 0.6, 0.9, 1.1]))
        found.append(Choice(norm, stored, preview))
    return found


def facts_with(chosen: Sequence[Choice]) -> TensorFacts:
    """A tensor with one expert that has each of these groups at a place of its own."""
    places = {index: [([0], each.norm, each.stored_bytes)] for index, each in enumerate(chosen)}
    (tensor,) = facts_of([Outline("w", places, len(chosen))], question_of("task_arithmetic", (1.0,))).tensors
    found = []
    for place, each in zip(tensor.places, chosen, strict=True):
        row = None if each.preview is None else PreviewRow(made_up(f"preview {place.index}"), *each.preview)
        found.append(replace(place, groups=(replace(place.groups[0], preview=row),)))
    return replace(tensor, places=tuple(found))


@st.composite
def crowded_items(draw: st.DrawFn) -> list[Item]:
    """Items of up to three experts that share up to three places, some with previews; deltas add up or cancel."""
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, -1.0]), min_size=1, max_size=3))
    drawn = {
        index: {expert: draw(choices(1))[0] for expert in sorted(draw(st.sets(st.integers(0, len(weights) - 1))))}
        for index in range(draw(st.integers(1, 3)))
    }
    places = {
        index: [([expert], each.norm, each.stored_bytes) for expert, each in found.items()]
        for index, found in drawn.items()
        if found
    }
    (tensor,) = facts_of([Outline("w", places)], question_of("task_arithmetic", weights)).tensors
    directions = np.random.default_rng(draw(st.integers(0, 3))).standard_normal((2, 64)).astype(np.float32)
    made = []
    for place in tensor.places:
        groups = []
        for group in place.groups:
            each = drawn[place.index][group.experts[0]]
            row = None if each.preview is None else PreviewRow(group.block, *each.preview)
            sketch = draw(st.sampled_from([1, -1])) * directions[draw(st.integers(0, 1))] * each.norm
            groups.append(replace(group, preview=row, sketch=sketch))
        made.append(replace(place, groups=tuple(groups)))
    return items_of(0, replace(tensor, places=tuple(made)), METHODS["task_arithmetic"])


def items_with(chosen: Sequence[Choice], *, previews: bool = True) -> list[Item]:
    return items_of(0, facts_with(chosen), METHODS["task_arithmetic"], previews=previews)


def options(chosen: Sequence[Choice], *, worthwhile: bool = False) -> list[list[tuple[int, float]]]:
    """For each group all that can be done: bytes, and the squared distance that is left.

    ``worthwhile``: without previews that are worth less for each byte than the block itself.
    """
    found = []
    for each in chosen:
        mine = [(0, each.norm**2), (each.stored_bytes, 0.0)]
        if each.preview is not None:
            size, left = each.preview[0], each.preview[1] ** 2
            if not worthwhile or (each.norm**2 - left) * each.stored_bytes > each.norm**2 * size:
                mine.append((size, left))
        found.append(mine)
    return found


def best_of_all(chosen: Sequence[Choice], budget: int, *, worthwhile: bool = False) -> float:
    """The smallest squared distance of all choices within the budget, by trying every one."""
    costs, left = np.zeros(1, np.int64), np.zeros(1)
    for mine in options(chosen, worthwhile=worthwhile):
        costs = np.concatenate([costs + cost for cost, _ in mine])
        left = np.concatenate([left + size for _, size in mine])
    return float(left[costs <= budget].min())


def best_fractional(chosen: Sequence[Choice], budget: int) -> tuple[float, float]:
    """The smallest squared distance where options may be mixed; and the largest drop of one step on the hulls.

    Steps are the edges of each group's lower convex hull, found by comparing all pairs.
    """
    steps = [step for mine in options(chosen) for step in _edges(mine)]
    steps.sort(key=lambda step: -step[1] / step[0])
    left, room = sum(each.norm**2 for each in chosen), float(budget)
    for cost, drop in steps:
        part = min(1.0, room / cost)
        left -= drop * part
        room -= cost * part
    return left, max((drop for _, drop in steps), default=0.0)


def _edges(mine: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    at = (0, mine[0][1])
    while True:
        further = [(cost - at[0], at[1] - left) for cost, left in mine if cost > at[0] and left < at[1]]
        if not further:
            return
        step = max(further, key=lambda each: (each[1] / each[0], each[0]))
        yield step
        at = (at[0] + step[0], at[1] - step[1])


# Families.


@dataclass(frozen=True)
class LevelFamily:
    """Models with previews, and what is asked of them."""

    base: Weights
    experts: dict[str, Weights]
    method: str
    settings: dict[str, dict[str, float]]
    dtype: str | None


@st.composite
def level_families(draw: st.DrawFn, methods: Sequence[str] = TAKING) -> LevelFamily:
    """Dense, sparse, shared, opposed, one-sided and tiny deltas, in blocks that have previews and ones too small."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 3))
    method = draw(st.sampled_from([name for name in methods if _takes(name, count)]))
    stored, dtype = draw(st.sampled_from([("F32", None), ("BF16", "F32")]))
    base: Weights = {}
    experts: dict[str, Weights] = {f"expert{number}": {} for number in range(count)}
    for number, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))):
        name, size = f"layers.{number}.weight", math.prod(shape)
        plain = (generator.standard_normal(size) * draw(st.sampled_from([0.0, 0.02]))).astype(NUMPY[stored])
        base[name] = plain.reshape(shape)
        deltas: list[NDArray[np.float32]] = []
        for weights in experts.values():
            deltas.append(_delta(draw, generator, size, deltas))
            weights[name] = (plain.astype(np.float32) + deltas[-1]).astype(plain.dtype).reshape(shape)
    weighted = any(parameter.name == "weight" for parameter in METHODS[method].parameters)
    weights = st.sampled_from([1.0, 0.5, 0.3, 2.0, 1.7])
    settings = {name: {"weight": draw(weights)} if weighted else {} for name in experts}
    return LevelFamily(base, experts, method, settings, dtype)


def _takes(method: str, experts: int) -> bool:
    least, most = METHODS[method].experts
    return least <= experts and (most is None or experts <= most)


def _delta(draw: st.DrawFn, generator: np.random.Generator, size: int, others: list[NDArray[np.float32]]) -> np.ndarray:
    kind = draw(st.sampled_from(["none", "shared", "opposite", "dense", "dense", "heavy", "sparse", "local", "tiny"]))
    if kind == "none" or (kind in ("shared", "opposite") and not others):
        return np.zeros(size, np.float32)
    if kind in ("shared", "opposite"):
        other = others[draw(st.integers(0, len(others) - 1))]
        return other if kind == "shared" else -other
    scale = draw(st.sampled_from([1e-20, 1e-30])) if kind == "tiny" else 10.0 ** -draw(st.integers(1, 4))
    delta = (generator.standard_normal(size) * scale).astype(np.float32)
    if kind == "heavy":
        delta *= np.exp(2 * generator.standard_normal(size)).astype(np.float32)
    if kind == "sparse":
        delta[generator.random(size) < 0.97] = 0
    if kind == "local":
        delta[size // 2 :] = 0
    return delta


def fixed_family(method: str = "task_arithmetic") -> LevelFamily:
    """Two experts with deltas of very different sizes from block to block; the second has one tensor of the first's."""
    generator = np.random.default_rng(7)
    base = {
        f"model.layers.{n}.weight": (generator.standard_normal((256, 64)) * 0.02).astype(np.float32) for n in range(3)
    }
    experts: dict[str, Weights] = {"expert0": {}, "expert1": {}}
    for name, plain in base.items():
        for weights in experts.values():
            sizes = np.repeat(np.exp(generator.standard_normal(4)), 64)[:, None] * 1e-3
            weights[name] = (plain + generator.standard_normal(plain.shape) * sizes).astype(np.float32)
    experts["expert1"]["model.layers.2.weight"] = experts["expert0"]["model.layers.2.weight"]
    base["model.norm.weight"] = np.ones(64, np.float32)
    for weights in experts.values():
        weights["model.norm.weight"] = base["model.norm.weight"]
    return LevelFamily(base, experts, method, {"expert0": {"weight": 0.6}, "expert1": {"weight": 0.4}}, None)


def ingest_levels(store: Store, folder: Path, family: LevelFamily, prefix: str = "", *, previews: bool = True) -> None:
    """The base and its experts, with their previews."""
    ingest_model(store, folder, f"{prefix}base", family.base)
    paths = [write_weights(folder, f"{prefix}{name}", weights) for name, weights in family.experts.items()]
    store.ingest(paths, base=f"{prefix}base", previews=previews)


def level_plan(
    store: Store,
    family: LevelFamily,
    budget: str | None = None,
    *,
    prefix: str = "",
    max_error: float | None = None,
    previews: bool = True,
    **parameters: Any,
) -> Plan:
    experts = [Expert(f"{prefix}{name}", own) for name, own in family.settings.items()]
    asked = {**ASKED.get(family.method, {}), **parameters}
    known = {parameter.name for parameter in METHODS[family.method].parameters}
    try:
        return plan_merge(
            store, f"{prefix}base", experts, family.method,
            parameters={name: value for name, value in asked.items() if name in known},
            budget=parse_budget(budget, max_error), dtype=family.dtype, previews=previews,
        )  # fmt: skip
    except UsageError as error:
        if "have no mean" in error.message:  # deltas so small that multislerp's eps outweighs them
            reject()
        raise


def preview_delta(store: Store, base: Digest, block: Digest, elements: int) -> tuple[Floats, PreviewRow] | None:
    """The delta that a preview stands for, taken out of its codes here, and its row; None where there is none."""
    with store.catalog.reading() as view:
        row = find_preview(view, base, block)
    if row is None:
        return None
    content = np.empty(content_size(elements), np.uint8)
    store.reader.read_block(row.id, content)
    found = read_preview(content)
    quarters = np.stack([found.codes.reshape(-1, 256) >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    signs = np.array([0, 1, -1, 0], np.float32)[quarters.reshape(-1)]
    return (signs * np.repeat(found.scales, 1024))[:elements], row
