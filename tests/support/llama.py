"""A tiny Llama family in checkpoint folders, as transformers writes them: what mergekit merges as well as this project.

Importing it imports torch and transformers, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

Tensors = dict[str, torch.Tensor]
SIZES: Mapping[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def new_model(seed: int = 0, config: Any = None) -> Any:
    """A model with random weights; norms are not all ones, so that nothing is the same by chance."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config or LlamaConfig(**SIZES))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn(weight.shape) * 0.1 + (0.01 if "norm" in name else 0))
    return model


def tuned(model: Any, seed: int, scale: float = 1e-3, touches: Callable[[str], bool] = lambda _: True) -> Any:
    """A copy after a random step, of another size in each tensor; tensors that it does not touch stay."""
    config = model.config
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in copy.named_parameters():
            size = scale * float(torch.rand((), generator=generator) + 0.5)
            step = torch.randn(weight.shape, generator=generator) * size
            if touches(name):
                weight.add_(step)
    return copy


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model as transformers saves it; the model itself keeps its type."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(folder)
    return folder


def write_family(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """``base`` with the experts ``math`` (all of it), ``code`` (not the embeddings, not the last layer), ``chat``."""
    base = new_model()
    save(base, folder / "base", dtype)
    save(tuned(base, 1), folder / "math", dtype)
    save(tuned(base, 2, 3e-3, lambda name: "embed" not in name and ".3." not in name), folder / "code", dtype)
    save(tuned(base, 3, 1e-2), folder / "chat", dtype)
    return folder
