"""The two block encodings: byte planes, and the ordered difference to a base block.

Both are lossless for every bit pattern. An encoded payload is a table of ``width`` little-endian u64 entries,
one for each byte plane from the least significant, followed by the planes' streams. An entry's top byte is the
method (0 kept as it is, 1 one zstd frame), the other 56 bits are the stream's length.

The ordered difference maps sign-magnitude floats to integers that keep their order
(``x ^ ((x >> (bits-1)) & max)``), subtracts with wrap-around, and folds the sign into the lowest bit (zigzag), so
that a small change of a weight is a small number whatever its exponent.

Both also work as numcodecs codecs (:class:`Planes`, :class:`OrderedDelta`).
"""

from __future__ import annotations

import threading
from typing import Any, Final, TypeAlias

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray
from numcodecs.registry import register_codec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from mergepipe.store.digest import Buffer

Bytes: TypeAlias = NDArray[np.uint8]
_UNSIGNED: Final = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_SIGNED: Final = {1: np.dtype("<i1"), 2: np.dtype("<i2"), 4: np.dtype("<i4"), 8: np.dtype("<i8")}
TILE_BYTES: Final = 128 << 10  # two tiles and their scratch stay in a core's second-level cache
_RAW, _ZSTD = 0, 1
_SAMPLE_BYTES: Final = 32 << 10
_WORTH_IT: Final = 0.97  # a stream must shrink below this share to be worth its decoding
_zstd = Zstd(level=1)


class _Scratch(threading.local):
    """Buffers that each thread allocates once: fresh ones cost page faults on every block."""

    def __init__(self) -> None:
        self._arrays: dict[str, Bytes] = {}

    def bytes(self, name: str, size: int) -> Bytes:
        """``size`` writable bytes under a name, grown when needed."""
        array = self._arrays.get(name)
        if array is None or array.nbytes < size:
            array = np.empty(size, np.uint8)
            self._arrays[name] = array
        return array[:size]


scratch = _Scratch()


def effective_width(size: int, width: int) -> int:
    """The plane count that a block of ``size`` bytes is split into: 1 where the width does not divide it."""
    return width if width in _UNSIGNED and size % width == 0 else 1


def encode_planes(data: Bytes, width: int) -> list[Buffer]:
    """Split into byte planes and compress each that shrinks; returns the payload's parts."""
    elements = data.nbytes // width
    planes = _plane_scratch(width, elements)
    source = data.view(_UNSIGNED[width])
    step = TILE_BYTES // width
    tile = scratch.bytes("tile", TILE_BYTES).view(_UNSIGNED[width])
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        work = tile[: stop - start]
        np.copyto(work, source[start:stop])
        _narrow(work, planes, start, stop)
    return _pack(planes)


def decode_planes(payload: memoryview, width: int, out: Bytes) -> None:
    """Inverse of :func:`encode_planes` into ``out``; raises ValueError or RuntimeError on a bad payload."""
    if width == 1:
        _unpack(payload, [out])
        return
    elements = out.nbytes // width
    planes = _plane_scratch(width, elements)
    _unpack(payload, planes)
    target = out.view(_UNSIGNED[width])
    step = TILE_BYTES // width
    temporary = scratch.bytes("widen", TILE_BYTES).view(_UNSIGNED[width])
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        _widen(planes, start, stop, target[start:stop], temporary[: stop - start])


def ordered(source: NDArray[Any], out: NDArray[Any], temporary: NDArray[Any]) -> None:
    """Map sign-magnitude bit patterns (signed integers) to integers in the floats' order; its own inverse."""
    bits = source.dtype.itemsize * 8
    np.right_shift(source, bits - 1, out=temporary)
    np.bitwise_and(temporary, (1 << (bits - 1)) - 1, out=temporary)
    np.bitwise_xor(source, temporary, out=out)


