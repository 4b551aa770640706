"""The short ways for whole bfloat16 blocks give the same bits as tiles do."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.merge import kernels, mask_kernels, tile_kernels
from mergepipe.merge.method import Looks
from mergepipe.store.preview_kernels import SEGMENT

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ODD = np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 1, 0x8001, 0x7F7F], np.uint16)


def blocks(seed: int, experts: int, size: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_], NDArray[np.uint16]]:
    """Weights near a base, some experts absent, with signed zeros, infinities, a NaN and denormals among them."""
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal(size) * 0.02).astype(BFLOAT16).view(np.uint16)
    stack = np.stack([
        (base.view(BFLOAT16).astype(np.float32) + rng.standard_normal(size) * 0.002).astype(BFLOAT16).view(np.uint16)
        for _ in range(experts)
    ])  # fmt: skip
    for row in (base, *stack):
        row[rng.integers(0, size, 4)] = rng.choice(ODD, 4)
    return stack, rng.random(experts) < 0.8, base


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return bits.view(BFLOAT16).astype(np.float32)


def as_tile(stack: NDArray[np.uint16], present: NDArray[np.bool_], base: NDArray[np.uint16], *, deltas: bool) -> Any:
    """What the tiles of the long way hold: a base, and the experts."""
    origin = widened(base)
    rows = np.stack([widened(row) if there else origin for row, there in zip(stack, present, strict=True)])
    if deltas:
        with np.errstate(invalid="ignore"):
            rows = np.stack(
                [row - origin if there else origin * 0 * 0 for row, there in zip(rows, present, strict=True)]
            )
        rows[~present] = 0
    return origin, np.ascontiguousarray(rows)


def rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    out = np.empty(values.size, np.uint16)
    kernels.round_bfloat16(values.view(np.uint32), out)
    return out


shapes = st.tuples(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([1, 7, 2048, 2049, 5000]))


@given(shapes)
def test_filled_tiles_are_the_experts(shape: tuple[int, int, int]) -> None:
    stack, present, base = blocks(*shape)
    for deltas, fill in ((False, tile_kernels.weights_of), (True, tile_kernels.deltas_of)):
        origin, wanted = as_tile(stack, present, base, deltas=deltas)
        rows = np.empty((len(stack) + 2, base.size), np.float32)
        fill(stack, present, base, 0, rows)
        assert np.array_equal(rows[: len(stack)], wanted, equal_nan=True)
        assert np.array_equal(rows[len(stack)], origin, equal_nan=True)


def looks_at(experts: int, elements: int, *, some: bool) -> tuple[Looks, NDArray[np.float32]]:
    """Previews of some experts, or of none, and the deltas that they stand for, (K, n)."""
    generator = np.random.default_rng(experts * elements)
    segments = -(-elements // SEGMENT)
    coarse = generator.random(experts) < 0.6 if some else np.zeros(experts, np.bool_)
    codes = generator.choice(np.array([0, 1, 2], np.uint8), (experts, segments * SEGMENT))
    scales = (generator.random((experts, segments)) * 1e-2).astype(np.float32)
    quarters = codes.reshape(experts, segments, 4, SEGMENT // 4)
    packed = sum(quarters[:, :, quarter] << (2 * quarter) for quarter in range(4)).astype(np.uint8)
    contents = np.concatenate([np.zeros((experts, 7), np.uint8), packed.reshape(experts, -1)], 1)
    signs = np.array([0, 1, -1], np.float32)[codes].reshape(experts, segments, SEGMENT)
    deltas = (scales[:, :, None] * signs).reshape(experts, -1)[:, :elements]
    return Looks(coarse, contents, 7, scales), np.ascontiguousarray(deltas)


@given(shapes, st.sampled_from([1.0, -0.5, 0.0]), st.sampled_from([1.0, 2.5]), st.booleans())
def test_weighted_deltas(shape: tuple[int, int, int], scale: float, divisor: float, some: bool) -> None:
    stack, present, base = blocks(*shape)
    looks, coarse = looks_at(len(stack), base.size, some=some)
    weights = np.linspace(-0.5, 1, len(stack)).astype(np.float32)
    origin, deltas = as_tile(stack, present, base, deltas=True)
    deltas = np.where(looks.coarse[:, None], coarse, deltas)
    wanted = np.empty(base.size, np.float32)
    kernels.add_weighted(origin, deltas, weights, np.float32(scale), np.float32(divisor), wanted)
    out = np.empty_like(base)
    tile_kernels.add_weighted_stack(stack, present, base, looks, weights, np.float32(scale), np.float32(divisor), out)
    assert_same(out, rounded(wanted))


@given(shapes, st.sampled_from([1.0, 2.5]), st.booleans())
def test_weighted_sums(shape: tuple[int, int, int], divisor: float, some: bool) -> None:
    stack, present, base = blocks(*shape)
    looks, coarse = looks_at(len(stack), base.size, some=some)
    weights = np.linspace(0.25, 1, len(stack)).astype(np.float32)
    origin, rows = as_tile(stack, present, base, deltas=False)
    rows = np.where(looks.coarse[:, None], coarse + origin, rows)
    wanted = np.empty(base.size, np.float32)
    kernels.weighted_sum(rows, weights, np.float32(divisor), wanted)
    out = np.empty_like(base)
    tile_kernels.weighted_sum_stack(stack, present, base, looks, weights, np.float32(divisor), out)
    assert_same(out, rounded(wanted))


def assert_same(found: NDArray[np.uint16], wanted: NDArray[np.uint16]) -> None:
    """Bit for bit, but for which NaN it is: additions of two NaNs may give either."""
    nans = np.isnan(widened(wanted))
    assert np.array_equal(np.isnan(widened(found)), nans)
    assert np.array_equal(found[~nans], wanted[~nans])


@pytest.mark.parametrize("bins", [1, 2])
@given(shapes)
def test_counts_within_bins(bins: int, shape: tuple[int, int, int]) -> None:
    stack, present, base = blocks(*shape)
    _, deltas = as_tile(stack, present, base, deltas=True)
    magnitudes = (deltas.view(np.uint32) & 0x7FFFFFFF) >> 16
    wanted_bins = np.full((len(stack), bins), 0x8000, np.uint32)
    for k, row in enumerate(magnitudes):
        inner = row[(row > 0) & (row < 0x7F80)]
        if inner.size:
            wanted_bins[k, 0] = np.median(inner).astype(np.uint32)
            wanted_bins[k, -1] = inner.max()
    wanted = np.zeros((len(stack), bins, 1 << 16), np.int64)
    mask_kernels.count_low_halves(deltas, wanted_bins, wanted)
    counts = np.zeros_like(wanted)
    tile_kernels.count_low_halves_stack(stack, present, base, wanted_bins, counts)
    assert np.array_equal(counts, wanted)
    if any(present):
        assert wanted.sum() > 0 or not (wanted_bins < 0x8000).any()
