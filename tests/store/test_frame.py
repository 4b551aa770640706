"""An object's file: the header says all there is to know, and lies are found."""

from __future__ import annotations

import struct

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store.digest import Digest
from mergepipe.store.frame import HEADER_BYTES, Encoding, Header, Kind, check_matches, pack_header, unpack_header

BASE = Digest(bytes(range(32)))


@st.composite
def framed(draw: st.DrawFn) -> tuple[Header, list[bytes]]:
    encoding = draw(st.sampled_from(Encoding))
    payload = draw(st.lists(st.binary(max_size=40), max_size=4))
    base = Digest(draw(st.binary(min_size=32, max_size=32).filter(any))) if encoding is Encoding.DELTA else None
    header = Header(
        kind=draw(st.sampled_from(Kind)),
        encoding=encoding,
        width=draw(st.sampled_from([1, 2, 4, 8])),
        raw_bytes=draw(st.integers(0, 2**64 - 1)),
        payload_bytes=sum(map(len, payload)),
        base=base,
    )
    return header, payload


@given(framed())
def test_headers_come_back(sample: tuple[Header, list[bytes]]) -> None:
    header, payload = sample
    data = pack_header(header, list(payload))
    assert len(data) == HEADER_BYTES
    assert unpack_header(data) == header
    assert unpack_header(memoryview(data + b"".join(payload))) == header
    assert header.stored_bytes == HEADER_BYTES + sum(map(len, payload))
    assert check_matches(data + b"".join(payload))


def test_every_byte_is_where_the_format_says() -> None:
    header = Header(Kind.BLOCK, Encoding.DELTA, 2, 0x0102030405060708, 3, BASE)
    data = pack_header(header, [b"ab", b"c"])
    assert data[:8] == b"\x89MPO\r\n\x1a\n"
    assert data[8:16] == bytes([1, 1, 2, 2, 0, 0, 0, 0])
    assert struct.unpack("<QQ", data[16:32]) == (0x0102030405060708, 3)
    assert data[32:64] == BASE
    assert data[64:] == blake3(data[:64] + b"abc").digest()


@given(framed(), st.data())
def test_the_check_finds_every_flipped_bit(sample: tuple[Header, list[bytes]], data: st.DataObject) -> None:
    header, payload = sample
    whole = bytearray(pack_header(header, list(payload)) + b"".join(payload))
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    assert not check_matches(bytes(whole))


@pytest.mark.parametrize(
    ("position", "replacement", "said"),
    [
        (0, b"\x88", "does not begin as an object does"),
        (4, b"\n\n", "does not begin as an object does"),
        (8, b"\x02", "version 2 is not known"),
        (9, b"\x00", "not known"),
        (9, b"\x07", "not known"),
        (10, b"\x04", "not known"),
        (11, b"\x03", "not known"),
        (12, b"\x01", "contradicts itself"),
        (15, b"\x80", "contradicts itself"),
        (10, b"\x01", "contradicts itself"),  # planes, and yet a base
        (32, bytes(32), "contradicts itself"),  # a delta, and no base
    ],
)
def test_a_header_that_cannot_be_is_refused(position: int, replacement: bytes, said: str) -> None:
    data = bytearray(pack_header(Header(Kind.BLOCK, Encoding.DELTA, 2, 10, 0, BASE), []))
    data[position : position + len(replacement)] = replacement
    with pytest.raises(ValueError, match=said):
        unpack_header(bytes(data))


@given(st.binary(max_size=HEADER_BYTES - 1))
def test_a_short_file_has_no_header(data: bytes) -> None:
    with pytest.raises(ValueError, match="less than a header"):
        unpack_header(data)


@given(st.binary(min_size=HEADER_BYTES, max_size=200))
def test_strange_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        unpack_header(data)
    assert not check_matches(data)
