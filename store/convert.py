"""Converting floating-point blocks between element types, rounding to nearest even."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.dtypes import DTYPES, DType
from mergepipe.store.errors import UsageError, nearest
from mergepipe.store.statistics import to_float32

_ALIASES: Final = {
    "float32": "F32", "float": "F32", "fp32": "F32",
    "bfloat16": "BF16", "bf16": "BF16",
    "float16": "F16", "half": "F16", "fp16": "F16",
    "float64": "F64", "double": "F64",
}  # fmt: skip


def check_conversion(name: str) -> DType:
    """The floating-point type of that name (``F32``, ``bfloat16``, …); raises UsageError."""
    found = DTYPES.get(_ALIASES.get(name.lower(), name.upper()))
    if found is None or not found.has_statistics:
        known = [dtype.name for dtype in DTYPES.values() if dtype.has_statistics]
        raise UsageError(
            f"{name!r} is not a type to convert to",
            hint=nearest(name, _ALIASES) or f"Known: {', '.join(known)}.",
        )
    return found


def convert_block(data: Bytes, source: DType, target: DType) -> Bytes:
    """The block's elements in another type; in this thread's scratch, so use it before the next call."""
    elements = data.nbytes * 8 // source.bits
    out = scratch.bytes("converted", target.nbytes(elements))
    with np.errstate(over="ignore", invalid="ignore"):  # beyond the type's range is infinity; NaNs are data
        if source.name == "F64" or target.name == "F64":
            _convert_wide(data, source, target, out)
            return out
        floats = scratch.bytes("floats", elements * 4).view(np.float32)
        to_float32(data, source, 0, elements, floats)
        from_float32(floats, target, out)
    return out


def from_float32(values: NDArray[np.float32], target: DType, out: Bytes) -> None:
    """Round float32 values into the bytes of a narrower (or the same) type."""
    if target.name == "BF16":
        round_to_bfloat16(values, out.view("<u2"))
    else:
        kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[target.name]
        with np.errstate(over="ignore", invalid="ignore"):  # beyond the type's range is infinity, as everywhere
            np.copyto(out.view(kind), values, casting="same_kind")


def round_to_bfloat16(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round to nearest even; NaNs stay NaNs, with the upper bits of their payload."""
    bits = values.view(np.uint32)
    rounded = scratch.bytes("rounded", values.nbytes).view(np.uint32)
    np.right_shift(bits, 16, out=rounded)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(out, rounded, casting="unsafe")
    nans = np.isnan(values)
    if nans.any():
        out[nans] = (bits[nans] >> 16).astype(np.uint16) | 0x40


def _convert_wide(data: Bytes, source: DType, target: DType, out: Bytes) -> None:
    elements = data.nbytes * 8 // source.bits
    if source.name == "F64" and target.name != "BF16":
        kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[target.name]
        out.view(kind)[:] = data.view("<f8")
        return
    floats = np.empty(elements, np.float32)
    to_float32(data, source, 0, elements, floats)
    from_float32(floats, target, out)
