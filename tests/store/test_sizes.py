"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store.errors import UsageError
from mergepipe.store.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12 B", 12),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("2G", 2 << 30),
        ("500MB", 500_000_000),
        ("500 MB", 500_000_000),
        ("1.5KiB", 1536),
        ("1.5kb", 1500),
        ("0.5M", 1 << 19),
        (" 3 T ", 3 << 40),
        ("1TB", 10**12),
        ("9007199254740993", 9007199254740993),  # no float in between
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.", ".5", "1e9", "5 XB", "1 2", "0x10", "NaN", "١٢", "1" * 5000])
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="not a size") as caught:
        parse_size(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (340, "340 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (-2048, "-2.0 KiB"),
        (1288490189, "1.2 GiB"),
        (5 << 40, "5.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_what_is_written_is_read_as_nearly_the_same(size: int) -> None:
    again = parse_size(format_size(size))
    assert abs(again - size) <= max(size * 0.06, 0)
