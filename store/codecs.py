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
import zstandard
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray
from numcodecs.registry import register_codec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from mergepipe.store import kernels
from mergepipe.store.digest import Buffer

Bytes: TypeAlias = NDArray[np.uint8]
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}
_SIGNED: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("<i1"),
    2: np.dtype("<i2"),
    4: np.dtype("<i4"),
    8: np.dtype("<i8"),
}
DELTA_WIDTHS: Final = (1, 2, 4)
_RAW, _ZSTD = 0, 1
_SAMPLE_BYTES: Final = 32 << 10
_WORTH_IT: Final = 0.97  # a stream must shrink below this share to be worth its decoding
_zstd = Zstd(level=1)  # decodes; any zstd library can


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


class _Compressors(threading.local):
    """One zstd compressor for each thread: they keep state between calls."""

    def __init__(self) -> None:
        # Weights have no repeats to find, only skewed bytes. The smallest hash table and the longest minimum match make
        # the search nearly free and leave the bytes to the entropy coder: twice the speed and less output than level 1.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1,
            window_log=22,
            hash_log=6,
            min_match=7,
            strategy=zstandard.STRATEGY_FAST,
            write_content_size=True,
        )
        self.entropy = zstandard.ZstdCompressor(compression_params=parameters)
        self.text = zstandard.ZstdCompressor(level=3, write_content_size=True)


_compressors = _Compressors()


def effective_width(size: int, width: int) -> int:
    """The plane count that a block of ``size`` bytes is split into: 1 where the width does not divide it."""
    return width if width in _UNSIGNED and size % width == 0 else 1


def encode_planes(data: Bytes, width: int, *, text: bool = False) -> list[Buffer]:
    """Split into byte planes and compress each that shrinks; returns the payload's parts.

    ``text``: the bytes are a file's, with repeats worth finding, not a tensor's.
    """
    if width == 1:
        return _pack([data], text=text)
    planes = _plane_scratch(width, data.nbytes // width)
    _split(data, width, planes)
    return _pack(planes)


def decode_planes(payload: memoryview, width: int, out: Bytes) -> None:
    """Inverse of :func:`encode_planes` into ``out``; raises ValueError or RuntimeError on a bad payload."""
    if width == 1:
        _unpack(payload, [out])
        return
    planes = _plane_scratch(width, out.nbytes // width)
    _unpack(payload, planes)
    _join(planes, width, out)


def encode_delta(data: Bytes, base: Bytes, width: int) -> list[Buffer]:
    """Encode as the ordered difference to ``base`` (same size, width 1, 2 or 4); returns the payload's parts."""
    planes = _plane_scratch(width, data.nbytes // width)
    signed = _SIGNED[width]
    if width == 2:
        kernels.difference2(data.view(signed), base.view(signed), *planes)
    elif width == 4:
        folded = scratch.bytes("folded", data.nbytes)
        kernels.difference4(data.view(signed), base.view(signed), folded.view(_UNSIGNED[4]))
        _split(folded, 4, planes)
    else:
        kernels.difference1(data.view(signed), base.view(signed), *planes)
    return _pack(planes)


def decode_delta(payload: memoryview, width: int, base: Bytes, out: Bytes) -> None:
    """Inverse of :func:`encode_delta` into ``out``; raises ValueError or RuntimeError on a bad payload."""
    if base.nbytes != out.nbytes or width not in DELTA_WIDTHS or out.nbytes % width:
        raise ValueError(f"a delta of {out.nbytes} bytes and width {width} to a base of {base.nbytes} bytes")
    planes = _plane_scratch(width, out.nbytes // width)
    _unpack(payload, planes)
    signed = _SIGNED[width]
    if width == 2:
        kernels.sum2(*planes, base.view(signed), out.view(signed))
    elif width == 4:
        folded = scratch.bytes("folded", out.nbytes)
        _join(planes, 4, folded)
        kernels.sum4(folded.view(_UNSIGNED[4]), base.view(signed), out.view(signed))
    else:
        kernels.sum1(*planes, base.view(signed), out.view(signed))


def payload_size(parts: list[Buffer]) -> int:
    """Bytes of a payload given as parts."""
    return sum(memoryview(part).nbytes for part in parts)


def _plane_scratch(width: int, elements: int) -> list[Bytes]:
    return [scratch.bytes(f"plane{index}", elements) for index in range(width)]


def _split(data: Bytes, width: int, planes: list[Bytes]) -> None:
    if width == 2:
        kernels.split2(data.view(_UNSIGNED[2]), *planes)
    elif width == 4:
        kernels.split4(data.view(_UNSIGNED[4]), *planes)
    else:
        for index, plane in enumerate(planes):
            plane[:] = data[index::width]


def _join(planes: list[Bytes], width: int, out: Bytes) -> None:
    if width == 2:
        kernels.join2(*planes, out.view(_UNSIGNED[2]))
    elif width == 4:
        kernels.join4(*planes, out.view(_UNSIGNED[4]))
    else:
        for index, plane in enumerate(planes):
            out[index::width] = plane


def _pack(planes: list[Bytes], *, text: bool = False) -> list[Buffer]:
    compressor = _compressors.text if text else _compressors.entropy
    table = bytearray()
    streams: list[Buffer] = []
    for plane in planes:
        stream = _compress(plane, compressor)
        method = _RAW if stream is None else _ZSTD
        # A raw stream is copied: its scratch is reused before the payload reaches the disk.
        kept: bytes = plane.tobytes() if stream is None else stream
        table += (method << 56 | len(kept)).to_bytes(8, "little")
        streams.append(kept)
    return [bytes(table), *streams]


def _compress(plane: Bytes, compressor: zstandard.ZstdCompressor) -> bytes | None:
    """One zstd frame, or None where it would not shrink; a sample decides for planes that are mostly noise."""
    if plane.nbytes >= 4 * _SAMPLE_BYTES:
        middle = plane.nbytes // 2
        sample = plane[middle : middle + _SAMPLE_BYTES]
        if len(compressor.compress(sample.data)) > _WORTH_IT * sample.nbytes:
            return None
    stream = compressor.compress(plane.data)
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
