"""Ids: one parser, one short form, and a space of their own for each kind of record."""

from __future__ import annotations

import pickle

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store.digest import Digest, hash_bytes, hash_record

digests = st.binary(min_size=32, max_size=32).map(Digest)


@given(digests)
def test_text_and_back(digest: Digest) -> None:
    assert Digest.parse(str(digest)) == digest
    assert str(digest) == digest.hex()
    assert str(digest).startswith(digest.short)
    assert len(digest.short) == 12
    assert digest.short in repr(digest)
    assert pickle.loads(pickle.dumps(digest)) == digest
    assert isinstance(pickle.loads(pickle.dumps(digest)), Digest)


@given(st.binary(max_size=80).filter(lambda data: len(data) != 32))
def test_an_id_has_32_bytes(data: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Digest(data)


@pytest.mark.parametrize(
    "text", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, " " + "a" * 63, "a" * 64 + "\n", "é" * 64]
)
def test_anything_else_is_no_id(text: str) -> None:
    with pytest.raises(ValueError, match="not an id"):
        Digest.parse(text)


def test_blocks_have_the_id_that_b3sum_gives() -> None:
    # https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json, input lengths 0 and 1
    assert hash_bytes(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert hash_bytes(b"\0").hex() == "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"


@given(st.binary(max_size=200))
def test_a_file_never_has_the_id_of_a_record(data: bytes) -> None:
    kinds = ["node", "commit", "plan", "recipe", "tensor"]
    ids = [hash_bytes(data), *(hash_record(kind, data) for kind in kinds)]
    assert len(set(ids)) == len(ids)
    assert ids[2] == blake3(data, derive_key_context="mergepipe v1 commit").digest()


@given(st.binary(max_size=5000))
def test_every_kind_of_buffer_has_the_same_id(data: bytes) -> None:
    assert hash_bytes(data) == hash_bytes(bytearray(data)) == hash_bytes(memoryview(data))
