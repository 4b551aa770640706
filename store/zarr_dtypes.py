"""Zarr v3 data types for the floats of machine learning: ``bfloat16`` and the 8-bit ones.

zarr-python has none of them, so importing this module registers them, under the names of the zarr extensions
registry (https://github.com/zarr-developers/zarr-extensions). ``float8_e4m3fn`` is the exception: the
registry has ``float8_e4m3``, which has infinities and so gives other values to the same bits; ml_dtypes,
tensorstore and torch all say ``float8_e4m3fn``. A name that something else has registered is left alone.

Arrays have ml_dtypes' NumPy types. A fill value is a number, ``"NaN"``, ``"Infinity"``, ``"-Infinity"``, or
the bits in hexadecimal (``"0x7fc1"``), which is the one way to write a NaN other than the usual one.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, SupportsFloat, SupportsIndex, cast

import ml_dtypes
import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

if TYPE_CHECKING:
    from zarr.core.common import JSON, ZarrFormat
    from zarr.core.dtype.common import DTypeJSON

NativeType = np.dtype[np.generic]
_SPECIAL: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class MLFloat(ZDType[NativeType, np.generic], HasItemSize):
    """A float of ml_dtypes. A subclass gives ``scalar_cls``; its zarr name is that type's name."""

    scalar_cls: ClassVar[type[np.generic]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.dtype_cls = type(np.dtype(cls.scalar_cls))
        cls._zarr_v3_name = np.dtype(cls.scalar_cls).name

    @property
    def item_size(self) -> int:
        return np.dtype(self.scalar_cls).itemsize

    @classmethod
    def from_native_dtype(cls, dtype: NativeType) -> Self:
        if not cls._check_native_dtype(dtype):
            raise DataTypeValidationError(f"{dtype} is not {cls._zarr_v3_name}")
        return cls()

    def to_native_dtype(self) -> NativeType:
        return np.dtype(self.scalar_cls)

    @classmethod
    def _from_json_v2(cls, data: DTypeJSON) -> Self:
        raise DataTypeValidationError(f"zarr v2 has no {cls._zarr_v3_name}: {data!r}")

    @classmethod
    def _from_json_v3(cls, data: DTypeJSON) -> Self:
        if data not in (cls._zarr_v3_name, {"name": cls._zarr_v3_name}):
            raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name!r}")
        return cls()

    def to_json(self, zarr_format: ZarrFormat) -> str:  # type: ignore[override]  # v2 has no form for it
        if zarr_format != 3:
            raise ValueError(f"zarr v2 has no {self._zarr_v3_name}")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, SupportsFloat | SupportsIndex)

    def cast_scalar(self, data: object) -> np.generic:
        """``data`` rounded to this type.

        Raises:
            TypeError: not a number.
            ValueError: a number for which this type has no value, such as an infinity where it has none.
        """
        if isinstance(data, self.scalar_cls):
            return data  # untouched: a NaN's bits would not survive the way through a Python float
        if not isinstance(data, SupportsFloat | SupportsIndex):
            raise TypeError(f"{data!r} is no number that {self._zarr_v3_name} could hold")
        value = float(data)
        with np.errstate(over="ignore", invalid="ignore"):
            scalar: np.generic = np.float64(value).astype(self.scalar_cls)
        if math.isnan(_as_float(scalar)) and not math.isnan(value):
            raise ValueError(f"{self._zarr_v3_name} has no value for {value}")
        return scalar

    def default_scalar(self) -> np.generic:
        """The value whose bits are all zero: 0, but 2**-127 for ``float8_e8m0fnu``, which has no zero."""
        return self._from_bits(0)

    def from_json_scalar(self, data: JSON, *, zarr_format: ZarrFormat) -> np.generic:  # noqa: ARG002
        """A fill value from its JSON form; raises TypeError or ValueError."""
        if isinstance(data, int | float):
            return self.cast_scalar(data)
        if isinstance(data, str) and data in _SPECIAL:
            return self.cast_scalar(_SPECIAL[data])
        if isinstance(data, str) and re.fullmatch(rf"0x[0-9a-fA-F]{{{2 * self.item_size}}}", data):
            return self._from_bits(int(data, 16))
        raise TypeError(f"{data!r} is no fill value of {self._zarr_v3_name}")

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> float | str:  # noqa: ARG002
        """A fill value's JSON form, from which the same bits come back."""
        scalar = self.cast_scalar(data)
        value = _as_float(scalar)
        if math.isnan(value):
            bits, usual = self._bits(scalar), self._bits(self.cast_scalar(math.nan))
            return "NaN" if bits == usual else f"0x{bits:0{2 * self.item_size}x}"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value

    def _bits(self, scalar: np.generic) -> int:
        return int.from_bytes(scalar.tobytes(), sys.byteorder)

    def _from_bits(self, bits: int) -> np.generic:
        data = bits.to_bytes(self.item_size, sys.byteorder)
        scalar: np.generic = np.frombuffer(data, np.dtype(self.scalar_cls))[0]
        return scalar


def _as_float(scalar: np.generic) -> float:
    return float(cast(SupportsFloat, scalar))


@dataclass(frozen=True, kw_only=True)
class BFloat16(MLFloat, HasEndianness):
    """The upper half of a float32."""

    scalar_cls = ml_dtypes.bfloat16

    @classmethod
    def from_native_dtype(cls, dtype: NativeType) -> Self:
        super().from_native_dtype(dtype)
        little = dtype == dtype.newbyteorder("<")
        return cls(endianness="little" if little else "big")

    def to_native_dtype(self) -> NativeType:
        dtype: NativeType = np.dtype(self.scalar_cls).newbyteorder(self.endianness)
        return dtype


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(MLFloat):
    """4 exponent and 3 mantissa bits, no infinities; what safetensors calls ``F8_E4M3``."""

    scalar_cls = ml_dtypes.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Float8E5M2(MLFloat):
    """5 exponent and 2 mantissa bits, as in IEEE 754."""

    scalar_cls = ml_dtypes.float8_e5m2


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FNUZ(MLFloat):
    """4 exponent and 3 mantissa bits, no infinities, one zero."""

    scalar_cls = ml_dtypes.float8_e4m3fnuz


@dataclass(frozen=True, kw_only=True)
class Float8E5M2FNUZ(MLFloat):
    """5 exponent and 2 mantissa bits, no infinities, one zero."""

    scalar_cls = ml_dtypes.float8_e5m2fnuz


@dataclass(frozen=True, kw_only=True)
class Float8E8M0FNU(MLFloat):
    """A power of two, 2**-127 to 2**127: the scale of microscaling formats. Unsigned, without zero."""

    scalar_cls = ml_dtypes.float8_e8m0fnu


ML_FLOATS: Final[tuple[type[MLFloat], ...]] = (
    BFloat16,
    Float8E4M3FN,
    Float8E5M2,
    Float8E4M3FNUZ,
    Float8E5M2FNUZ,
    Float8E8M0FNU,
)

for _cls in ML_FLOATS:
    if _cls._zarr_v3_name not in data_type_registry.contents:
        data_type_registry.register(_cls._zarr_v3_name, _cls)
