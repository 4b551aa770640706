"""Experts that are kept otherwise than as whole models, beside whole models that are exactly what they stand for.

All numbers are small multiples of a power of two, so that sums and products in float32 are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergepipe.store import Store
from support.adapters import CONFIG, PREFIX, write_adapter
from support.family import Weights
from support.merges import ingest_model

Q, UP, NORM = "model.layers.0.q_proj.weight", "model.layers.0.up_proj.weight", "model.norm.weight"
SHAPES: Mapping[str, tuple[int, ...]] = {Q: (64, 64), UP: (96, 64), NORM: (64,)}
RANK = 3
SCALE = 2.0  # lora_alpha over the rank


def exact(shape: tuple[int, ...], seed: int, *, unit: float = 2.0**-8) -> NDArray[np.float32]:
    """Whole numbers from -8 to 8, times ``unit``."""
    return (np.random.default_rng(seed).integers(-8, 9, shape) * unit).astype(np.float32)


def base_model() -> Weights:
    return {name: exact(shape, number) for number, (name, shape) in enumerate(SHAPES.items())}


def factors(seed: int, *names: str) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """``A`` and ``B`` for each of these tensors."""
    return {
        name: (exact((RANK, SHAPES[name][1]), seed + number, unit=2.0**-6),
               exact((SHAPES[name][0], RANK), seed + 50 + number, unit=2.0**-6))
        for number, name in enumerate(names)
    }  # fmt: skip


def ingest_adapter(
    store: Store, folder: Path, name: str, pairs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], **tensors: Any
) -> None:
    """A LoRA adapter of these pairs, and other ``tensors`` that it replaces."""
    held = dict(tensors)
    for target, (a, b) in pairs.items():
        module = target.removesuffix(".weight")
        held[f"{PREFIX}{module}.lora_A.weight"] = a
        held[f"{PREFIX}{module}.lora_B.weight"] = b
    (folder / name).mkdir(parents=True)
    store.ingest([write_adapter(folder / name, held, {**CONFIG, "r": RANK, "lora_alpha": SCALE * RANK})], ref=name)


def with_deltas(base: Weights, deltas: Mapping[str, NDArray[Any]]) -> Weights:
    """The whole model: exactly the base plus deltas."""
    whole = {name: weights + deltas[name] if name in deltas else weights for name, weights in base.items()}
    for name, delta in deltas.items():
        assert (whole[name] - base[name] == delta).all()
        assert whole[name].dtype == np.float32
    return whole


def adapted(base: Weights, pairs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> Weights:
    """The whole model that an adapter makes of a base."""
    return with_deltas(base, {name: np.float32(SCALE) * (b @ a) for name, (a, b) in pairs.items()})


def ingest_both(store: Store, folder: Path) -> None:
    """``base``; adapters ``lora`` and ``small``, a task vector ``tv``; and ``lora-whole`` and so on beside them."""
    base = base_model()
    ingest_model(store, folder, "base", base)
    pairs = {"lora": factors(10, Q, UP), "small": factors(20, Q)}
    for name, own in pairs.items():
        ingest_adapter(store, folder, name, own)
        ingest_model(store, folder, f"{name}-whole", adapted(base, own), base="base")
    deltas = {UP: exact(SHAPES[UP], 30), NORM: exact(SHAPES[NORM], 31)}
    ingest_model(store, folder, "tv", deltas)
    ingest_model(store, folder, "tv-whole", with_deltas(base, deltas), base="base")
