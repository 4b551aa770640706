"""PEFT adapters in tests, written by hand, and the base that they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.adapters import Adapter, read_adapter
from mergepipe.store import Store
from support.checkpoints import raw, write_safetensors
from support.merges import ingest_model

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]
PREFIX = "base_model.model."
Q, UP, EMBED, HEAD = "model.layers.0.q_proj", "model.layers.0.up_proj", "model.embed_tokens", "lm_head"
RANK = 3
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", "use_dora": False}


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def base_tensors() -> Arrays:
    return {
        f"{EMBED}.weight": random(128, 32, seed=1).astype(ml_dtypes.bfloat16),
        f"{Q}.weight": random(32, 32, seed=2).astype(ml_dtypes.bfloat16),
        f"{Q}.bias": random(32, seed=3).astype(ml_dtypes.bfloat16),
        f"{UP}.weight": random(80, 32, seed=4),
        "model.conv.weight": random(24, 32, 1, 1, seed=5),
        "model.conv3.weight": random(24, 32, 3, 3, seed=6),
        "model.packed.weight": np.zeros((32, 16), np.uint8),
        f"{HEAD}.weight": random(128, 32, seed=7),
    }


def factors(module: str, rows: int, columns: int, rank: int = RANK, name: str = "") -> Arrays:
    """A pair for one module; ``name`` is that of the adapter, as old versions of PEFT left it in the keys."""
    middle = f".{name}" if name else ""
    return {
        f"{PREFIX}{module}.lora_A{middle}.weight": random(rank, columns, seed=10),
        f"{PREFIX}{module}.lora_B{middle}.weight": random(rows, rank, seed=11),
    }


def embedding(rank: int = RANK, name: str = "") -> Arrays:
    middle = f".{name}" if name else ""
    return {
        f"{PREFIX}{EMBED}.lora_embedding_A{middle}": random(rank, 128, seed=12),
        f"{PREFIX}{EMBED}.lora_embedding_B{middle}": random(32, rank, seed=13),
    }


def write_adapter(folder: Path, tensors: Mapping[str, NDArray[Any]], config: Any) -> Path:
    write_safetensors(folder / "adapter_model.safetensors", {name: raw(array) for name, array in tensors.items()})
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    return folder


class AdapterFiles:
    """Puts the base and one adapter after another into a store, and reads the adapter."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.count = 0

    def __call__(
        self, tensors: Arrays, base: Arrays | None = None, config: bytes | None = None, **changes: Any
    ) -> Adapter:
        """Read an adapter made of tensors, and of a file or of changes to the usual configuration."""
        if base is not None or not self.count:
            ingest_model(self.store, self.folder, "base", base or base_tensors())
        self.count += 1
        folder = write_adapter(self.folder / f"adapter{self.count}", tensors, config or {**CONFIG, **changes})
        self.store.ingest([folder], ref="adapter")
        return read_adapter(self.store, self.store.snapshot("adapter"), self.store.snapshot("base").tensors)
