"""Decoding without the compiled kernels gives what they give, and a process that only reads does not load them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mergepipe.store import Store, kernels, plain_decoding
from support.checkpoints import folder_bytes
from support.family import write_family
from support.processes import run_python

TILE = plain_decoding._TILE_BYTES
SIZES = [0, 1, 63, 1000]


def random_planes(width: int, size: int) -> list[NDArray[np.uint8]]:
    planes = np.random.default_rng(size).integers(0, 256, (width, size), np.uint8)
    for number, edge in enumerate([0, 1, 0x7F, 0x80, 0x81, 0xFF][:size]):
        planes[:, number] = edge
    return list(planes)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("size", [*SIZES, TILE // 4 - 1, TILE // 2, TILE // 2 + 1, TILE + 77])
def test_planes_are_put_together(width: int, size: int) -> None:
    planes = random_planes(width, size)
    out = np.full(size, 0xAA, f"<u{width}")
    plain_decoding.join(planes, out)
    expected = np.empty_like(out)
    (kernels.join2 if width == 2 else kernels.join4)(*planes, expected)
    assert np.array_equal(out, expected)
    assert np.array_equal(out.view(np.uint8), np.stack(planes, axis=1).reshape(-1))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("size", [*SIZES, TILE // 4 - 1, TILE // 2, TILE + 1])
def test_differences_are_added(width: int, size: int) -> None:
    planes = random_planes(width, size)
    old = np.flip(np.stack(random_planes(width, size), axis=1).reshape(-1)).copy().view(f"<i{width}")
    before = old.copy()
    out, expected = np.full(size, -1, old.dtype), np.empty_like(old)
    plain_decoding.add_difference(planes, old, out)
    if width == 1:
        kernels.sum1(*planes, old, expected)
    elif width == 2:
        kernels.sum2(*planes, old, expected)
    else:
        folded = np.empty(size, np.uint32)
        kernels.join4(*planes, folded)
        kernels.sum4(folded, old, expected)
    assert np.array_equal(out, expected)
    assert np.array_equal(old, before)


def test_a_process_that_only_reads_loads_no_compiler(make_store: Callable[..., Store], tmp_path: Path) -> None:
    base, (expert, _) = write_family(tmp_path)
    store = make_store(tmp_path / "store")
    store.ingest([base])
    store.ingest([expert], base="base")
    run_python(
        """
        import sys
        from mergepipe.store import Store
        from mergepipe.store.check import verify
        with Store.open(sys.argv[1]) as store:
            store.snapshot("expert0").export(sys.argv[2])
            assert not verify(store).damaged
        assert not {"numba", "numcodecs", "torch", "zarr"} & set(sys.modules)
        """,
        tmp_path / "store",
        tmp_path / "out",
    )
    assert folder_bytes(tmp_path / "out") == folder_bytes(expert)
