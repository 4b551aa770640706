"""Planes and ordered differences: lossless for every bit pattern, and suspicious of every payload."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.store import codecs, kernels
from mergepipe.store.codecs import (
    DELTA_WIDTHS,
    decode_delta,
    decode_planes,
    effective_width,
    encode_delta,
    encode_planes,
    payload_size,
    zstd_content_size,
)
from support.strategies import blocks, widths

Block = NDArray[np.uint8]
delta_widths = st.sampled_from(DELTA_WIDTHS)
ALL_16 = np.arange(1 << 16, dtype="<u2")
SPECIAL_32 = np.array(
    [0, 1, 0x80000000, 0x80000001, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x3F800000],
    "<u4",
)  # zeros, subnormals, infinities, signalling and quiet NaNs, one


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for both ways to decode."""
    if request.param == "plain":
        monkeypatch.setattr(codecs, "_loaded_kernels", lambda: None)
    else:
        assert kernels.READY
        assert codecs._loaded_kernels() is kernels


def planes_back(data: Block, width: int, *, text: bool = False) -> Block:
    payload = b"".join(encode_planes(data, width, text=text))
    out = np.full(data.nbytes, 0xAA, np.uint8)
    decode_planes(memoryview(payload), width, out)
    return out


def delta_back(data: Block, base: Block, width: int) -> Block:
    payload = b"".join(encode_delta(data, base, width))
    out = np.full(data.nbytes, 0xAA, np.uint8)
    decode_delta(memoryview(payload), width, base, out)
    return out


class TestRoundTrips:
    @given(st.data(), widths, st.booleans())
    def test_planes(self, data: st.DataObject, width: int, text: bool) -> None:
        block = data.draw(blocks(width))
        assert np.array_equal(planes_back(block, width, text=text), block)

    @given(st.data(), delta_widths)
    def test_deltas(self, data: st.DataObject, width: int) -> None:
        block = data.draw(blocks(width))
        base = np.frombuffer(data.draw(st.randoms()).randbytes(block.nbytes), np.uint8).copy()
        assert np.array_equal(delta_back(block, base, width), block)
        assert np.array_equal(delta_back(block, block, width), block)

    @pytest.mark.parametrize("chosen", [0, 1, 0x8000, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF, 0x7FFF, 0x3F80, 0x7C00])
    def test_every_16_bit_value_against_a_special_one(self, chosen: int) -> None:
        fixed = np.full_like(ALL_16, chosen)
        for new, old in ((ALL_16, fixed), (fixed, ALL_16)):
            assert np.array_equal(delta_back(new.view(np.uint8), old.view(np.uint8), 2), new.view(np.uint8))

    @given(st.integers(0, 2**32 - 1))
    def test_every_16_bit_value_against_any_one(self, seed: int) -> None:
        old = np.random.default_rng(seed).permutation(ALL_16)
        assert np.array_equal(delta_back(ALL_16.view(np.uint8), old.view(np.uint8), 2), ALL_16.view(np.uint8))

    def test_every_8_bit_value_against_every_other(self) -> None:
        new, old = (each.ravel().astype(np.uint8) for each in np.meshgrid(np.arange(256), np.arange(256)))
        assert np.array_equal(delta_back(new, old, 1), new)

    @given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
    def test_32_bit_values_among_the_special_ones(self, values: list[int], seed: int) -> None:
        everything = np.concatenate([SPECIAL_32, np.array(values, "<u4")])
        new, old = (each.ravel().copy() for each in np.meshgrid(everything, everything))
        order = np.random.default_rng(seed).permutation(new.size)
        new, old = new[order], old[order]
        assert np.array_equal(delta_back(new.view(np.uint8), old.view(np.uint8), 4), new.view(np.uint8))

    @pytest.mark.parametrize("width", [1, 2, 4, 8])
    def test_large_blocks_take_the_sampling_path(self, width: int) -> None:
        generator = np.random.default_rng(5)
        noise = generator.integers(0, 256, 1 << 20, np.uint8)
        calm = generator.integers(0, 3, 1 << 20, np.uint8)
        half = np.concatenate([noise[: 1 << 19], calm[: 1 << 19]])
        for block in (noise, calm, half):
            assert np.array_equal(planes_back(block, width), block)
            if width in DELTA_WIDTHS:
                assert np.array_equal(delta_back(block, noise, width), block)


