"""Masks, consensus and ranks, compiled, against one element at a time."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mergepipe.merge import choice_kernels, mask_kernels, row_kernels
from mergepipe.merge.mix import ALWAYS, MAGNITUDE, NOTHING, Mix

Floats = NDArray[np.float32]


def rows(count: int, size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


def mix_of(weights: list[float], *, scale: float = 1, consensus: bool = True, normalize: bool = True) -> Mix:
    ones = np.ones(len(weights), np.float32)
    return Mix(np.array(weights, np.float32), ones, np.float32(scale), np.float32(1), consensus, normalize)


def elected(base: Floats, deltas: Floats, mix: Mix) -> Floats:
    """TIES one element at a time."""
    out = np.empty_like(base)
    for i in range(base.size):
        values = [np.float32(weight * delta) for weight, delta in zip(mix.weights, deltas[:, i], strict=True)]
        total = np.float32(0)
        for value in values:
            total = np.float32(total + value)
        positive = bool(total >= 0)
        mixed = divisor = np.float32(0)
        for value, weight in zip(values, mix.weights, strict=True):
            if value > 0 if positive else value < 0:
                mixed, divisor = np.float32(mixed + value), np.float32(divisor + weight)
        if mix.normalize and divisor != 0:
            mixed = np.float32(mixed / divisor)
        out[i] = np.float32(base[i] + np.float32(np.float32(mix.scale) * mixed))
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 2050])
def test_a_consensus_of_signs(size: int, normalize: bool) -> None:
    base, deltas = rows(1, size, 3)[0], rows(3, size, 4)
    deltas[np.random.default_rng(5).random(deltas.shape) < 0.4] = 0
    deltas[1, ::3] = -deltas[0, ::3]  # sums of exactly zero, where the third is zero
    mix = mix_of([1.0, 1.0, 0.5], scale=1.3, normalize=normalize)
    out = np.empty_like(base)
    mask_kernels.merge_all(base, deltas.copy(), mix, out)
    np.testing.assert_array_equal(out, elected(base, deltas, mix))


def test_a_consensus_with_weights_of_both_signs() -> None:
    base, deltas = rows(1, 300, 6)[0], rows(3, 300, 7)
    mix = mix_of([1.0, -0.25, 0.5], scale=-1, normalize=False)
    out = np.empty_like(base)
    mask_kernels.merge_all(base, deltas.copy(), mix, out)
    np.testing.assert_array_equal(out, elected(base, deltas, mix))


def test_experts_may_lie_apart_in_memory() -> None:
    """A shorter last tile of a buffer with longer rows."""
    base, deltas = rows(1, 700)[0], rows(3, 1000, 1)
    mix, apart, together = mix_of([1.0, 0.5, 2.0]), np.empty_like(base), np.empty_like(base)
    mask_kernels.merge_all(base, deltas.copy()[:, :700], mix, apart)
    mask_kernels.merge_all(base, deltas[:, :700].copy(), mix, together)
    np.testing.assert_array_equal(apart, together)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_passed_on(bad: float) -> None:
    base, deltas = rows(1, 10)[0], rows(2, 10)
    deltas[0, 3] = bad
    out = np.empty_like(base)
    mask_kernels.merge_all(base, deltas, mix_of([1.0, 1.0]), out)
    assert not np.isfinite(out[3])
    assert np.isfinite(np.delete(out, 3)).all()


def test_magnitudes_equal_to_a_threshold_are_kept() -> None:
    limit = int(np.float32(0.5).view(np.uint32))
    row = np.array([0.5, -0.5, 0.49999997, -0.49999997, 0, -0.0, 3, -np.inf, 1e-45], np.float32)

    def kept(floor: int, ceiling: int) -> Floats:
        values = row.copy()
        mask_kernels.keep_between(values, np.uint32(floor), np.uint32(ceiling))
        return values

    np.testing.assert_array_equal(kept(0, MAGNITUDE), row)
    np.testing.assert_array_equal(kept(limit, MAGNITUDE), [0.5, -0.5, 0, 0, 0, 0, 3, -np.inf, 0])
    np.testing.assert_array_equal(kept(limit, limit), [0.5, -0.5, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(kept(0x7F800000, MAGNITUDE), [0, 0, 0, 0, 0, 0, 0, -np.inf, 0])
    np.testing.assert_array_equal(kept(NOTHING, MAGNITUDE), np.zeros(9))


def splitmix64(key: int, number: int) -> int:
    mask = (1 << 64) - 1
    z = (key + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_random_bits_are_those_of_splitmix64() -> None:
    """Its first outputs from the state 0 are published; element 2n has the lower half of number n."""
    out = np.empty(50, np.uint64)
    mask_kernels.hash_elements(np.uint64(0), 0, 100, out)
    assert [int(number) for number in out[:2]] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    key = 0xFEDCBA9876543210
    mask_kernels.hash_elements(np.uint64(key), 1 << 33, 100, out)
    assert [int(number) for number in out] == [splitmix64(key, (1 << 32) + number) for number in range(50)]


@pytest.mark.parametrize("start", [0, 1, 7, 1023, (1 << 32) - 5])
@pytest.mark.parametrize("size", [1, 2, 1024, 3001])
def test_a_mask_depends_on_an_elements_index_alone(start: int, size: int) -> None:
    deltas, keys = np.ones((2, size), np.float32), np.array([5, 1 << 63], np.uint64)
    chances = np.array([ALWAYS // 3, ALWAYS], np.uint32)
    lanes, out = np.zeros((2, 2, 64)), np.empty(size, np.float32)
    mix = mix_of([1.0, 0.0], consensus=False, normalize=False)
    mask_kernels.merge_dropped(np.zeros(size, np.float32), deltas.copy(), start, keys, chances, mix, out)
    for i in {0, size // 2, size - 1}:
        number = splitmix64(5, (start + i) // 2) >> (32 * ((start + i) % 2)) & 0xFFFFFFFF
        assert out[i] == (number >> 1 < ALWAYS // 3)
    mask_kernels.add_dropped(deltas, start, keys, chances, lanes)
    np.testing.assert_array_equal(lanes.sum(axis=2), [[size, out.sum()], [size, size]])


def test_sums_in_lanes_do_not_depend_on_where_tiles_are_cut() -> None:
    values = rows(1, 5000)[0]
    whole = np.zeros(64)
    mask_kernels.add_magnitudes(values, 0, whole)
    np.testing.assert_allclose(whole.sum(), np.abs(values.astype(np.float64)).sum())
    for step in (1, 63, 64, 65, 1000):
        parts = np.zeros(64)
        for start in range(0, 5000, step):
            mask_kernels.add_magnitudes(values[start : start + step], start, parts)
        np.testing.assert_array_equal(parts, whole)


def test_lower_halves_are_counted_in_the_bins_asked_for() -> None:
    values = np.round(rows(2, 5000), 2)
    patterns = np.abs(values).view(np.uint32)
    bins = np.array([[patterns[0, 7] >> 16, 1 << 15], [patterns[1, 7] >> 16, patterns[1, 8] >> 16]], np.uint32)
    counts = np.zeros((2, 2, 65536), np.int64)
    mask_kernels.count_low_halves(values, bins, counts)
    for k in range(2):
        for m in range(2):
            found = patterns[k][patterns[k] >> 16 == bins[k, m]] & 0xFFFF
            np.testing.assert_array_equal(counts[k, m], np.bincount(found, minlength=65536))


@pytest.mark.parametrize("width", [1, 2, 3, 100, 2048, 2049, 5000])
def test_chances_follow_the_ranks_within_a_row(width: int) -> None:
    count = 2 if width > 2000 else 20
    deltas = np.round(rows(1, count * width), 3)
    keys, chances = np.array([99], np.uint64), np.array([[ALWAYS // 5, ALWAYS // 10 * 9]], np.uint32)
    bits = np.empty(count * width // 2 + 1, np.uint64)
    mask_kernels.hash_elements(keys[0], 0, count * width, bits)
    uniform = bits.view(np.uint32)[: count * width].reshape(count, width) >> 1
    ranks = np.argsort(np.argsort(np.abs(deltas.reshape(count, width)), axis=1, kind="stable"), axis=1, kind="stable")
    low, high = (int(chance) for chance in chances[0])
    limits = low + ranks * ((high - low) / max(width - 1, 1)) if width > 1 else np.full((count, 1), (low + high) / 2)
    expected = np.where(uniform < np.floor(limits), deltas.reshape(count, width), 0)
    result = deltas.copy()
    row_kernels.drop_rows(result, 0, width, keys, chances)
    np.testing.assert_array_equal(result.reshape(count, width), expected)


def test_exponentials_and_logarithms_are_right_to_nearly_all_digits() -> None:
    """Through what they are for: the divergence of two softmaxes, in float64."""
    generator = np.random.default_rng(0)
    for width, spread in ((1, 1.0), (2, 3.0), (15, 0.02), (16, 30.0), (1000, 0.02), (1000, 400.0)):
        old = (generator.standard_normal(width) * spread).astype(np.float32)
        new = (old + generator.standard_normal(width) * spread / 10).astype(np.float32)
        out = np.empty(width, np.float32)
        row_kernels.importances(new, old, width, out)
        p, q = (np.exp(row.astype(np.float64) - row.max()) for row in (new, old))
        p, q = p / p.sum() + 1e-8, q / q.sum() + 1e-8
        expected = np.abs(new - old) * np.float32((p * np.log(p / q)).sum())
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-14)


def test_variances_are_those_of_numpy() -> None:
    deltas = rows(5, 3000)
    deltas[:, :100] = deltas[0, :100]  # equal ones have none
    variances = deltas.astype(np.float64).var(axis=0).astype(np.float32)
    histogram = np.zeros(32768, np.int64)
    choice_kernels.count_variances(deltas, histogram)
    np.testing.assert_array_equal(histogram, np.bincount(variances[100:].view(np.uint32) >> 16, minlength=32768))
    chosen = int(np.argmax(histogram))
    counts = np.zeros(65536, np.int64)
    choice_kernels.count_variances_within(deltas, np.uint32(chosen), counts)
    patterns = variances.view(np.uint32)
    np.testing.assert_array_equal(counts, np.bincount(patterns[patterns >> 16 == chosen] & 0xFFFF, minlength=65536))
    floor = patterns[200]
    lanes = np.zeros((5, 64))
    choice_kernels.add_squares(deltas, 0, floor, lanes)
    squares = (deltas[:, patterns >= floor].astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose(lanes.sum(axis=1), squares)
