"""The block encodings as numcodecs codecs, with a JSON config, so that they compose with that ecosystem.

numcodecs finds them by their entry points, or when this module is imported. Encoded bytes are the raw size (u64,
little-endian) and then the payload as in an object's file (:mod:`mergepipe.store.codecs`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray
from numcodecs.registry import register_codec

from mergepipe.store.codecs import Bytes, decode_delta, decode_planes, effective_width, encode_delta, encode_planes
from mergepipe.store.digest import Buffer


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
