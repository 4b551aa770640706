"""Delta statistics against straightforward float64, histograms against ``np.bincount``, sketches against the truth."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.store.catalog import open_catalog, release_catalog
from mergepipe.store.digest import Digest
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import DamagedError
from mergepipe.store.norms import HISTOGRAM_BINS, SKETCH_SIZE, Norms, add_norms, read_norms
from mergepipe.store.statistics import (
    DeltaStatistics,
    bin_floor,
    block_statistics,
    magnitude_bin,
    pack_histogram,
    to_float32,
    unpack_histogram,
    unpack_statistics,
)

KINDS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
TOLERANCE = 1e-4  # of sums that run in float32 for 64 rows at a time


def as_bytes(values: NDArray[np.float64], dtype: str) -> NDArray[np.uint8]:
    return values.astype(KINDS[dtype]).view(np.uint8)


def measure(
    new: NDArray[np.float64], old: NDArray[np.float64], dtype: str = "F32", old_dtype: str | None = None
) -> tuple[DeltaStatistics, NDArray[np.int64], NDArray[np.float64]]:
    """``(statistics, histogram, the delta)`` of values rounded to the types.

    The delta is taken in float32, and in float64 where both are F64.
    """
    old_dtype = old_dtype or dtype
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    found = block_statistics(
        as_bytes(new, dtype), as_bytes(old, old_dtype), DTYPES[dtype], DTYPES[old_dtype], histogram
    )
    wide = np.float64 if dtype == old_dtype == "F64" else np.float32
    with np.errstate(invalid="ignore"):
        delta = new.astype(KINDS[dtype]).astype(wide) - old.astype(KINDS[old_dtype]).astype(wide)
    return found, histogram, delta.astype(np.float64)


@given(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS)), st.integers(1, 9000), st.integers(0, 2**32 - 1))
def test_they_are_those_of_numpy(dtype: str, old_dtype: str, elements: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    old = generator.standard_normal(elements)
    new = old + generator.standard_normal(elements) * generator.choice([0, 1e-3, 1.0], elements)
    found, histogram, delta = measure(new, old, dtype, old_dtype)
    magnitudes = abs(delta.astype(np.float32))
    assert found.elements == elements
    assert found.changed == np.count_nonzero(delta)
    assert math.isclose(found.l2, np.linalg.norm(delta), rel_tol=TOLERANCE, abs_tol=1e-12)
    assert math.isclose(found.l1, abs(delta).sum(), rel_tol=TOLERANCE, abs_tol=1e-12)
    assert found.largest == magnitudes.max()
    assert np.array_equal(histogram, np.bincount(magnitudes.view(np.uint32) >> 16, minlength=HISTOGRAM_BINS))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_long_sums_stay_exact(dtype: str) -> None:
    """Two million equal steps: a float32 sum alone would be off by percents."""
    elements = 1 << 21
    found, _, delta = measure(np.full(elements, 0.1), np.zeros(elements), dtype)
    assert math.isclose(found.l1, elements * delta[0], rel_tol=1e-6)
    assert math.isclose(found.l2, math.sqrt(elements) * delta[0], rel_tol=1e-6)


def test_equal_blocks_have_no_delta() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    found, histogram, _ = measure(values, values, "BF16")
    assert (found.changed, found.l2, found.l1, found.largest) == (0, 0, 0, 0)
    assert not found.sketch.any()
    assert histogram[0] == 1000


@pytest.mark.parametrize("dtype", sorted(KINDS))
@pytest.mark.parametrize("elements", [1, 63, 64, 65, 4097])
def test_infinities_and_nans_are_data(dtype: str, elements: int) -> None:
    old = np.zeros(elements)
    infinite, histogram, _ = measure(np.where(np.arange(elements) == 0, -np.inf, old), old, dtype)
    assert (infinite.changed, infinite.largest, infinite.l1, infinite.l2) == (1, math.inf, math.inf, math.inf)
    assert histogram[magnitude_bin(math.inf)] == 1
    broken, histogram, _ = measure(np.where(np.arange(elements) == elements - 1, np.nan, old), old, dtype)
    assert broken.changed == 1
    assert math.isnan(broken.l2)
    assert math.isnan(broken.l1)
    assert histogram.sum() == elements
    assert histogram[magnitude_bin(math.inf) :].sum() == 1


def test_no_histogram_has_to_be_asked_for() -> None:
    values = np.ones(10)
    found = block_statistics(as_bytes(values, "F32"), as_bytes(values * 0, "F32"), DTYPES["F32"], DTYPES["F32"], None)
    assert found.l1 == 10


def test_histograms_add_up_over_blocks() -> None:
    generator = np.random.default_rng(2)
    old, new = generator.standard_normal((2, 5000))
    _, whole, _ = measure(new, old, "BF16")
    parts = np.zeros(HISTOGRAM_BINS, np.int64)
    for piece in np.array_split(np.arange(5000), 7):
        block_statistics(
            as_bytes(new[piece], "BF16"), as_bytes(old[piece], "BF16"), DTYPES["BF16"], DTYPES["BF16"], parts
        )
    assert np.array_equal(whole, parts)


class TestSketch:
    def test_inner_products_are_unbiased(self) -> None:
        """Over many places the mean of the estimates goes to the truth, and their spread is as the theory has it."""
        generator = np.random.default_rng(3)
        errors = []
        for _ in range(300):
            a = generator.standard_normal(3000)
            b = 0.5 * a + generator.standard_normal(3000)
            zero = np.zeros(3000)
            left, _, delta_a = measure(a, zero)
            right, _, delta_b = measure(b, zero)
            scale = np.linalg.norm(delta_a) * np.linalg.norm(delta_b)
            errors.append((np.dot(left.sketch, right.sketch) - np.dot(delta_a, delta_b)) / scale)
        spread = math.sqrt((1 + 0.5**2 / (0.5**2 + 1)) / SKETCH_SIZE)
        assert abs(np.mean(errors)) < 4 * spread / math.sqrt(len(errors))
        assert 0.8 * spread < np.std(errors) < 1.2 * spread

    def test_its_length_estimates_the_norm(self) -> None:
        generator = np.random.default_rng(4)
        ratios = []
        for _ in range(200):
            found, _, _ = measure(generator.standard_normal(5000), np.zeros(5000), "BF16")
            ratios.append(np.dot(found.sketch, found.sketch) / found.l2**2)
        assert abs(np.mean(ratios) - 1) < 0.06

    @given(st.integers(1, 500), st.integers(0, 2**32 - 1))
    def test_it_is_linear(self, elements: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        a, b = generator.integers(-50, 50, (2, elements)).astype(np.float64)
        zero = np.zeros(elements)
        assert np.array_equal(measure(a, zero)[0].sketch + measure(b, zero)[0].sketch, measure(a + b, zero)[0].sketch)

    def test_signs_depend_on_the_place_alone(self) -> None:
        ones = np.ones(640)
        shorter = measure(ones[:320], ones[:320] * 0)[0].sketch
        rest = ones.copy()
        rest[:320] = 0
        assert np.array_equal(shorter + measure(rest, ones * 0)[0].sketch, measure(ones, ones * 0)[0].sketch)


class TestRows:
    @given(st.integers(0, 2**63), st.integers(0, 2**63), st.floats(), st.floats(), st.floats())
    def test_they_come_back(self, elements: int, changed: int, l2: float, l1: float, largest: float) -> None:
        sketch = np.arange(SKETCH_SIZE, dtype=np.float32)
        data = DeltaStatistics(elements, changed, l2, l1, largest, sketch).pack()
        again = unpack_statistics(data)
        assert len(data) == 2 * 8 + 3 * 8 + 64 * 4
        assert (again.elements, again.changed) == (elements, changed)
        assert np.array_equal([again.l2, again.l1, again.largest], [l2, l1, largest], equal_nan=True)
        assert np.array_equal(again.sketch, sketch)

    @pytest.mark.parametrize("data", [b"", bytes(295), bytes(297)])
    def test_other_bytes_are_damage(self, data: bytes) -> None:
        with pytest.raises(DamagedError):
            unpack_statistics(data)

    def test_norms_are_the_head_of_a_row_either_way_round(self, tmp_path: object) -> None:
        catalog = open_catalog(tmp_path, create=True)  # type: ignore[arg-type]
        one, other = Digest(b"\1" * 32), Digest(b"\2" * 32)
        row = DeltaStatistics(10, 3, 2.0, 1.5, 0.5, np.zeros(SKETCH_SIZE, np.float32)).pack()
        try:
            catalog.write(lambda view: view.put("deltas", one + other, row))
            with catalog.reading() as view:
                assert read_norms(view, one, other) == read_norms(view, other, one) == Norms(10, 3, 2.0, 1.5, 0.5)
                assert read_norms(view, one, one) is None
            catalog.write(lambda view: view.put("deltas", one + other, row[:20]))
            with catalog.reading() as view, pytest.raises(DamagedError):
                read_norms(view, one, other)
        finally:
            release_catalog(catalog)

    def test_norms_of_blocks_add_up_to_those_of_the_whole(self) -> None:
        generator = np.random.default_rng(6)
        new, old = generator.standard_normal((2, 3000))
        parts = [measure(new[i : i + 1000], old[i : i + 1000])[0] for i in range(0, 3000, 1000)]
        total = add_norms(Norms(part.elements, part.changed, part.l2, part.l1, part.largest) for part in parts)
        whole = measure(new, old)[0]
        assert (total.elements, total.changed, total.largest) == (3000, whole.changed, whole.largest)
        assert math.isclose(total.l2, whole.l2, rel_tol=1e-6)
        assert math.isclose(total.l1, whole.l1, rel_tol=1e-6)
        assert add_norms([]) == Norms(0, 0, 0.0, 0.0, 0.0)


class TestHistogramRows:
    @given(st.dictionaries(st.integers(0, HISTOGRAM_BINS - 1), st.integers(1, 2**62), max_size=20))
    def test_they_come_back(self, counts: dict[int, int]) -> None:
        histogram = np.zeros(HISTOGRAM_BINS, np.int64)
        for index, count in counts.items():
            histogram[index] = count
        data = pack_histogram(histogram)
        assert len(data) == 4 + 10 * len(counts)
        assert np.array_equal(unpack_histogram(data), histogram)

    @pytest.mark.parametrize("data", [b"", b"\1\0\0\0", bytes(5), b"\1\0\0\0" + b"\xff\xff" + bytes(8)])
    def test_other_bytes_are_damage(self, data: bytes) -> None:
        with pytest.raises(DamagedError):
            unpack_histogram(data)

    @given(st.floats(0, width=32, allow_nan=False))
    def test_a_bin_holds_the_magnitudes_from_its_floor_up(self, magnitude: float) -> None:
        index = magnitude_bin(magnitude)
        assert bin_floor(index) <= magnitude
        assert index == HISTOGRAM_BINS - 1 or not magnitude >= bin_floor(index + 1)
        assert magnitude_bin(bin_floor(index)) == index


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_becomes_the_same_float32(dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype="<u2")
    out = np.empty(1 << 16, np.float32)
    with np.errstate(invalid="ignore"):
        to_float32(patterns.view(np.uint8), DTYPES[dtype], 0, 1 << 16, out)
        expected = patterns.view(KINDS[dtype]).astype(np.float32)
    assert np.array_equal(out, expected, equal_nan=True)
    to_float32(patterns.view(np.uint8), DTYPES[dtype], 100, 7, out[:7])
    assert np.array_equal(out[:7], expected[100:107], equal_nan=True)
