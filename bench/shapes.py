"""Shapes of made-up checkpoints: presets, tensor names, and the small files that lie beside the weights.

The names and shapes are those of Qwen3 (Llama's with a norm on queries and keys), the output tied to the
embedding. Nothing here touches the disk; `family.py` writes what this module describes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Literal

Kind = Literal["embedding", "norm", "weight"]

BYTES_PER_ELEMENT = 2  # bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that fix every tensor of a decoder-only model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Preset:
    """A shape, and the largest shard that its checkpoints are split into."""

    shape: Shape
    max_shard_bytes: int


PRESETS = {
    "tiny": Preset(Shape(256, 4, 4, 2, 64, 704, 4096), 3 << 20),
    "small": Preset(Shape(768, 12, 12, 4, 64, 2048, 32768), 96 << 20),
    "qwen3-0.6b": Preset(Shape(1024, 28, 16, 8, 128, 3072, 151936), 512 << 20),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor; `index` is its place in the model, and part of its seed; `layer` is None outside layers."""

    index: int
    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * BYTES_PER_ELEMENT


def _layer_tensors(shape: Shape) -> list[tuple[str, tuple[int, ...], Kind]]:
    queries = shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    return [
        ("self_attn.q_proj", (queries, shape.hidden), "weight"),
        ("self_attn.k_proj", (keys, shape.hidden), "weight"),
        ("self_attn.v_proj", (keys, shape.hidden), "weight"),
        ("self_attn.o_proj", (shape.hidden, queries), "weight"),
        ("self_attn.q_norm", (shape.head_dim,), "norm"),
        ("self_attn.k_norm", (shape.head_dim,), "norm"),
        ("mlp.gate_proj", (shape.intermediate, shape.hidden), "weight"),
        ("mlp.up_proj", (shape.intermediate, shape.hidden), "weight"),
        ("mlp.down_proj", (shape.hidden, shape.intermediate), "weight"),
        ("input_layernorm", (shape.hidden,), "norm"),
        ("post_attention_layernorm", (shape.hidden,), "norm"),
    ]


def tensors_of(shape: Shape) -> list[TensorSpec]:
    """Every tensor of the model, in the order in which it is defined (which is the order of the shards)."""
    rows: list[tuple[str, tuple[int, ...], Kind, int | None]] = [
        ("model.embed_tokens.weight", (shape.vocab, shape.hidden), "embedding", None)
    ]
    for layer in range(shape.layers):
        for name, dims, kind in _layer_tensors(shape):
            rows.append((f"model.layers.{layer}.{name}.weight", dims, kind, layer))
    rows.append(("model.norm.weight", (shape.hidden,), "norm", None))
    return [TensorSpec(index, *row) for index, row in enumerate(rows)]


def _pretty(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _config(shape: Shape, base_name: str | None) -> bytes:
    config: dict[str, object] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 4096,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    if base_name is not None:
        config["_name_or_path"] = base_name  # what a fine-tune says it was made from
    return _pretty(config)


def _tokenizer(vocab: int) -> bytes:
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab))][:vocab]
    special = [
        {
            "id": i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, word in enumerate(words[:3])
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    return json.dumps(tokenizer, separators=(",", ":")).encode()


def side_files(shape: Shape, base_name: str | None) -> dict[str, bytes]:
    """The small files of a checkpoint by name; `base_name` goes into a fine-tune's config, as in practice."""
    return {
        "config.json": _config(shape, base_name),
        "generation_config.json": _pretty({"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}),
        "tokenizer.json": _tokenizer(shape.vocab),
        "tokenizer_config.json": _pretty(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "model_max_length": 4096,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "<unk>",
            }
        ),
    }
