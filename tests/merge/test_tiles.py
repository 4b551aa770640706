"""Tiles are how the work is cut, and nothing that a result shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergepipe.store import Store
from support.family import Weights
from support.merges import METHODS, NUMPY, bits, ingest_family, merge, weights_of


def family_of(size: int, count: int, dtype: str) -> tuple[Weights, dict[str, Weights]]:
    generator = np.random.default_rng(size + count)
    base = generator.standard_normal(size).astype(np.float32)
    deltas = generator.standard_normal((count, size)).astype(np.float32) * 1e-2
    experts = {f"expert{number}": {"w": (base + delta).astype(NUMPY[dtype])} for number, delta in enumerate(deltas)}
    return {"w": base.astype(NUMPY[dtype])}, experts


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize(("size", "count"), [(200_001, 2), (40_000, 12)])
def test_results_do_not_depend_on_blocks_and_tiles(
    make_store: Callable[..., Store], tmp_path: Path, size: int, count: int, dtype: str
) -> None:
    """In blocks of 4 KiB, smaller than a tile, and in one of many tiles, the last one shorter."""
    base, experts = family_of(size, count, dtype)
    settings = {name: 0.1 * (number + 1) for number, name in enumerate(experts)}
    density: dict[str, Any] = {"density": 0.3}
    found: dict[str, set[bytes]] = {method: set() for method in METHODS}
    for block_bytes in (4096, 1 << 20):
        store = make_store(block_bytes=block_bytes)
        ingest_family(store, tmp_path / str(block_bytes), base, experts)
        for method in METHODS:
            merge(store, method, settings, **(density if method == "ties" else {}))
            found[method].add(bits(weights_of(store, "merged")["w"]))
    assert {method: len(results) for method, results in found.items()} == dict.fromkeys(METHODS, 1)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("out", [None, "BF16", "F16", "F32", "F64"])
def test_every_type_to_every_type(shared_store: Store, tmp_path: Path, dtype: str, out: str | None) -> None:
    """Values that all of the types have arrive as they are."""
    base: Weights = {"w": np.zeros(3000, NUMPY[dtype])}
    tuned: Weights = {"w": (np.arange(3000) % 256).astype(np.float32).astype(NUMPY[dtype])}
    ingest_family(shared_store, tmp_path, base, {"tuned": tuned})
    for method in METHODS:
        merge(shared_store, method, {"tuned": 1.0}, dtype=out)
        found = weights_of(shared_store, "merged")["w"]
        assert found.dtype == NUMPY[out or dtype]
        np.testing.assert_array_equal(found.astype(np.float32), tuned["w"].astype(np.float32))
