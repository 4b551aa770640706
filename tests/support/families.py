"""Random families of models, and what is asked of them: deltas that are shared, opposed, sparse, tiny or huge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.merge.methods import METHODS
from support.family import Weights
from support.merges import NUMPY

LONG_ROW = (2100,)  # longer than a block
SHAPES = ((), (0,), (7,), (40, 30), (64, 64), LONG_ROW, (3, 20, 40))
BOUNDED = (
    "linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della",
    "della_linear", "sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion", "passthrough", "slerp", "nuslerp",
    "multislerp", "karcher", "model_stock",
)  # fmt: skip
SIGNED = {"task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della",
          "della_linear", "linear"}  # fmt: skip


MASKED = {"dare_linear", "dare_ties", "della", "della_linear"}


def takes(method: str, experts: int) -> bool:
    least, most = METHODS[method].experts
    return least <= experts and (most is None or experts <= most)


WEIGHTS = st.sampled_from([1.0, 0.5, 0.3, 2.0, 0.0, 0.01, 1.7])


@dataclass(frozen=True)
class Family:
    """Models, and the question that is asked of them."""

    base: Weights
    experts: dict[str, Weights]
    method: str
    settings: dict[str, dict[str, float]]
    parameters: dict[str, float | bool]
    budget: str | None
    max_error: float | None
    dtype: str | None


def _delta(draw: st.DrawFn, generator: np.random.Generator, size: int, others: list[NDArray[np.float32]]) -> np.ndarray:
    """One expert's difference at one tensor: none, one that another has, dense, sparse, in one place, tiny or huge."""
    kind = draw(st.sampled_from(["none", "shared", "opposite", "dense", "dense", "sparse", "local", "tiny", "huge"]))
    if kind == "none" or (kind in ("shared", "opposite") and not others):
        return np.zeros(size, np.float32)
    if kind in ("shared", "opposite"):
        other = others[draw(st.integers(0, len(others) - 1))]
        return other if kind == "shared" else -other
    scale = {"tiny": 1e-30, "huge": 1e3}.get(kind, 10.0 ** -draw(st.integers(0, 5)))
    delta = (generator.standard_normal(size) * scale).astype(np.float32)
    if kind == "sparse":
        delta[generator.random(size) < 0.97] = 0
    if kind == "local":
        delta[size // 2 :] = 0
    return delta


@st.composite
def families(draw: st.DrawFn) -> Family:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 4))
    method = draw(st.sampled_from([name for name in BOUNDED if takes(name, count)]))
    shapes = [shape for shape in SHAPES if shape != LONG_ROW or not METHODS[method].rows]
    types = draw(st.sampled_from([("F32", None), ("F32", None), ("BF16", "F32"), ("F16", "F32")]))
    base: Weights = {}
    experts: dict[str, Weights] = {f"expert{number}": {} for number in range(count)}
    for number, shape in enumerate(draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=3))):
        name, size = f"layers.{number}.weight", math.prod(shape)
        plain = (generator.standard_normal(size) * draw(st.sampled_from([0.0, 0.02, 1.0]))).astype(NUMPY[types[0]])
        base[name] = plain.reshape(shape)
        deltas: list[NDArray[np.float32]] = []
        for weights in experts.values():
            deltas.append(_delta(draw, generator, size, deltas))
            weights[name] = (plain.astype(np.float32) + deltas[-1]).astype(plain.dtype).reshape(shape)
    known = {parameter.name: parameter for parameter in METHODS[method].parameters}
    consensus = METHODS[method].error == "whole"
    normalize = draw(st.booleans()) and "normalize" in known
    signed = st.sampled_from([1.0, 1.0, -1.0]) if not (normalize and consensus) and "lambda" in known else st.just(1.0)
    own: dict[str, Callable[[], float]] = {
        "weight": lambda: draw(WEIGHTS) * draw(signed),
        "density": lambda: draw(st.sampled_from([0.01, 0.2, 0.7, 1.0])),
        "epsilon": lambda: 0.005,
    }
    if method not in SIGNED:
        own["weight"] = lambda: abs(draw(WEIGHTS)) + 0.1
    mine = [key for key in own if key in known and known[key].per_expert]
    settings = {name: {key: own[key]() for key in mine} for name in experts}
    if normalize and not consensus and abs(sum(each["weight"] for each in settings.values())) < 0.1:
        total = sum(each["weight"] for each in settings.values())
        settings["expert0"]["weight"] += 1.0 if total > -0.5 else -1.0
    drawn: dict[str, float | bool] = {
        "normalize": normalize,
        "lambda": draw(st.sampled_from([1.0, 0.5, -1.5])),
        "rescale": draw(st.booleans()),
        "select_topk": draw(st.sampled_from([0.1, 0.6, 1.0])),
        "t": draw(st.sampled_from([0.0, 0.3, 1.0, 1.5])),
    }
    parameters = {key: value for key, value in drawn.items() if key in known}
    share = draw(st.one_of(st.none(), st.integers(0, 99)))
    return Family(
        base, experts, method, settings, parameters,
        budget=None if share is None else f"{share}%",
        max_error=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])) if share is None else None,
        dtype=types[1],
    )  # fmt: skip
