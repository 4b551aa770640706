"""Element types: the whole of safetensors, and how each maps to torch and zarr."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store.dtypes import DTYPES, FROM_TORCH
from support.strategies import dtypes

# The types of the safetensors format (its `Dtype`), with their bits.
SAFETENSORS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def test_they_are_those_of_the_format() -> None:
    assert {name: dtype.bits for name, dtype in DTYPES.items()} == SAFETENSORS
    assert all(name == dtype.name for name, dtype in DTYPES.items())


@pytest.mark.parametrize("name", sorted(FROM_TORCH))
def test_torch_has_them_as_wide(name: str) -> None:
    assert getattr(torch, name).itemsize * 8 == FROM_TORCH[name].bits


def test_types_narrower_than_a_byte_are_no_types_of_torch_or_zarr() -> None:
    for dtype in DTYPES.values():
        assert (dtype.torch_name is None) == (dtype.zarr_name is None) == (dtype.bits < 8)


@given(dtypes, st.integers(0, 1 << 50))
def test_bytes_of_elements(name: str, groups: int) -> None:
    assert DTYPES[name].nbytes(8 * groups) == groups * DTYPES[name].bits


@pytest.mark.parametrize(
    ("name", "planes"),
    [("BF16", 2), ("F32", 4), ("F64", 8), ("C64", 4), ("I64", 8), ("U16", 2), ("F8_E4M3", 1), ("F4", 1), ("BOOL", 1)],
)
def test_planes_follow_the_bytes_of_a_number(name: str, planes: int) -> None:
    assert DTYPES[name].plane_bytes == planes


def test_statistics_are_for_the_floats_that_people_fine_tune() -> None:
    assert {name for name, dtype in DTYPES.items() if dtype.has_statistics} == {"BF16", "F16", "F32", "F64"}
