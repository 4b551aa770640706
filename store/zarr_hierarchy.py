"""A commit as the keys and values of a zarr v3 hierarchy. Nothing here imports zarr.

::

    zarr.json                    the root group, with the metadata of all arrays (consolidated)
    <node>/zarr.json             one array for each tensor
    <node>/c/1/0                 one key for each chunk; ``<node>/c`` for a scalar

A chunk is a block, filled up with zeros where it is cut short at the tensor's edge: a zarr chunk always has its
full shape, a block holds the tensor's bytes alone.

A node's name is the tensor's full name, dots kept. What zarr or a file system would read otherwise is
percent-encoded, so that every name comes back as it was (:func:`node_name`).

Types narrower than a byte are arrays of bytes, ``uint8`` in one dimension, packed as in safetensors; the
attribute ``mergepipe.shape`` tells the tensor's own. Where their blocks are not all alike, they are one chunk.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from mergepipe.store.chunking import grid_shape

if TYPE_CHECKING:
    from mergepipe.store.manifest import TensorEntry
    from mergepipe.store.snapshot import Snapshot

METADATA_KEY: Final = "zarr.json"
NAMESPACE: Final = "mergepipe"
MAXIMUM_CONFIG_BYTES: Final = 64 << 10
_UNSAFE = re.compile(r"[%/\\\x00-\x1f\x7f]|\A\.|\A_(?=_)")
_COORDINATE = re.compile(r"0|[1-9][0-9]{0,18}")
_EMPTY_NAME: Final = "%"


def node_name(tensor: str) -> str:
    """The name of a tensor's array.

    Percent-encoded are ``%``, ``/``, ``\\``, control characters, a first ``.``, the first of two leading ``_``
    and the dot of ``zarr.json``; the empty name is ``%``.

    >>> node_name("model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> node_name("../a"), node_name("__x"), node_name("zarr.json"), node_name("")
    ('%2E.%2Fa', '%5F_x', 'zarr%2Ejson', '%')
    """
    if not tensor:
        return _EMPTY_NAME
    if tensor == METADATA_KEY:
        return "zarr%2Ejson"
    return _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", tensor)


def tensor_name(node: str) -> str:
    """Inverse of :func:`node_name`.

    >>> tensor_name("%2E.%2Fa")
    '../a'
    """
    return "" if node == _EMPTY_NAME else unquote(node, errors="strict")


@dataclass(frozen=True)
class ArrayView:
    """A tensor as a zarr array: its metadata, and which blocks make up which chunk."""

    name: str
    entry: TensorEntry

    @property
    def is_packed(self) -> bool:
        """Whether elements are narrower than a byte, so that the array shows bytes."""
        return self.entry.element_type.zarr_name is None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.entry.nbytes,) if self.is_packed else self.entry.shape

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        if not self.is_packed:
            return self.entry.chunks
        sizes = [self.entry.block_span(index)[1] for index in range(len(self.entry.blocks))]
        if sizes and all(size == sizes[0] for size in sizes[:-1]) and 0 < sizes[-1] <= sizes[0]:
            return (sizes[0],)
        return (max(self.entry.nbytes, 1),)

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return grid_shape(self.shape, self.chunks)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of each chunk, those at the edge too."""
        return math.prod(self.chunks) * (1 if self.is_packed else self.entry.element_type.bits // 8)

    def chunk_index(self, coordinates: list[str]) -> int | None:
        """A chunk's place in C order over the grid, from the parts of its key; None where there is none."""
        if len(coordinates) != len(self.grid):
            return None
        index = 0
        for text, extent in zip(coordinates, self.grid, strict=True):
            if not _COORDINATE.fullmatch(text) or int(text) >= extent:
                return None
            index = index * extent + int(text)
        return index

    def chunk_keys(self) -> Iterator[str]:
        """The keys of all chunks below the array's, in C order."""
        for coordinates in itertools.product(*map(range, self.grid)):
            yield "/".join(("c", *map(str, coordinates)))

    def metadata(self) -> dict[str, Any]:
        """The array's ``zarr.json``."""
        element = self.entry.element_type
        about: dict[str, Any] = {"name": self.name, "dtype": element.name}
        if self.is_packed:
            about["shape"] = list(self.entry.shape)
        wide = not self.is_packed and element.bits > 8
        codec = {"name": "bytes", **({"configuration": {"endian": "little"}} if wide else {})}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": element.zarr_name or "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _fill_value(element.name),
            "codecs": [codec],
            "attributes": {NAMESPACE: about},
        }


def _fill_value(dtype: str) -> Any:
    """Zero bits. No chunk is ever left out, so nobody sees it, but zarr asks for one."""
    special = {"BOOL": False, "C64": [0.0, 0.0], "F8_E8M0": "0x00"}
    return special.get(dtype, 0)


class Hierarchy:
    """The keys and values of one commit. Safe to share between threads.

    ``read`` raises DamagedError where a block is missing or is not what its id says.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.arrays: Mapping[str, ArrayView] = {
            node_name(name): ArrayView(name, entry) for name, entry in snapshot.tensors.items()
        }

    def keys(self, prefix: str = "") -> Iterator[str]:
        """All keys that begin with ``prefix``."""
        if METADATA_KEY.startswith(prefix):
            yield METADATA_KEY
        for node, array in self.arrays.items():
            folder = f"{node}/"
            if not folder.startswith(prefix) and not prefix.startswith(folder):
                continue
            for rest in itertools.chain((METADATA_KEY,), array.chunk_keys()):
                if (key := folder + rest).startswith(prefix):
                    yield key

    def size(self, key: str) -> int | None:
        """Bytes of a key's value, found without reading blocks; None where there is no such key."""
        if (chunk := self._find_chunk(key)) is not None:
            return chunk[0].chunk_bytes
        document = self._document(key)
        return None if document is None else len(document)

    def read(self, key: str) -> memoryview | bytes | None:
        """A key's value; None where there is no such key."""
        if (chunk := self._find_chunk(key)) is not None:
            return self._read_chunk(*chunk)
        return self._document(key)

    def _find_chunk(self, key: str) -> tuple[ArrayView, int] | None:
        node, *rest = key.split("/")
        array = self.arrays.get(node)
        if array is None or rest[:1] != ["c"]:
            return None
        index = array.chunk_index(rest[1:])
        return None if index is None else (array, index)

    def _read_chunk(self, array: ArrayView, index: int) -> memoryview:
        import numpy as np

        blocks = array.entry.blocks
        # One block is one chunk, but for packed types whose blocks differ: there, all are one chunk.
        wanted = [index] if len(blocks) == math.prod(array.grid) else range(len(blocks))
        out = np.zeros(array.chunk_bytes, np.uint8)
        filled = 0
        for block in wanted:
            _, size = array.entry.block_span(block)
            self.snapshot.reader.read_block(blocks[block], out[filled : filled + size])
            filled += size
        return out.data

    def _document(self, key: str) -> bytes | None:
        """A ``zarr.json``."""
        if key == METADATA_KEY:
            return self._root
        node, _, rest = key.partition("/")
        array = self.arrays.get(node)
        return _dump(array.metadata()) if array is not None and rest == METADATA_KEY else None

    @cached_property
    def _root(self) -> bytes:
        metadata = {node: array.metadata() for node, array in self.arrays.items()}
        return _dump(
            {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": {NAMESPACE: {"commit": self.snapshot.commit_id.hex(), **self._config()}},
                "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata},
            }
        )

    def _config(self) -> dict[str, Any]:
        """The checkpoint's ``config.json``, where it is small and is strict JSON."""
        file = self.snapshot.files.get("config.json")
        if file is None or file.size > MAXIMUM_CONFIG_BYTES:
            return {}
        config = self.snapshot.config()
        try:
            _dump(config)
        except ValueError:  # NaN and the like, which Python's parser lets through
            return {}
        return {"config": config} if config else {}


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
