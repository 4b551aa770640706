"""Conversions between floating-point types, against torch bit for bit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.store.convert import check_conversion, convert_block, round_to_bfloat16
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import UsageError

FLOATS = ["BF16", "F16", "F32", "F64"]
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
UNSIGNED = {16: "<u2", 32: "<u4", 64: "<u8"}
QUIET = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8 << 48}
INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0 << 48}


def by_torch(data: NDArray[np.uint8], source: str, target: str) -> NDArray[np.uint8]:
    return torch.from_numpy(data.copy()).view(TORCH[source]).to(TORCH[target]).view(torch.uint8).numpy()


def without_payloads(data: NDArray[np.uint8], dtype: str) -> NDArray[np.unsignedinteger]:
    """Bit patterns with every NaN made the usual one: which payload survives is nobody's promise."""
    bits = DTYPES[dtype].bits
    patterns = data.view(UNSIGNED[bits]).copy()
    magnitude = patterns & np.array((1 << bits - 1) - 1, patterns.dtype)
    patterns[magnitude > INFINITE[dtype]] = QUIET[dtype]
    return patterns


def converted(data: NDArray[np.uint8], source: str, target: str) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user must not see NumPy's
        return convert_block(data, DTYPES[source], DTYPES[target]).copy()


def sample(dtype: str, seed: int = 0) -> NDArray[np.uint8]:
    """Every pattern of 16-bit types; of wider ones random bits, and values around every rounding boundary."""
    bits = DTYPES[dtype].bits
    if bits == 16:
        return np.arange(1 << 16, dtype="<u2").view(np.uint8)
    generator = np.random.default_rng(seed)
    kind = UNSIGNED[bits]
    noise = generator.integers(0, 1 << bits, 20_000, kind)
    near = generator.standard_normal(20_000).astype(f"<f{bits // 8}").view(kind)
    halves = np.concatenate(
        [near & ~np.array((1 << keep) - 1, kind) | np.array(1 << keep - 1, kind) for keep in (13, 16)]
    )
    around = np.concatenate([halves - np.array(1, kind), halves, halves + np.array(1, kind)])
    return np.concatenate([noise, near, around]).view(np.uint8)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_it_is_what_torch_does(source: str, target: str) -> None:
    data = sample(source)
    ours, theirs = converted(data, source, target), by_torch(data, source, target)
    if (source, target) == ("F64", "F16"):
        # torch goes through float32 and rounds twice; once, as here, is the nearest value.
        with np.errstate(all="ignore"):
            theirs = data.view("<f8").astype("<f2").view(np.uint8)
    assert np.array_equal(without_payloads(ours, target), without_payloads(theirs, target))


@given(st.integers(0, 2**32 - 1))
def test_random_float32_to_bfloat16_is_bit_equal_to_torch(seed: int) -> None:
    data = sample("F32", seed)
    assert np.array_equal(
        without_payloads(converted(data, "F32", "BF16"), "BF16"),
        without_payloads(by_torch(data, "F32", "BF16"), "BF16"),
    )


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_nans_stay_nans_and_nothing_else_becomes_one(source: str, target: str) -> None:
    bits = DTYPES[source].bits
    sign, quiet, infinite = 1 << bits - 1, QUIET[source], INFINITE[source]
    patterns = [quiet, quiet | sign, infinite | 1, infinite | 1 | sign, (1 << bits) - 1, infinite, infinite | sign, 0]
    data = np.array(patterns, UNSIGNED[bits]).view(np.uint8)
    found = converted(data, source, target).view(UNSIGNED[DTYPES[target].bits])
    magnitudes = found & np.array((1 << DTYPES[target].bits - 1) - 1, found.dtype)
    assert list(magnitudes > INFINITE[target]) == [True] * 5 + [False] * 3
    assert list(magnitudes[5:]) == [INFINITE[target], INFINITE[target], 0]


def test_rounding_is_to_nearest_and_ties_go_to_even() -> None:
    values = np.array([0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x7F7FFFFF, 0x80000001], "<u4")
    out = np.empty(values.size, "<u2")
    round_to_bfloat16(values.view(np.float32), out)
    assert list(out) == [0x3F80, 0x3F80, 0x3F80, 0x3F81, 0x3F82, 0x7F80, 0x8000]


def test_values_that_fit_come_back() -> None:
    for narrow in ("BF16", "F16"):
        data = sample(narrow)
        for wide in ("F32", "F64"):
            again = converted(converted(data, narrow, wide), wide, narrow)
            assert np.array_equal(without_payloads(again, narrow), without_payloads(data, narrow))


def test_an_empty_block_stays_empty() -> None:
    assert converted(np.empty(0, np.uint8), "F32", "BF16").nbytes == 0


@pytest.mark.parametrize(
    ("name", "found"),
    [("F32", "F32"), ("f32", "F32"), ("float32", "F32"), ("bfloat16", "BF16"), ("BF16", "BF16"), ("half", "F16")],
)
def test_types_have_several_names(name: str, found: str) -> None:
    assert check_conversion(name).name == found


@pytest.mark.parametrize("name", ["", "F8_E4M3", "I32", "int8", "bflaot16", "C64"])
def test_other_types_are_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="not a type to convert to") as caught:
        check_conversion(name)
    assert caught.value.hint
