"""Tiles are how the work is cut, and nothing that a result shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.tiles import tile_elements
from mergepipe.store import Store
from support.family import Weights
from support.merges import METHODS, NUMPY, bits, ingest_family, merge, weights_of

FLAT = ("linear", "task_arithmetic", "ties", "breadcrumbs", "sce", "karcher", "multislerp")


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
    found: dict[str, set[bytes]] = {method: set() for method in FLAT}
    for block_bytes in (4096, 1 << 20):
        store = make_store(block_bytes=block_bytes)
        ingest_family(store, tmp_path / str(block_bytes), base, experts)
        for method in FLAT:
            merge(store, method, settings)
            found[method].add(bits(weights_of(store, "merged")["w"]))
    assert {method: len(results) for method, results in found.items()} == dict.fromkeys(FLAT, 1)


@pytest.mark.parametrize(
    ("method", "parameters", "count"),
    [
        ("model_stock", {"filter_wise": True}, 3),
        ("nuslerp", {"nuslerp_flatten": False}, 2),
        ("nuslerp", {"nuslerp_flatten": True}, 2),
        ("arcee_fusion", {}, 1),
    ],
)
def test_rows_are_whole_whatever_the_blocks_and_tiles(
    make_store: Callable[..., Store], tmp_path: Path, method: str, parameters: dict[str, bool], count: int
) -> None:
    """Rows of a length that neither a block nor a tile is a multiple of."""
    base, experts = family_of(1333 * 37, count, "F32")
    found = set()
    for block_bytes in (4096, 1 << 20):
        store = make_store(block_bytes=block_bytes)
        shaped = {name: {"w": weights["w"].reshape(1333, 37)} for name, weights in experts.items()}
        ingest_family(store, tmp_path / str(block_bytes), {"w": base["w"].reshape(1333, 37)}, shaped)
        merge(store, method, dict.fromkeys(experts, 0.5), **parameters)
        found.add(bits(weights_of(store, "merged")["w"]))
    assert len(found) == 1


@given(st.integers(1, 40), st.integers(1, 300_000), st.integers(0, 5000), st.sampled_from([1 << 10, 1 << 19, 1 << 23]))
def test_a_tile_has_whole_rows_and_room_in_the_cache(experts: int, rows: int, row: int, tile_bytes: int) -> None:
    elements = rows * max(row, 1)
    step = tile_elements(experts, elements, max(row, 1), tile_bytes)
    assert 1 <= step <= elements
    assert step % max(row, 1) == 0
    assert step * 4 * (experts + 2) <= max(tile_bytes, 4 * (experts + 2) * max(8 << 10, row))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("out", [None, "BF16", "F16", "F32", "F64"])
def test_every_type_to_every_type(shared_store: Store, tmp_path: Path, dtype: str, out: str | None) -> None:
    """Values that all of the types have arrive as they are."""
    base: Weights = {"w": np.zeros(3000, NUMPY[dtype])}
    tuned: Weights = {"w": (np.arange(3000) % 256).astype(np.float32).astype(NUMPY[dtype])}
    ingest_family(shared_store, tmp_path, base, {"tuned": tuned})
    for method in METHODS:
        merge(shared_store, method, {"tuned": 1.0}, dtype=out, **({"density": 1.0} if method == "ties" else {}))
        found = weights_of(shared_store, "merged")["w"]
        assert found.dtype == NUMPY[out or dtype]
        np.testing.assert_array_equal(found.astype(np.float32), tuned["w"].astype(np.float32))
