"""A tiny family of models: a bfloat16 base, and fine-tunes that change some of its layers a little."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from support.checkpoints import raw, write_checkpoint

Weights = dict[str, NDArray[Any]]
VOCABULARY = 128
HIDDEN = 64
LAYERS = 3


def base_weights(seed: int = 0) -> Weights:
    """About 100 KB: an embedding, layers of two matrices and a norm, a head. Blocks of 4 KiB cut all matrices."""
    generator = np.random.default_rng(seed)

    def matrix(*shape: int) -> NDArray[Any]:
        return (generator.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    weights: Weights = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] = matrix(HIDDEN, HIDDEN)
        weights[f"model.layers.{layer}.mlp.up_proj.weight"] = matrix(2 * HIDDEN, HIDDEN)
        weights[f"model.layers.{layer}.input_layernorm.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
    weights["model.norm.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
    weights["lm_head.weight"] = matrix(VOCABULARY, HIDDEN)
    return weights


def fine_tune(base: Mapping[str, NDArray[Any]], seed: int, *, scale: float = 1e-3) -> Weights:
    """All layers' matrices changed a little; the embedding, the norms and the head as they were."""
    generator = np.random.default_rng(1000 + seed)
    tuned: Weights = {}
    for name, weight in base.items():
        if ".layers." in name and weight.ndim == 2:
            step = generator.standard_normal(weight.shape, np.float32) * scale
            tuned[name] = (weight.astype(np.float32) + step).astype(weight.dtype)
        else:
            tuned[name] = weight
    return tuned


def write_model(folder: Path, weights: Mapping[str, NDArray[Any]], *, shards: int = 1) -> Path:
    files = {"config.json": b'{"model_type": "toy"}\n', "tokenizer.json": b'{"version": "1.0"}\n' * 20}
    return write_checkpoint(folder, {name: raw(weight) for name, weight in weights.items()}, shards=shards, files=files)


def write_family(folder: Path, experts: int = 2) -> tuple[Path, list[Path]]:
    """``base`` and ``expert0``, ``expert1``, … below a folder."""
    base = base_weights()
    paths = [write_model(folder / f"expert{number}", fine_tune(base, number)) for number in range(experts)]
    return write_model(folder / "base", base), paths
