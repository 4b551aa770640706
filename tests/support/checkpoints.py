"""Checkpoints for tests, written by hand: the layout of every byte is the test's choice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.dtypes import DTYPES

_OF_NUMPY = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64",
}  # fmt: skip


@dataclass(frozen=True)
class RawTensor:
    """A tensor as safetensors has it: dtype name, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class HeaderStyle:
    """How a safetensors header is written; every style says the same.

    ``header_order`` and ``data_order`` are permutations of the tensors; ``padding`` is what follows the JSON.
    """

    metadata: Mapping[str, str] | None = None
    header_order: Sequence[str] | None = None
    data_order: Sequence[str] | None = None
    metadata_last: bool = False
    field_order: Sequence[str] = ("dtype", "shape", "data_offsets")
    padding: str = ""
    indent: int | None = None
    ascii_only: bool = False


PLAIN = HeaderStyle()


def raw(array: NDArray[Any]) -> RawTensor:
    """A NumPy array as a tensor of the same type."""
    return RawTensor(_OF_NUMPY[array.dtype.name], array.shape, np.ascontiguousarray(array).tobytes())


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * DTYPES[dtype].bits // 8


def random_tensor(dtype: str, shape: Sequence[int], seed: int = 0) -> RawTensor:
    """Random bits: NaN payloads, -0, subnormals and infinities are all among them."""
    high = 2 if dtype == "BOOL" else 256
    data = np.random.default_rng(seed).integers(0, high, byte_count(dtype, shape), np.uint8)
    return RawTensor(dtype, tuple(shape), data.tobytes())


def safetensors_bytes(tensors: Mapping[str, RawTensor], style: HeaderStyle = PLAIN) -> bytes:
    """A whole file. The data follows ``style.data_order``, whatever the order in the header is."""
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    data_order = style.data_order or list(tensors)
    for name in data_order:
        end = position + len(tensors[name].data)
        offsets[name] = (position, end)
        position = end
    entries: dict[str, Any] = {}
    for name in style.header_order or list(tensors):
        fields = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": list(offsets[name]),
        }
        entries[name] = {field: fields[field] for field in style.field_order}
    metadata = {} if style.metadata is None else {"__metadata__": dict(style.metadata)}
    header = {**entries, **metadata} if style.metadata_last else {**metadata, **entries}
    separators = (",", ":") if style.indent is None else None
    text = json.dumps(header, separators=separators, indent=style.indent, ensure_ascii=style.ascii_only) + style.padding
    head = text.encode("utf-8")
    return len(head).to_bytes(8, "little") + head + b"".join(tensors[name].data for name in data_order)


def file_with_header(header: Any, data: bytes = b"") -> bytes:
    """A file whose header is any JSON value, text or bytes, however wrong."""
    head = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(head).to_bytes(8, "little") + head + data


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor], style: HeaderStyle = PLAIN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(tensors, style))
    return path


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, RawTensor],
    *,
    shards: int = 1,
    index: bool = True,
    files: Mapping[str, bytes] | None = None,
    style: HeaderStyle | None = None,
) -> Path:
    """A Hugging Face folder; tensors go round robin into ``shards`` files. ``style`` is for one shard only."""
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, style or HeaderStyle(metadata={"format": "pt"}))
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            path = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            held = {name: tensors[name] for name in names[number::shards]}
            weight_map.update(dict.fromkeys(held, path))
            write_safetensors(folder / path, held, HeaderStyle(metadata={"format": "pt"}))
        if index:
            total = sum(len(tensor.data) for tensor in tensors.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            (folder / "model.safetensors.index.json").write_text(text)
    for path, content in (files if files is not None else {"config.json": b'{"model_type": "toy"}\n'}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
