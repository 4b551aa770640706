"""The algebra on Gram matrices, and the sums they are made of, against plain float64 vectors."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from mergepipe.merge import gram, gram_kernels

Array = NDArray[np.float64]


def vectors(count: int, elements: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, elements)).astype(np.float32)


@pytest.mark.parametrize("elements", [0, 1, 63, 511, 512, 513, 5000])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_inner_products_are_float64_sums(count: int, elements: int) -> None:
    inputs = vectors(count, elements)
    found = np.zeros((count, count))
    gram_kernels.add_gram(inputs, found)
    wide = inputs.astype(np.float64)
    scale = np.abs(wide) @ np.abs(wide).T + 1e-300
    assert np.all(np.abs(gram.mirrored(found) - wide @ wide.T) <= 1e-14 * scale)
    if count == 2:
        pair = np.zeros((2, 2))
        gram_kernels.add_pair_gram(inputs[0], inputs[1], pair)
        assert pair.tobytes() == found.tobytes()


def test_inner_products_add_up_over_tiles() -> None:
    inputs = vectors(3, 4096)
    whole, parts = np.zeros((3, 3)), np.zeros((3, 3))
    gram_kernels.add_gram(inputs, whole)
    for start in range(0, 4096, 1024):
        gram_kernels.add_gram(np.ascontiguousarray(inputs[:, start : start + 1024]), parts)
    assert whole.tobytes() == parts.tobytes(), "tiles of whole pieces are the same sums"
    strided = np.zeros((3, 3))
    gram_kernels.add_gram(vectors(3, 9000)[:, :4096], strided)
    packed = np.zeros((3, 3))
    gram_kernels.add_gram(np.ascontiguousarray(vectors(3, 9000)[:, :4096]), packed)
    assert strided.tobytes() == packed.tobytes()


@pytest.mark.parametrize("row", [1, 7, 512, 700])
def test_rows_have_inner_products_of_their_own(row: int) -> None:
    inputs = vectors(3, 5 * row)
    found = np.zeros((3, 3, 5))
    gram_kernels.row_grams(inputs, row, found)
    for number in range(5):
        alone = np.zeros((3, 3))
        gram_kernels.add_gram(np.ascontiguousarray(inputs[:, number * row : (number + 1) * row]), alone)
        assert np.array_equal(found[:, :, number], alone)


@pytest.mark.parametrize("cuts", [(0, 60), (0, 10, 60), (0, 5, 25, 60)])
def test_columns_add_up_wherever_a_tile_begins(cuts: tuple[int, ...]) -> None:
    """Tiles end with rows of 5; a column is one of 15, over all of the first axis."""
    inputs = vectors(2, 60)
    found = np.zeros((3, 15))
    for start, stop in pairwise(cuts):
        gram_kernels.add_columns(np.ascontiguousarray(inputs[:, start:stop]), start, found)
    a, b = inputs.astype(np.float64).reshape(2, 4, 15)
    assert np.allclose(found, [(a * a).sum(0), (a * b).sum(0), (b * b).sum(0)], rtol=1e-15)


def test_combinations_are_rounded_once() -> None:
    base, experts = vectors(1, 1000)[0], vectors(3, 1000, seed=1)
    factors = np.array([0.3, -1.7, 2.2])
    out = np.empty(1000, np.float32)
    gram_kernels.combine(base, experts, 0.7, factors, out)
    expected = 0.7 * base.astype(np.float64)
    for factor, expert in zip(factors, experts, strict=True):
        expected = expected + factor * expert
    assert np.array_equal(out, expected.astype(np.float32))
    by_row = np.empty(1000, np.float32)
    gram_kernels.combine_rows(base, experts, 0.7, np.repeat(factors[:, None], 8, 1), by_row)
    assert np.array_equal(out, by_row)


def test_a_base_that_is_not_there_is_not_looked_at() -> None:
    base = np.full(8, np.nan, np.float32)
    experts = np.ones((2, 8), np.float32)
    out = np.empty(8, np.float32)
    gram_kernels.combine(base, experts, 0.0, np.ones(2), out)
    assert np.all(out == 2)
    gram_kernels.combine_columns(base, experts, 0, 0.0, np.ones((2, 4)), out)
    assert np.all(out == 2)


def test_firm_numbers_have_32_bits() -> None:
    values = np.array([math.pi, -1e-30, 1e30, 0.0, 1.0, 1 / 3])
    found = gram.firm(values)
    assert np.all(np.abs(found - values) <= np.abs(values) * 2.0**-32)
    assert np.array_equal(gram.firm(np.nextafter(found, 9e99))[found != 0], found[found != 0]), "but for a last bit"
    assert np.array_equal(np.isnan(gram.firm(np.array([np.nan, 1.0]))), [True, False])


@pytest.mark.parametrize("degrees", [0.001, 1, 30, 90, 150, 179])
@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_nuslerp_goes_along_the_arc(degrees: float, t: float) -> None:
    angle = math.radians(degrees)
    a, b = np.array([1.0, 0.0]), np.array([math.cos(angle), math.sin(angle)])
    factors = gram.nuslerp(np.array(a @ a), np.array(a @ b), np.array(b @ b), t)
    expected = [math.cos(t * angle), math.sin(t * angle)]
    assert np.allclose(factors[0] * a + factors[1] * b, expected, atol=1e-5 / max(math.sin(angle), 1e-5) * 1e-5)


@pytest.mark.parametrize("cos", [1.0, -1.0, 1 - 1e-9, -1 + 1e-9])
def test_collinear_is_straight(cos: float) -> None:
    one = np.array(1.0)
    assert np.array_equal(gram.nuslerp(one, np.array(cos), one, 0.25), [0.75, 0.25])
    assert np.array_equal(gram.slerp(1.0, cos, 1.0, 0.25), [0.75, 0.25])


def test_slerp_of_zero_takes_a_right_angle() -> None:
    assert np.allclose(gram.slerp(0.0, 0.0, 4.0, 0.5), [math.sqrt(0.5)] * 2)


def test_multislerp_is_the_mean_direction_at_the_mean_length() -> None:
    inputs = np.array([[3.0, 0.0], [0.0, 1.0]])
    factors = gram.multislerp(inputs @ inputs.T, np.array([0.5, 0.5]), 1e-8)
    assert factors is not None
    assert np.allclose(factors @ inputs, np.array([1, 1]) / math.sqrt(2) * 2)


@pytest.mark.parametrize("offset", [0.0, 1e-9])
def test_opposite_directions_have_no_mean(offset: float) -> None:
    inputs = np.array([[1.0, 0.0], [-1.0, offset]])
    assert gram.multislerp(inputs @ inputs.T, np.array([0.5, 0.5]), 1e-8) is None


def test_karcher_is_where_the_angles_cancel() -> None:
    """At the mean, the sum of the unit vectors' tangents is zero: that is what it is defined by."""
    units = np.random.default_rng(1).standard_normal((5, 40)) + 0.5
    units /= np.linalg.norm(units, axis=1)[:, None]
    mean = gram.karcher(units @ units.T, 100, 1e-12) @ units
    assert np.linalg.norm(mean) == pytest.approx(1)
    dots = units @ mean
    tangents = (np.arccos(dots) / np.sqrt(1 - dots**2))[:, None] * (units - dots[:, None] * mean)
    assert np.linalg.norm(tangents.mean(axis=0)) < 1e-6


