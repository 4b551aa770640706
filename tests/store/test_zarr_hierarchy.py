"""A commit as keys and values: names, and which bytes make up which chunk. No store and no zarr needed."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store import zarr_hierarchy
from mergepipe.store.chunking import block_count
from mergepipe.store.digest import Digest
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.zarr_hierarchy import ArrayView, node_name, tensor_name

ODD_NAMES = ["", ".", "..", "...", ".x", "__x", "_x", "a/b", "/", "a\\b", "%", "%2F", "zarr.json", "a\nb", "ä.ß"]


def view(dtype: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> ArrayView:
    blocks = tuple(Digest(bytes([index]) * 32) for index in range(block_count(shape, chunks)))
    return ArrayView("t", TensorEntry(dtype, shape, chunks, blocks))


def test_the_examples() -> None:
    assert doctest.testmod(zarr_hierarchy).failed == 0


@given(st.text() | st.sampled_from(ODD_NAMES))
def test_every_name_comes_back(name: str) -> None:
    node = node_name(name)
    assert tensor_name(node) == name
    assert node not in ("", "zarr.json")
    assert not node.startswith((".", "__"))
    assert not set(node) & set("/\\\n\x00")


@given(st.lists(st.text(alphabet="ab./%_", max_size=4) | st.sampled_from(ODD_NAMES), unique=True))
def test_two_names_never_meet(names: list[str]) -> None:
    assert len({node_name(name) for name in names}) == len(names)


def test_usual_names_stay_as_they_are() -> None:
    name = "model.layers.10.mlp.experts.3.up_proj.weight_scale_inv"
    assert node_name(name) == name


@pytest.mark.parametrize(
    ("array", "keys"),
    [
        (view("F32", (), ()), ["c"]),
        (view("F32", (0, 4), (1, 4)), []),
        (view("F32", (5,), (2,)), ["c/0", "c/1", "c/2"]),
        (view("BF16", (2, 3, 4), (1, 2, 4)), ["c/0/0/0", "c/0/1/0", "c/1/0/0", "c/1/1/0"]),
    ],
)
def test_chunk_keys_name_their_places(array: ArrayView, keys: list[str]) -> None:
    assert list(array.chunk_keys()) == keys
    assert [array.chunk_index(key.split("/")[1:]) for key in keys] == list(range(len(keys)))


@pytest.mark.parametrize("key", ["", "3", "-1", "+1", "01", "1.0", "1/0", "¹", "9" * 30, "9" * 5000, "0/", " 0"])
def test_what_is_no_place_in_the_grid_is_none(key: str) -> None:
    assert view("F32", (5,), (2,)).chunk_index(key.split("/")) is None


def test_packed_types_are_bytes() -> None:
    even = view("F4", (10, 8), (4, 8))
    assert (even.shape, even.chunks, even.grid, even.chunk_bytes) == ((40,), (16,), (3,), 16)
    ragged = view("F4", (2, 5, 8), (1, 4, 8))  # blocks of 16, 4, 16 and 4 bytes fit no regular grid
    assert (ragged.shape, ragged.chunks, ragged.grid) == ((40,), (40,), (1,))
    whole = view("F6_E2M3", (2, 4, 8), (1, 2, 8))
    assert (whole.shape, whole.chunks, whole.grid) == ((48,), (12,), (4,))
    empty = view("F4", (0, 8), (1, 8))
    assert (empty.shape, empty.chunks, empty.grid) == ((0,), (1,), (0,))
    assert even.metadata()["attributes"]["mergepipe"] == {"name": "t", "dtype": "F4", "shape": [10, 8]}
    assert even.metadata()["data_type"] == "uint8"


def test_the_byte_order_is_named_where_there_is_one() -> None:
    assert view("BF16", (4,), (4,)).metadata()["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
    assert view("F8_E5M2", (4,), (4,)).metadata()["codecs"] == [{"name": "bytes"}]


def test_zarr_is_imported_only_for_the_view() -> None:
    program = "import sys, mergepipe.store, mergepipe.store.zarr_hierarchy; print('zarr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
