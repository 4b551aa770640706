"""The compiled loops against the same formulas in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.store import kernels, norms

SIZES = [0, 1, 2, 63, 64, 65, 4095, 4096, 4097]
EDGES = {
    1: np.array([0, 1, 0x7F, 0x80, 0x81, 0xFF], np.uint8),
    2: np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x7F80, 0xFF80, 0x7F81], np.uint16),
    4: np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x7F800000, 0xFFC00000], np.uint32),
}


def random_bits(width: int, size: int, seed: int) -> NDArray[np.unsignedinteger]:
    kind = np.dtype(f"u{width}")
    values = np.random.default_rng(seed).integers(0, 1 << 8 * width, size, kind)
    values[: min(size, EDGES[width].size)] = EDGES[width][:size]
    return values


def expected_difference(new: NDArray[np.unsignedinteger], old: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """The definition, in integers that are wide enough to need no wrap-around until the end."""
    bits = 8 * new.itemsize
    top = 1 << bits - 1

    def ordered(values: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
        signed = values.astype(np.int64)
        return np.where(signed >= top, -(signed - top) - 1, signed)

    wrapped = (ordered(new) - ordered(old) + top) % (1 << bits) - top
    return np.where(wrapped >= 0, 2 * wrapped, -2 * wrapped - 1)


@pytest.mark.parametrize("size", SIZES)
def test_planes_of_two_bytes(size: int) -> None:
    source = random_bits(2, size, 1)
    planes = [np.empty(size, np.uint8) for _ in range(2)]
    kernels.split2(source, *planes)
    for index, plane in enumerate(planes):
        assert np.array_equal(plane, source.view(np.uint8)[index::2])
    out = np.empty_like(source)
    kernels.join2(*planes, out)
    assert np.array_equal(out, source)


@pytest.mark.parametrize("size", SIZES)
def test_planes_of_four_bytes(size: int) -> None:
    source = random_bits(4, size, 2)
    planes = [np.empty(size, np.uint8) for _ in range(4)]
    kernels.split4(source, *planes)
    for index, plane in enumerate(planes):
        assert np.array_equal(plane, source.view(np.uint8)[index::4])
    out = np.empty_like(source)
    kernels.join4(*planes, out)
    assert np.array_equal(out, source)


@pytest.mark.parametrize("size", SIZES)
def test_differences_of_one_byte(size: int) -> None:
    new, old = random_bits(1, size, 3), np.flip(random_bits(1, size, 4)).copy()
    difference = np.empty(size, np.uint8)
    kernels.difference1(new.view(np.int8), old.view(np.int8), difference)
    assert np.array_equal(difference, expected_difference(new, old))
    out = np.empty(size, np.int8)
    kernels.sum1(difference, old.view(np.int8), out)
    assert np.array_equal(out.view(np.uint8), new)


@pytest.mark.parametrize("size", SIZES)
def test_differences_of_two_bytes(size: int) -> None:
    new, old = random_bits(2, size, 5), np.flip(random_bits(2, size, 6)).copy()
    low, high = np.empty(size, np.uint8), np.empty(size, np.uint8)
    kernels.difference2(new.view(np.int16), old.view(np.int16), low, high)
    assert np.array_equal(low + high.astype(np.int64) * 256, expected_difference(new, old))
    out = np.empty(size, np.int16)
    kernels.sum2(low, high, old.view(np.int16), out)
    assert np.array_equal(out.view(np.uint16), new)


@pytest.mark.parametrize("size", SIZES)
def test_differences_of_four_bytes(size: int) -> None:
    new, old = random_bits(4, size, 7), np.flip(random_bits(4, size, 8)).copy()
    difference = np.empty(size, np.uint32)
    kernels.difference4(new.view(np.int32), old.view(np.int32), difference)
    assert np.array_equal(difference, expected_difference(new, old))
    out = np.empty(size, np.int32)
    kernels.sum4(difference, old.view(np.int32), out)
    assert np.array_equal(out.view(np.uint32), new)


def splitmix64(index: int) -> int:
    """Output number ``index`` of the generator seeded with 0 (Steele, Lea and Flood, 2014)."""
    mask = (1 << 64) - 1
    z = (index + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def expected_signs(elements: int) -> NDArray[np.float64]:
    bits = [splitmix64(i // 64) >> i % 64 & 1 for i in range(elements)]
    return 1.0 - 2.0 * np.array(bits, np.float64)


@given(st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_statistics(elements: int, seed: int) -> None:
    delta = np.random.default_rng(seed).standard_normal(elements).astype(np.float32)
    delta[:: 1 + seed % 5] = 0
    histogram = np.zeros((2, norms.HISTOGRAM_BINS), np.uint32)
    sketch, out = np.zeros(norms.SKETCH_SIZE), np.zeros(4)
    kernels.statistics_float32(delta, histogram, sketch, out)
    wide = delta.astype(np.float64)
    assert out[0] == np.count_nonzero(delta)
    np.testing.assert_allclose(out[1:3], [np.sum(wide**2), np.sum(abs(wide))], rtol=1e-5)
    assert out[3] == abs(delta).max()
    assert np.array_equal(
        histogram.sum(0), np.bincount(abs(delta).view(np.uint32) >> 16, minlength=norms.HISTOGRAM_BINS)
    )
    lanes = np.zeros(64)
    np.add.at(lanes, np.arange(elements) % 64, wide * expected_signs(elements))
    np.testing.assert_allclose(sketch, lanes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("elements", [0, 1, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, 4096 + 320, 3 * 4096 + 1])
def test_sums_follow_one_order_to_the_last_bit(elements: int) -> None:
    """Plans are known by what follows from these: in float32 down each of 64 lanes, moved to float64 every 64 rows."""
    delta = np.random.default_rng(elements).standard_normal(elements).astype(np.float32)
    sketch, out = np.zeros(norms.SKETCH_SIZE), np.zeros(4)
    kernels.statistics_float32(delta, np.empty((2, 0), np.uint32), sketch, out)
    signed = (delta * expected_signs(elements)).astype(np.float32)
    lanes = np.zeros(64)
    squares = total = 0.0
    for start in range(0, elements, 64 * 64):
        part = [np.zeros(64, np.float32) for _ in range(3)]
        for row in range(start, min(start + 64 * 64, elements), 64):
            x = delta[row : row + 64]
            for lane, values in zip(part, (x * x, abs(x), signed[row : row + 64]), strict=True):
                lane[: x.size] += values
        for square, magnitude in zip(part[0].tolist(), part[1].tolist(), strict=True):
            squares, total = squares + square, total + magnitude
        lanes += part[2]
    assert out.tolist() == [np.count_nonzero(delta), squares, total, max(abs(delta), default=0)]
    assert np.array_equal(sketch, lanes)


@given(st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_statistics_of_bfloat16_are_those_of_the_float32_difference(elements: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    new, old = generator.integers(0, 1 << 16, (2, elements), np.uint16)
    with np.errstate(all="ignore"):
        delta = (new.astype(np.uint32) << 16).view(np.float32) - (old.astype(np.uint32) << 16).view(np.float32)
    found = []
    for run in (
        lambda *out: kernels.statistics_bfloat16(new, old, *out),
        lambda *out: kernels.statistics_float32(delta, *out),
    ):
        histogram = np.zeros((2, norms.HISTOGRAM_BINS), np.uint32)
        sketch, sums = np.zeros(norms.SKETCH_SIZE), np.zeros(4)
        run(histogram, sketch, sums)
        found.append((histogram.sum(0), sketch, sums))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000])
def test_nans_and_infinities_of_either_sign_have_a_bin(pattern: int) -> None:
    delta = np.full(130, pattern, np.uint32).view(np.float32)
    histogram = np.zeros((2, norms.HISTOGRAM_BINS), np.uint32)
    kernels.statistics_float32(delta, histogram, np.zeros(64), np.zeros(4))
    assert histogram.sum() == 130
    assert histogram.sum(0)[(pattern & 0x7FFFFFFF) >> 16] == 130


def test_every_kernel_is_exercised_here() -> None:
    """A kernel that nobody calls is dead; one that no test calls is a risk."""
    compiled = {name for name, value in vars(kernels).items() if hasattr(value, "py_func") and not name.startswith("_")}
    compiled -= {"signs_of_row"}  # inlined into the others
    source = Path(__file__).read_text(encoding="utf-8")
    assert compiled
    for name in compiled:
        assert f"kernels.{name}(" in source, f"no test calls {name}"