def encode_delta(data: Bytes, base: Bytes, width: int) -> list[Buffer]:
    """Encode as the ordered difference to ``base`` (same size); returns the payload's parts."""
    elements = data.nbytes // width
    signed = _SIGNED[width]
    planes = _plane_scratch(width, elements)
    new, old = data.view(signed), base.view(signed)
    step = TILE_BYTES // width
    first = scratch.bytes("tile", TILE_BYTES).view(signed)
    second = scratch.bytes("widen", TILE_BYTES).view(signed)
    third = scratch.bytes("third", TILE_BYTES).view(signed)
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        a, b, t = first[: stop - start], second[: stop - start], third[: stop - start]
        ordered(new[start:stop], a, t)
        ordered(old[start:stop], b, t)
        np.subtract(a, b, out=a)
        np.right_shift(a, width * 8 - 1, out=t)
        np.left_shift(a, 1, out=a)
        np.bitwise_xor(a, t, out=a)
        _narrow(a.view(_UNSIGNED[width]), planes, start, stop)
    return _pack(planes)


def decode_delta(payload: memoryview, width: int, base: Bytes, out: Bytes) -> None:
    """Inverse of :func:`encode_delta` into ``out``; raises ValueError or RuntimeError on a bad payload."""
    elements = out.nbytes // width
    if base.nbytes != out.nbytes:
        raise ValueError(f"the base block has {base.nbytes} bytes, the delta {out.nbytes}")
    planes = _plane_scratch(width, elements)
    _unpack(payload, planes)
    signed, unsigned = _SIGNED[width], _UNSIGNED[width]
    target, old = out.view(signed), base.view(signed)
    step = TILE_BYTES // width
    first = scratch.bytes("tile", TILE_BYTES).view(signed)
    second = scratch.bytes("widen", TILE_BYTES).view(signed)
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        a, t, result = first[: stop - start], second[: stop - start], target[start:stop]
        ua = a.view(unsigned)
        _widen(planes, start, stop, ua, t.view(unsigned))
        np.bitwise_and(a, 1, out=t)
        np.negative(t, out=t)
        np.right_shift(ua, 1, out=ua)
        np.bitwise_xor(a, t, out=a)
        ordered(old[start:stop], result, t)
        np.add(a, result, out=a)
        ordered(a, result, t)


def payload_size(parts: list[Buffer]) -> int:
    """Bytes of a payload given as parts."""
    return sum(memoryview(part).nbytes for part in parts)


def _plane_scratch(width: int, elements: int) -> list[Bytes]:
    return [scratch.bytes(f"plane{index}", elements) for index in range(width)]


def _narrow(work: NDArray[Any], planes: list[Bytes], start: int, stop: int) -> None:
    """Write each byte of ``work`` to its plane; destroys ``work``. Narrowing copies beat strided ones."""
    for index, plane in enumerate(planes):
        if index:
            np.right_shift(work, 8, out=work)
        np.copyto(plane[start:stop], work, casting="unsafe")


def _widen(planes: list[Bytes], start: int, stop: int, out: NDArray[Any], temporary: NDArray[Any]) -> None:
    """Put the planes' bytes together into ``out``."""
    np.copyto(out, planes[-1][start:stop])
    for plane in planes[-2::-1]:
        np.left_shift(out, 8, out=out)
        np.copyto(temporary, plane[start:stop])
        np.bitwise_or(out, temporary, out=out)


def _pack(planes: list[Bytes]) -> list[Buffer]:
    table = bytearray()
    streams: list[Buffer] = []
    for plane in planes:
        stream = _compress(plane)
        method = _RAW if stream is None else _ZSTD
        # A raw stream is copied: its scratch is reused before the payload reaches the disk.
        kept: bytes = plane.tobytes() if stream is None else stream
        table += (method << 56 | len(kept)).to_bytes(8, "little")
        streams.append(kept)
    return [bytes(table), *streams]


def _compress(plane: Bytes) -> bytes | None:
    """One zstd frame, or None where it would not shrink; a sample decides for planes that are mostly noise."""
    if plane.nbytes >= 4 * _SAMPLE_BYTES:
        middle = plane.nbytes // 2
        sample = plane[middle : middle + _SAMPLE_BYTES]
        if len(_zstd.encode(sample)) > _WORTH_IT * sample.nbytes:
            return None
    stream: bytes = _zstd.encode(plane)
    return stream if len(stream) < _WORTH_IT * plane.nbytes else None


