"""The encodings as codecs of numcodecs: made from a config, applied to any array."""

from __future__ import annotations

import json

import numcodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store.codecs import DELTA_WIDTHS
from mergepipe.store.numcodecs_codecs import OrderedDelta, Planes
from support.strategies import blocks, widths

delta_widths = st.sampled_from(DELTA_WIDTHS)


@given(st.data(), widths)
def test_planes_from_their_config(data: st.DataObject, width: int) -> None:
    codec = numcodecs.get_codec(json.loads(json.dumps(Planes(width).get_config())))
    assert isinstance(codec, Planes)
    assert codec.get_config() == {"id": "mergepipe.planes", "width": width}
    block = data.draw(blocks(1))
    assert np.array_equal(codec.decode(codec.encode(block)), block)


@given(st.data(), delta_widths)
def test_deltas_from_their_config(data: st.DataObject, width: int) -> None:
    codec = numcodecs.get_codec(json.loads(json.dumps(OrderedDelta(width).get_config())))
    assert isinstance(codec, OrderedDelta)
    assert codec.get_config() == {"id": "mergepipe.delta", "width": width}
    block = data.draw(blocks(1))
    bound = codec.bind(np.flip(block).copy())
    out = np.empty_like(block)
    assert bound.decode(bound.encode(block), out) is out
    assert np.array_equal(out, block)


def test_arrays_of_any_type_are_their_bytes() -> None:
    array = np.linspace(0, 1, 1000, dtype="<f4").reshape(10, 100)
    decoded = Planes(4).decode(Planes(4).encode(array))
    assert np.array_equal(decoded.view("<f4").reshape(10, 100), array)


def test_a_delta_without_its_base_says_so() -> None:
    for codec in (OrderedDelta(2), OrderedDelta(2).bind(np.zeros(6, np.uint8))):
        with pytest.raises(ValueError, match="bind"):
            codec.encode(np.zeros(8, np.uint8))


def test_an_absurd_size_is_refused() -> None:
    with pytest.raises(ValueError, match="more than a block"):
        Planes(1).decode((1 << 40).to_bytes(8, "little") + bytes(8))
