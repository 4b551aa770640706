"""Chunk grids: blocks tile the tensor's bytes, in order, without gaps, and appended rows leave earlier blocks alone."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mergepipe.store import chunking
from mergepipe.store.chunking import block_count, block_elements, chunk_shape, grid_shape, is_contiguous

shapes = st.one_of(
    st.lists(st.integers(0, 12), max_size=5).map(tuple),
    st.tuples(st.integers(1, 5), st.integers(1, 400), st.integers(1, 400)),
    st.lists(st.sampled_from([1, 2, 3, 5, 9999, 4096, 70001]), min_size=1, max_size=4).map(tuple),
)
bits = st.sampled_from([4, 6, 8, 16, 32, 64])
targets = st.sampled_from([4096, 8192, 65536, 2 << 20])


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape, width, target = draw(shapes), draw(bits), draw(targets)
    assume(math.prod(shape) * width % 8 == 0)
    chunks = chunk_shape(shape, width, target)
    assume(block_count(shape, chunks) < 20_000)
    return shape, width, target


@given(tensors())
def test_blocks_tile_the_bytes_in_order(sample: tuple[tuple[int, ...], int, int]) -> None:
    shape, width, target = sample
    chunks = chunk_shape(shape, width, target)
    position = 0
    for index in range(block_count(shape, chunks)):
        start, count = block_elements(shape, chunks, index)
        assert start * width == position
        assert count > 0
        assert start * width % 8 == count * width % 8 == 0, "a block starts or ends inside of a byte"
        position += count * width
    assert position == math.prod(shape) * width


@given(tensors())
def test_chunks_have_the_form_that_makes_them_slices(sample: tuple[tuple[int, ...], int, int]) -> None:
    shape, width, target = sample
    chunks = chunk_shape(shape, width, target)
    assert is_contiguous(shape, chunks, width)
    assert len(chunks) == len(shape)
    assert all(1 <= chunk <= max(extent, 1) for chunk, extent in zip(chunks, shape, strict=True))
    assert math.prod(grid_shape(shape, chunks)) == block_count(shape, chunks)


@given(tensors())
def test_chunks_are_as_large_as_the_target_allows(sample: tuple[tuple[int, ...], int, int]) -> None:
    shape, width, target = sample
    assume(width >= 8 and 0 not in shape)
    chunks = chunk_shape(shape, width, target)
    size = math.prod(chunks) * width // 8
    assert size <= max(target, width // 8)
    if chunks != shape:
        split = next(axis for axis, chunk in enumerate(chunks) if chunk != shape[axis])
        rest = math.prod(shape[split + 1 :]) * width // 8
        assert size + rest > target, "one more row would have fitted"


@pytest.mark.parametrize(
    ("shape", "width", "target"),
    [((7, 9, 11), 16, 256), ((5, 1, 33), 32, 300), ((40,), 64, 64), ((3, 2, 8), 4, 16), ((2, 4, 1, 6), 8, 12)],
)
def test_a_block_is_its_chunk_of_the_array(shape: tuple[int, ...], width: int, target: int) -> None:
    chunks = chunk_shape(shape, width, target)
    array = np.arange(math.prod(shape)).reshape(shape)
    flat = array.reshape(-1)
    grid = grid_shape(shape, chunks)
    assert math.prod(grid) > 1
    for index in range(block_count(shape, chunks)):
        place = np.unravel_index(index, grid)
        corner = tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunks, strict=True))
        start, count = block_elements(shape, chunks, index)
        assert np.array_equal(flat[start : start + count], array[corner].reshape(-1))


@given(
    st.integers(1, 900), st.integers(1, 900), st.lists(st.integers(1, 40), max_size=2), bits.filter(lambda b: b >= 8)
)
def test_appended_rows_leave_the_blocks_before_them(rows: int, more: int, rest: list[int], width: int) -> None:
    target = 4096
    before, after = (rows, *rest), (rows + more, *rest)
    chunks = chunk_shape(before, width, target)
    assume(chunks != before)  # else the tensor was a single block
    assert chunk_shape(after, width, target) == chunks
    whole = math.prod(rest) * width // 8 * rows // (math.prod(chunks) * width // 8)
    for index in range(whole):
        assert block_elements(before, chunks, index) == block_elements(after, chunks, index)


def test_scalars_and_empty_tensors() -> None:
    assert chunk_shape((), 16, 4096) == ()
    assert block_count((), ()) == 1
    assert block_elements((), (), 0) == (0, 1)
    assert chunk_shape((0, 5), 16, 4096) == (1, 5)
    assert block_count((0, 5), (1, 5)) == 0
    assert chunk_shape((1 << 61, 0), 64, 4096) == (1 << 61, 1)


def test_packed_rows_are_grouped_so_that_chunks_start_on_a_byte() -> None:
    # Three 4-bit elements a row: an outer slice of 9,999 rows ends inside of a byte, so the outer axis is split.
    assert chunk_shape((2, 9999, 3), 4, 4096) == (2, 9999, 3)
    assert chunk_shape((9998, 3), 4, 4096) == (2730, 3)
    assert chunk_shape((100_000, 3), 6, 4096) == (1820, 3)


@pytest.mark.parametrize(
    ("shape", "chunks", "width"),
    [
        ((4, 4), (2, 2), 16),  # a column is no slice
        ((4, 4), (4,), 16),  # another rank
        ((4, 4), (0, 4), 16),
        ((2, 3, 4), (2, 1, 4), 16),
        ((4, 3), (1, 3), 4),  # a row of a byte and a half
        ((2, 3, 3), (1, 3, 3), 4),
    ],
)
def test_grids_that_are_no_slices_are_known(shape: tuple[int, ...], chunks: tuple[int, ...], width: int) -> None:
    assert not is_contiguous(shape, chunks, width)


def test_the_examples_in_the_documentation() -> None:
    assert doctest.testmod(chunking).failed == 0
    assert doctest.testmod(chunking).attempted >= 2
