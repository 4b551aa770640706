"""The inner loops against torch and NumPy, on every kind of float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergepipe.merge import kernels
from mergepipe.store.convert import round_to_bfloat16

Floats = NDArray[np.float32]


def all_kinds_of_float32() -> NDArray[np.uint32]:
    """Every upper half, with lower halves around the middle between two bfloat16s: all that rounding can meet."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return np.asarray((upper[:, None] | lower).reshape(-1), np.uint32)


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    patterns = all_kinds_of_float32()
    out = np.empty(patterns.size, np.uint16)
    kernels.round_bfloat16(patterns, out)
    expected = torch.from_numpy(patterns.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nans = np.isnan(patterns.view(np.float32))
    np.testing.assert_array_equal(out[~nans], expected[~nans])
    assert bool(np.isnan((out[nans].astype(np.uint32) << 16).view(np.float32)).all())


def test_rounding_to_bfloat16_is_that_of_exports() -> None:
    patterns = all_kinds_of_float32()
    out, other = np.empty(patterns.size, np.uint16), np.empty(patterns.size, np.uint16)
    kernels.round_bfloat16(patterns, out)
    round_to_bfloat16(patterns.view(np.float32), other)
    np.testing.assert_array_equal(out, other)


def test_every_bfloat16_widens_to_its_value_and_rounds_back() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(halves.size, np.uint32)
    kernels.widen_bfloat16(halves, wide)
    expected = torch.from_numpy(halves.view(np.int16)).view(torch.bfloat16).to(torch.float32)
    np.testing.assert_array_equal(wide.view(np.float32), expected.numpy())
    back = np.empty_like(halves)
    kernels.round_bfloat16(wide, back)
    signalling = (halves & 0x7FC0) == 0x7F80  # a NaN with the quiet bit off, or an infinity
    signalling &= (halves & 0x3F) != 0
    np.testing.assert_array_equal(back, np.where(signalling, halves | 0x40, halves))


def rows(count: int, size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


@pytest.mark.parametrize("size", [0, 1, 63, 2047, 2048, 2049, 5000])
def test_sums_run_over_the_experts_in_order(size: int) -> None:
    """In float32 the order of a sum shows: the kernels' is that of the experts, whatever the size of a tile."""
    experts, base = rows(5, size), rows(1, size, 1)[0]
    weights = np.array([0.3, -1.7, 1e-3, 12.5, 0.1], np.float32)
    out = np.empty(size, np.float32)
    expected = np.zeros(size, np.float32)
    for weight, row in zip(weights, experts, strict=True):
        expected = expected + weight * row
    kernels.weighted_sum(experts, weights, np.float32(1), out)
    np.testing.assert_array_equal(out, expected)
    kernels.weighted_sum(experts, weights, np.float32(0.3), out)
    np.testing.assert_array_equal(out, expected / np.float32(0.3))
    kernels.add_weighted(base, experts, weights, np.float32(0.7), np.float32(3), out)
    np.testing.assert_array_equal(out, base + np.float32(0.7) * (expected / np.float32(3)))


def test_subtract_works_in_place() -> None:
    values, base = rows(2, 100)
    expected = values - base
    kernels.subtract(values, base)
    np.testing.assert_array_equal(values, expected)


def test_a_scaled_copy() -> None:
    source = rows(1, 100)[0]
    out = np.empty_like(source)
    kernels.scaled(source, np.float32(-0.3), out)
    np.testing.assert_array_equal(out, source * np.float32(-0.3))


def test_swapping_near_stays_between_the_two() -> None:
    base, expert = rows(2, 5000)
    expert[:100] = base[:100]
    for reach in (-1.0, 0.0, 1e-7, 0.3, 10.0):
        out = np.empty_like(base)
        kernels.swap_near(base, expert, np.float32(reach), out)
        assert bool((out >= np.minimum(base, expert)).all() and (out <= np.maximum(base, expert)).all())
        np.testing.assert_array_equal(out[:100], base[:100])
    np.testing.assert_array_equal(out, expert)
    kernels.swap_near(base, expert, np.float32(0), out)
    np.testing.assert_array_equal(out, base)


def test_swapping_near_passes_nans_on() -> None:
    base, expert = np.array([1, np.nan, np.inf], np.float32), np.array([np.nan, 1, 1], np.float32)
    out = np.empty_like(base)
    kernels.swap_near(base, expert, np.float32(0.5), out)
    np.testing.assert_array_equal(out, [np.nan, np.nan, np.inf])
