"""Element types: what safetensors calls them, how wide they are, and how their blocks are encoded.

Names are those of the safetensors format. The zarr names are those of the zarr extensions registry (and of ml_dtypes,
where the registry has none: ``float8_e4m3fn``). Types narrower than a byte are shown by the zarr view as packed bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    ``bits``: bits per element. ``ordered``: whether a map to order-preserving integers makes deltas small
    (sign-magnitude floats and integers of 8 to 32 bits). ``is_float``: whether delta statistics are defined.
    """

    name: str
    bits: int
    zarr_name: str | None
    is_float: bool = False
    is_integer: bool = False
    torch_name: str | None = None

    @property
    def plane_bytes(self) -> int:
        """Bytes per element for splitting into byte planes; 1 for packed and odd types."""
        return {16: 2, 32: 4, 64: 4 if self.name == "C64" else 8}.get(self.bits, 1)

    @property
    def has_statistics(self) -> bool:
        """Whether deltas of this type have norms: the floats that people fine-tune."""
        return self.name in ("BF16", "F16", "F32", "F64")

    def nbytes(self, elements: int) -> int:
        """Bytes that ``elements`` elements take, packed."""
        return elements * self.bits // 8


def _f(name: str, bits: int, zarr: str | None, torch: str | None) -> DType:
    return DType(name, bits, zarr, is_float=True, torch_name=torch)


def _i(name: str, bits: int, zarr: str) -> DType:
    return DType(name, bits, zarr, is_integer=True, torch_name=zarr)


_ALL: Final = (
    DType("BOOL", 8, "bool", torch_name="bool"),
    _i("U8", 8, "uint8"), _i("I8", 8, "int8"),
    _i("U16", 16, "uint16"), _i("I16", 16, "int16"),
    _i("U32", 32, "uint32"), _i("I32", 32, "int32"),
    _i("U64", 64, "uint64"), _i("I64", 64, "int64"),
    _f("F16", 16, "float16", "float16"),
    _f("BF16", 16, "bfloat16", "bfloat16"),
    _f("F32", 32, "float32", "float32"),
    _f("F64", 64, "float64", "float64"),
    DType("C64", 64, "complex64", torch_name="complex64"),
    _f("F8_E4M3", 8, "float8_e4m3fn", "float8_e4m3fn"),
    _f("F8_E5M2", 8, "float8_e5m2", "float8_e5m2"),
    _f("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "float8_e4m3fnuz"),
    _f("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "float8_e5m2fnuz"),
    _f("F8_E8M0", 8, "float8_e8m0fnu", "float8_e8m0fnu"),
    _f("F4", 4, None, None),
    _f("F6_E2M3", 6, None, None),
    _f("F6_E3M2", 6, None, None),
)  # fmt: skip

DTYPES: Final = {dtype.name: dtype for dtype in _ALL}
FROM_TORCH: Final = {dtype.torch_name: dtype for dtype in _ALL if dtype.torch_name}
