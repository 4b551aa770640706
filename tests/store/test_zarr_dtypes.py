"""bfloat16 and the 8-bit floats in zarr: names, fill values, both byte orders."""

from __future__ import annotations

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec
from zarr.dtype import DataTypeValidationError, data_type_registry
from zarr.storage import MemoryStore

from mergepipe.store.dtypes import DTYPES
from mergepipe.store.zarr_dtypes import ML_FLOATS, BFloat16, Float8E4M3FN, Float8E5M2, Float8E8M0FNU, MLFloat


def every_value(kind: type[MLFloat]) -> np.ndarray[Any, Any]:
    """All bit patterns of a type."""
    size = np.dtype(kind.scalar_cls).itemsize
    return np.arange(1 << 8 * size, dtype=f"u{size}").view(kind.scalar_cls)


def bits(array: Any) -> np.ndarray[Any, Any]:
    """An array of NumPy or zarr as its bits."""
    whole = np.asarray(array[:])
    return whole.view(f"u{whole.dtype.itemsize}")


@pytest.mark.parametrize("kind", ML_FLOATS)
class TestEveryType:
    def test_the_name_is_known_both_ways(self, kind: type[MLFloat]) -> None:
        native = np.dtype(kind.scalar_cls)
        assert type(data_type_registry.match_dtype(native)) is kind
        assert type(data_type_registry.match_json(native.name, zarr_format=3)) is kind
        assert kind().to_json(zarr_format=3) == native.name
        assert native.name in {dtype.zarr_name for dtype in DTYPES.values()}

    @pytest.mark.filterwarnings("ignore:invalid value")  # comparing signalling NaNs
    def test_arrays_hold_every_bit_pattern(self, kind: type[MLFloat]) -> None:
        values = every_value(kind)
        store = MemoryStore()
        zarr.create_array(store, data=values, chunks=(100,))
        opened = zarr.open_array(store, mode="r")
        assert opened.dtype == kind.scalar_cls
        np.testing.assert_array_equal(bits(opened), bits(values))

    def test_fill_values_come_back_bit_for_bit(self, kind: type[MLFloat]) -> None:
        for value in every_value(kind)[:: 1 if kind().item_size == 1 else 97]:
            written = json.loads(json.dumps(kind().to_json_scalar(value, zarr_format=3)))
            assert kind().from_json_scalar(written, zarr_format=3).tobytes() == value.tobytes()

    def test_a_missing_chunk_is_the_fill_value(self, kind: type[MLFloat]) -> None:
        array = zarr.create_array(MemoryStore(), shape=(3,), dtype=kind(), fill_value=2.0)
        np.testing.assert_array_equal(np.asarray(array[:]).astype(float), [2.0, 2.0, 2.0])
        zeros = zarr.create_array(MemoryStore(), shape=(3,), dtype=kind())
        assert not bits(zeros).any()

    def test_zarr_v2_is_refused(self, kind: type[MLFloat]) -> None:
        with pytest.raises(ValueError, match="zarr v2 has no"):
            zarr.create_array(MemoryStore(), shape=(3,), dtype=kind(), zarr_format=2)

    @pytest.mark.parametrize("text", ["0x", "0x1", "0x00000", "0xgg", "nan", "", None, [1]])
    def test_what_is_no_fill_value_is_refused(self, kind: type[MLFloat], text: Any) -> None:
        with pytest.raises(TypeError, match="no fill value"):
            kind().from_json_scalar(text, zarr_format=3)


@pytest.mark.parametrize("kind", ML_FLOATS)
def test_what_is_no_value_of_a_type(kind: type[MLFloat]) -> None:
    name = np.dtype(kind.scalar_cls).name
    with pytest.raises(DataTypeValidationError, match=f"zarr v2 has no {name}"):
        kind.from_json({"name": name, "object_codec_id": None}, zarr_format=2)
    assert kind()._check_scalar(1)
    assert not kind()._check_scalar("1")
    with pytest.raises(TypeError, match=f"no number that {name} could hold"):
        kind().cast_scalar("1")


@pytest.mark.parametrize(
    ("kind", "nan"), [(BFloat16, "0x7fc0"), (Float8E4M3FN, "0x7f"), (Float8E5M2, "0x7e"), (Float8E8M0FNU, "0xFF")]
)
def test_nan_has_the_bits_that_the_registry_gives(kind: type[MLFloat], nan: str) -> None:
    assert kind().to_json_scalar(kind().from_json_scalar(nan, zarr_format=3), zarr_format=3) == "NaN"
    assert kind().from_json_scalar("NaN", zarr_format=3).tobytes() == int(nan, 16).to_bytes(kind().item_size, "little")


def test_infinity_is_a_fill_value_only_where_there_is_one() -> None:
    assert BFloat16().from_json_scalar("-Infinity", zarr_format=3) == -math.inf
    assert Float8E5M2().to_json_scalar(math.inf, zarr_format=3) == "Infinity"
    with pytest.raises(ValueError, match="float8_e4m3fn has no value for inf"):
        Float8E4M3FN().from_json_scalar("Infinity", zarr_format=3)
    with pytest.raises(ValueError, match="float8_e8m0fnu has no value for 0"):
        Float8E8M0FNU().cast_scalar(0)


def test_big_endian_bfloat16_is_read_and_written() -> None:
    values = np.array([1.0, -2.5, 3e38], ml_dtypes.bfloat16)
    store = MemoryStore()
    array = zarr.create_array(
        store, shape=(3,), chunks=(3,), dtype=values.dtype, serializer=BytesCodec(endian="big"), compressors=None
    )
    array[:] = values
    assert store._store_dict["c/0"].to_bytes() == values.view("u2").astype(">u2").tobytes()
    np.testing.assert_array_equal(bits(array), bits(values))
    assert BFloat16.from_native_dtype(values.dtype.newbyteorder(">")).endianness == "big"
