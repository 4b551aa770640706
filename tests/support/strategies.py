"""Hypothesis strategies for what strangers hand in: tensors, headers, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st

from mergepipe.store.dtypes import DTYPES
from support.checkpoints import HeaderStyle, RawTensor, byte_count

BLOCK_BYTES = 4096  # the smallest that a store takes, so that few bytes make several blocks

dtypes = st.sampled_from(sorted(DTYPES))
seeds = st.integers(0, 2**32 - 1)

_components = st.sampled_from(["model", "layers", "0", "1", "10", "weight", "bias", "q_proj", "lm_head", "", "é", "層"])
names = st.one_of(
    st.lists(_components, min_size=1, max_size=6).map(".".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
).filter(lambda name: name != "__metadata__")

extents = st.one_of(st.integers(0, 7), st.sampled_from([1, 2, 64, 65, 100]))
shapes = st.one_of(
    st.just(()),
    st.lists(extents, min_size=1, max_size=4).map(tuple),
    st.tuples(st.integers(1, 9000)),
    st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 90)),
)


def whole_bytes(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether the format has such a tensor: types narrower than a byte must fill their last one."""
    return math.prod(shape) * DTYPES[dtype].bits % 8 == 0


@st.composite
def tensors(draw: st.DrawFn, maximum_bytes: int = 40_000) -> RawTensor:
    """Any type and shape; random bits, or repeated ones that compress."""
    dtype = draw(dtypes)
    shape = draw(shapes.filter(lambda shape: whole_bytes(dtype, shape) and byte_count(dtype, shape) <= maximum_bytes))
    size = byte_count(dtype, shape)
    generator = np.random.default_rng(draw(seeds))
    high = 2 if dtype == "BOOL" else draw(st.sampled_from([1, 4, 256]))
    return RawTensor(dtype, shape, generator.integers(0, high, size, np.uint8).tobytes())


tensor_maps = st.dictionaries(names, tensors(), min_size=1, max_size=6)


@st.composite
def header_styles(draw: st.DrawFn, held: Mapping[str, RawTensor]) -> HeaderStyle:
    """Any way to write the header of these tensors."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    return HeaderStyle(
        metadata=draw(st.none() | st.dictionaries(text, text, max_size=3)),
        header_order=draw(st.permutations(list(held))),
        data_order=draw(st.permutations(list(held))),
        metadata_last=draw(st.booleans()),
        field_order=draw(st.permutations(["dtype", "shape", "data_offsets"])),
        padding=draw(st.text(" \n\t\r", max_size=9)),
        indent=draw(st.sampled_from([None, None, 0, 2])),
        ascii_only=draw(st.booleans()),
    )


@st.composite
def styled_tensors(draw: st.DrawFn) -> tuple[dict[str, RawTensor], HeaderStyle]:
    held = draw(tensor_maps)
    return held, draw(header_styles(held))


widths = st.sampled_from([1, 2, 4, 8])


@st.composite
def blocks(draw: st.DrawFn, width: int = 1, maximum: int = 3000) -> np.ndarray:
    """A block's bytes: a whole number of elements of ``width`` bytes, random or nearly constant."""
    elements = draw(st.one_of(st.integers(0, 9), st.integers(0, maximum)))
    generator = np.random.default_rng(draw(seeds))
    return generator.integers(0, draw(st.sampled_from([1, 2, 256])), elements * width, np.uint8)
