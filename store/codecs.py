"""The two block encodings: byte planes, and the ordered difference to a base block.

Both are lossless for every bit pattern. An encoded payload is a table of ``width`` little-endian u64 entries,
one for each byte plane from the least significant, followed by the planes' streams. An entry's top byte is the
method (0 kept as it is, 1 one zstd frame), the other 56 bits are the stream's length.

The ordered difference maps sign-magnitude floats to integers that keep their order
(``x ^ ((x >> (bits-1)) & max)``), subtracts with wrap-around, and folds the sign into the lowest bit (zigzag), so
that a small change of a weight is a small number whatever its exponent.

Encoding runs compiled kernels. Loading them takes a quarter of a second, so a process that only decodes does without
(:mod:`mergepipe.store.plain_decoding`), unless they are loaded already, or there is much to do (:func:`expect`).

Both also work as numcodecs codecs (:mod:`mergepipe.store.numcodecs_codecs`).
"""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from typing import Any, Final, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from mergepipe.store import plain_decoding
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
_KERNELS: Final = "mergepipe.store.kernels"
# From how many bytes on the kernels are worth their loading: joining planes is nearly as fast without them, adding
# differences is several times slower.
_WORTH_LOADING_BYTES: Final = {False: 15 * 10**8, True: 2 * 10**8}


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
    """zstd for each thread: compressors and decompressors keep state between calls."""

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
        self.decompressor = zstandard.ZstdDecompressor()


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
    from mergepipe.store import kernels

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
    target, old = out.view(signed), base.view(signed)
    kernels = _loaded_kernels()
    if kernels is None:
        plain_decoding.add_difference(planes, old, target)
    elif width == 2:
        kernels.sum2(*planes, old, target)
    elif width == 4:
        folded = scratch.bytes("folded", out.nbytes)
        kernels.join4(*planes, folded.view(_UNSIGNED[4]))
        kernels.sum4(folded.view(_UNSIGNED[4]), old, target)
    else:
        kernels.sum1(*planes, old, target)


def expect(raw_bytes: int, *, differences: bool) -> None:
    """Load the compiled kernels where that much decoding is to come, of ``differences`` or of planes alone."""
    if raw_bytes > _WORTH_LOADING_BYTES[differences]:
        import_module(_KERNELS)


def _loaded_kernels() -> Any:
    """The kernels' module where it is loaded, and loaded to its end: another thread may be at it."""
    module = sys.modules.get(_KERNELS)
    return module if getattr(module, "READY", False) else None


def payload_size(parts: list[Buffer]) -> int:
    """Bytes of a payload given as parts."""
    return sum(memoryview(part).nbytes for part in parts)


def _plane_scratch(width: int, elements: int) -> list[Bytes]:
    return [scratch.bytes(f"plane{index}", elements) for index in range(width)]


def _split(data: Bytes, width: int, planes: list[Bytes]) -> None:
    from mergepipe.store import kernels

    if width == 2:
        kernels.split2(data.view(_UNSIGNED[2]), *planes)
    elif width == 4:
        kernels.split4(data.view(_UNSIGNED[4]), *planes)
    else:
        for index, plane in enumerate(planes):
            plane[:] = data[index::width]


def _join(planes: list[Bytes], width: int, out: Bytes) -> None:
    kernels = _loaded_kernels()
    if width == 8:
        for index, plane in enumerate(planes):
            out[index::width] = plane
    elif kernels is None:
        plain_decoding.join(planes, out.view(_UNSIGNED[width]))
    elif width == 2:
        kernels.join2(*planes, out.view(_UNSIGNED[2]))
    else:
        kernels.join4(*planes, out.view(_UNSIGNED[4]))


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
            _decompress(stream, plane)
        else:
            raise ValueError("a plane's stream does not have the plane's size")
    if position != payload.nbytes:
        raise ValueError("the payload goes on after its last plane")


def _decompress(stream: memoryview, plane: Bytes) -> None:
    """Fill a plane from one zstd frame of its size; raises ValueError."""
    view, done = plane.data, 0
    try:
        with _compressors.decompressor.stream_reader(stream, read_across_frames=True) as reader:
            while done < view.nbytes:
                count = reader.readinto(view[done:])
                if not count:
                    raise ValueError("a plane's stream ends early")
                done += count
            if reader.read(1):
                raise ValueError("a plane's stream goes on after its frame")
    except zstandard.ZstdError as error:
        raise ValueError(f"a plane's stream is no zstd frame: {error}") from error


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