class TestSizes:
    def test_noise_grows_by_no_more_than_its_table(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, 1 << 18, np.uint8)
        for width in (1, 2, 4, 8):
            assert payload_size(encode_planes(noise, width)) <= noise.nbytes + 8 * width

    def test_a_fine_tune_is_far_smaller_against_its_base(self) -> None:
        generator = np.random.default_rng(1)
        base = generator.standard_normal(1 << 17, np.float32) * np.float32(0.02)
        tuned = base + generator.standard_normal(1 << 17, np.float32) * np.float32(1e-5)
        for kind, share in (("<f2", 0.75), ("<f4", 0.9)):
            new, old = tuned.astype(kind).view(np.uint8), base.astype(kind).view(np.uint8)
            width = np.dtype(kind).itemsize
            assert payload_size(encode_delta(new, old, width)) < share * payload_size(encode_planes(new, width))

    def test_a_small_change_is_a_small_number_across_zero_and_exponents(self) -> None:
        old = np.array([0x0000, 0x8000, 0x3F80, 0x3F7F, 0xBF80], "<u2")  # +0, -0, 1, below 1, -1
        new = np.array([0x8000, 0x0000, 0x3F7F, 0x3F80, 0xBF81], "<u2")
        payload = b"".join(encode_delta(new.view(np.uint8), old.view(np.uint8), 2))
        low, high = payload[16:21], payload[21:26]
        assert max(low) <= 2
        assert set(high) == {0}

    def test_a_payload_stays_as_it_is_when_the_next_is_made(self) -> None:
        """Both encodings of a block are made before one is chosen, in the same buffers."""
        noise, other = np.random.default_rng(2).integers(0, 256, (2, 4096), np.uint8)
        for width in (1, 2, 4, 8):
            parts = [encode_planes(noise, width)]
            if width in DELTA_WIDTHS:
                parts.append(encode_delta(noise, other, width))
            before = [b"".join(each) for each in parts]
            encode_planes(other, width)
            assert [b"".join(each) for each in parts] == before

    @pytest.mark.parametrize(("size", "width", "planes"), [(10, 2, 2), (11, 2, 1), (12, 8, 1), (16, 8, 8), (6, 3, 1)])
    def test_a_block_that_is_no_whole_number_of_elements_is_one_plane(self, size: int, width: int, planes: int) -> None:
        assert effective_width(size, width) == planes

    def test_the_payload_is_as_the_format_says(self) -> None:
        data = np.frombuffer(bytes([1, 0]) * 500 + bytes(range(256)), np.uint8)
        payload = b"".join(encode_planes(data, 2))
        table = np.frombuffer(payload[:16], "<u8")
        methods, sizes = table >> np.uint64(56), table & np.uint64((1 << 56) - 1)
        streams = [payload[16 : 16 + int(sizes[0])], payload[16 + int(sizes[0]) :]]
        assert int(sizes.sum()) + 16 == len(payload)
        for index in range(2):
            plane = data[index::2].tobytes()
            assert methods[index] in (0, 1)
            decoded = streams[index] if methods[index] == 0 else zstandard.decompress(streams[index])
            assert decoded == plane