def _unpack(payload: memoryview, planes: list[Bytes]) -> None:
    position = 8 * len(planes)
    if payload.nbytes < position:
        raise ValueError("the payload ends inside its table")
    entries = [int.from_bytes(payload[8 * i : 8 * i + 8], "little") for i in range(len(planes))]
    for plane, entry in zip(planes, entries, strict=True):
        method, size = entry >> 56, entry & ((1 << 56) - 1)
        stream = payload[position : position + size]
        position += size
        if stream.nbytes != size:
            raise ValueError("the payload ends inside a plane")
        if method == _RAW and size == plane.nbytes:
            plane[:] = np.frombuffer(stream, np.uint8)
        elif method == _ZSTD and zstd_content_size(stream) == plane.nbytes:
            if plane.nbytes:
                _zstd.decode(stream, out=plane)
        else:
            raise ValueError("a plane's stream does not have the plane's size")
    if position != payload.nbytes:
        raise ValueError("the payload goes on after its last plane")


def zstd_content_size(frame: memoryview) -> int | None:
    """The content size that a zstd frame declares (RFC 8878, 3.1.1.1), so that no frame can decode to more."""
    if frame.nbytes < 6 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    field_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    field = bytes(frame[start : start + field_bytes])
    if field_bytes == 0 or len(field) != field_bytes:
        return None
    return int.from_bytes(field, "little") + (256 if field_bytes == 2 else 0)


class Planes(Codec):  # type: ignore[misc]  # numcodecs ships no types
    """numcodecs codec: byte planes, each zstd level 1. Config: ``{"id": "mergepipe.planes", "width": 2}``."""

    codec_id = "mergepipe.planes"

    def __init__(self, width: int = 2) -> None:
        self.width = width

    def encode(self, buf: Any) -> bytes:
        """``u64 raw size`` then the payload."""
        data = ensure_contiguous_ndarray(buf).reshape(-1).view(np.uint8)
        return _sized(data, encode_planes(data, effective_width(data.nbytes, self.width)))

    def decode(self, buf: Any, out: Any = None) -> Any:
        payload, target = _split_sized(buf)
        decode_planes(payload, effective_width(target.nbytes, self.width), target)
        return _deliver(target, out)


class OrderedDelta(Codec):  # type: ignore[misc]  # numcodecs ships no types
    """numcodecs codec: ordered difference to a base. Config: ``{"id": "mergepipe.delta", "width": 2}``.

    A codec made from its config has no base bytes: give them with :meth:`bind`.
    """

    codec_id = "mergepipe.delta"

    def __init__(self, width: int = 2) -> None:
        self.width = width
        self._base: Bytes | None = None

    def bind(self, base: Any) -> OrderedDelta:
        """A codec of the same config that encodes against ``base``."""
        bound = OrderedDelta(self.width)
        bound._base = ensure_contiguous_ndarray(base).reshape(-1).view(np.uint8)
        return bound

    def encode(self, buf: Any) -> bytes:
        data = ensure_contiguous_ndarray(buf).reshape(-1).view(np.uint8)
        return _sized(data, encode_delta(data, self._bound(data), effective_width(data.nbytes, self.width)))

    def decode(self, buf: Any, out: Any = None) -> Any:
        payload, target = _split_sized(buf)
        decode_delta(payload, effective_width(target.nbytes, self.width), self._bound(target), target)
        return _deliver(target, out)

    def _bound(self, data: Bytes) -> Bytes:
        if self._base is None or self._base.nbytes != data.nbytes:
            raise ValueError("bind() a base block of the same size first")
        return self._base


def _sized(data: Bytes, parts: list[Buffer]) -> bytes:
    return b"".join([data.nbytes.to_bytes(8, "little"), *parts])


def _split_sized(buf: Any) -> tuple[memoryview, Bytes]:
    view = memoryview(ensure_contiguous_ndarray(buf).reshape(-1).view(np.uint8))
    size = int.from_bytes(view[:8], "little")
    if size > 1 << 32:
        raise ValueError(f"{size} bytes is more than a block can have")
    return view[8:], np.empty(size, np.uint8)


def _deliver(target: Bytes, out: Any) -> Any:
    if out is None:
        return target
    np.copyto(ensure_contiguous_ndarray(out).reshape(-1).view(np.uint8), target)
    return out


register_codec(Planes)
register_codec(OrderedDelta)