def test_karcher_of_two_is_the_middle_of_the_arc() -> None:
    inputs = np.array([[2.0, 0.0], [0.0, 4.0]])
    assert np.allclose(gram.karcher(inputs @ inputs.T, 10, 1e-5) @ inputs, 3 * np.sqrt([0.5, 0.5]))


def test_karcher_leaves_out_what_is_too_short() -> None:
    inputs = np.array([[2.0, 0.0], [0.0, 1e-6], [0.0, 0.0]])
    assert np.allclose(gram.karcher(inputs @ inputs.T, 10, 1e-5), [(2 + 1e-6) / 3 / 2, 0, 0])
    assert not gram.karcher(np.zeros((3, 3)), 10, 1e-5).any()


def test_karcher_of_opposites_stays_with_the_first() -> None:
    inputs = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert np.allclose(gram.karcher(inputs @ inputs.T, 10, 1e-5) @ inputs, [1.0, 0.0])


def test_model_stock_share() -> None:
    def share(cos: float, count: int) -> float:
        matrix = np.full((count, count), cos)
        np.fill_diagonal(matrix, 1.0)
        return float(gram.model_stock(matrix))

    assert share(1.0, 4) == 1
    assert share(0.0, 4) == 0
    assert share(0.5, 3) == pytest.approx(3 * 0.5 / 2)
    assert share(-1.0, 2) == 0, "no estimate: the base stays"
    assert float(gram.model_stock(np.zeros((3, 3)))) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    matrix = np.array([[bad, bad], [bad, 1.0]])
    found = gram.multislerp(matrix, np.array([0.5, 0.5]), 1e-8)
    assert found is not None and np.isnan(found).any()
    assert np.isnan(gram.karcher(matrix, 10, 1e-5)).any()
    assert np.isnan(gram.slerp(bad, bad, 1.0, 0.3)).any()
    assert np.isnan(gram.model_stock(matrix))