class TestHostilePayloads:
    @given(st.data(), st.sampled_from(["planes", "delta"]), delta_widths)
    def test_a_changed_payload_is_an_error_or_has_the_right_size(
        self, data: st.DataObject, kind: str, width: int
    ) -> None:
        block = data.draw(blocks(width))
        base = np.zeros_like(block)
        parts = encode_planes(block, width) if kind == "planes" else encode_delta(block, base, width)
        payload = bytearray(b"".join(parts))
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(payload)))
            match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
                case "flip" if payload:
                    payload[place % len(payload)] ^= data.draw(st.integers(1, 255))
                case "cut":
                    del payload[place:]
                case "insert":
                    payload[place:place] = data.draw(st.binary(max_size=9))
                case "repeat":
                    payload += payload[place:]
        guarded = np.full(block.nbytes + 64, 0xAA, np.uint8)
        try:
            if kind == "planes":
                decode_planes(memoryview(payload), width, guarded[: block.nbytes])
            else:
                decode_delta(memoryview(payload), width, base, guarded[: block.nbytes])
        except (ValueError, RuntimeError):
            pass
        assert (guarded[block.nbytes :] == 0xAA).all(), "wrote behind the block"

    @pytest.mark.parametrize(
        ("payload", "said"),
        [
            (b"", "inside its table"),
            (bytes(15), "inside its table"),
            ((4).to_bytes(8, "little") * 2 + bytes(7), "inside a plane"),
            ((4).to_bytes(8, "little") * 2 + bytes(9), "after its last plane"),
            ((3).to_bytes(8, "little") * 2 + bytes(6), "does not have the plane's size"),
            ((2 << 56 | 4).to_bytes(8, "little") * 2 + bytes(8), "does not have the plane's size"),
            ((1 << 56 | 4).to_bytes(8, "little") * 2 + bytes(8), "does not have the plane's size"),
        ],
    )
    def test_each_lie_in_the_table_is_named(self, payload: bytes, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            decode_planes(memoryview(payload), 2, np.empty(8, np.uint8))

    def test_a_bomb_is_refused_before_it_is_decoded(self) -> None:
        bomb = zstandard.compress(bytes(64 << 20))
        assert len(bomb) < 10_000
        payload = (1 << 56 | len(bomb)).to_bytes(8, "little") + bomb
        with pytest.raises(ValueError, match="size"):
            decode_planes(memoryview(payload), 1, np.empty(4096, np.uint8))

    def test_a_frame_that_does_not_declare_its_size_is_refused(self) -> None:
        stream = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
        payload = (1 << 56 | len(stream)).to_bytes(8, "little") + stream
        with pytest.raises(ValueError, match="size"):
            decode_planes(memoryview(payload), 1, np.empty(4096, np.uint8))

    @pytest.mark.parametrize("declared", [100, 4096, 1 << 20])
    def test_a_frame_that_lies_about_its_size_is_refused(self, declared: int) -> None:
        honest = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(range(256)) * 20))
        assert honest[4] >> 6 == 1  # a two-byte size, which lies 256 below
        honest[5:7] = ((declared - 256) % 65536).to_bytes(2, "little")
        size = zstd_content_size(memoryview(honest))
        assert size is not None
        out = np.full(size + 64, 0xAA, np.uint8)
        payload = (1 << 56 | len(honest)).to_bytes(8, "little") + bytes(honest)
        with pytest.raises((ValueError, RuntimeError)):
            decode_planes(memoryview(payload), 1, out[:size])
        assert (out[size:] == 0xAA).all()

    def test_a_second_frame_is_not_appended(self) -> None:
        frame = zstandard.compress(bytes(1000))
        payload = (1 << 56 | 2 * len(frame)).to_bytes(8, "little") + frame * 2
        out = np.full(1064, 0xAA, np.uint8)
        with pytest.raises((ValueError, RuntimeError)):
            decode_planes(memoryview(payload), 1, out[:1000])
        assert (out[1000:] == 0xAA).all()

    @pytest.mark.parametrize("width", [0, 3, 8])
    def test_a_delta_of_another_width_is_refused(self, width: int) -> None:
        with pytest.raises(ValueError, match="width"):
            decode_delta(memoryview(bytes(24)), width, np.empty(8, np.uint8), np.empty(8, np.uint8))

    def test_a_delta_to_a_base_of_another_size_is_refused(self) -> None:
        with pytest.raises(ValueError, match="base of 4 bytes"):
            decode_delta(memoryview(bytes(24)), 2, np.empty(4, np.uint8), np.empty(8, np.uint8))


class TestContentSize:
    @given(st.integers(1, 200_000))
    def test_it_is_what_the_frame_declares(self, size: int) -> None:
        frame = zstandard.compress(bytes(size))
        assert zstd_content_size(memoryview(frame)) == size == zstandard.frame_content_size(frame)

    @given(st.binary(max_size=20))
    def test_strange_bytes_have_none(self, data: bytes) -> None:
        if data[:4] != b"\x28\xb5\x2f\xfd":
            assert zstd_content_size(memoryview(data)) is None

    def test_a_cut_header_has_none(self) -> None:
        frame = zstandard.compress(bytes(100_000))
        assert zstd_content_size(memoryview(frame[:6])) is None
