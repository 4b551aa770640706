"""The manifest tree: nodes named by their hash, one for each module path down to the layer.

A node is canonical JSON with four maps, each left out where empty:

``nodes``   child name -> node id
``tensors`` rest of the tensor's name -> ``{"dtype", "shape", "chunks", "blocks"}``
``files``   path -> ``{"size", "blocks"}``                      (root only)
``shards``  list of ``{"path", "header": {"size", "blocks"}}``   (root only)

A tensor's place follows from its name (:func:`split_name`), so equal layers are equal subtrees, and two trees are
compared by walking only where ids differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergepipe.store.canonical import brief, dump_canonical, load_strict
from mergepipe.store.chunking import MAXIMUM_BLOCK_BYTES, block_count, block_elements, is_contiguous
from mergepipe.store.digest import Digest, hash_record
from mergepipe.store.dtypes import DTYPES, DType
from mergepipe.store.errors import BadInputError

MAXIMUM_DIMENSIONS = 64
MAXIMUM_DEPTH = 64  # of the tree; what is deeper in a tensor's name stays in its leaf
# Nodes may be shared: 64 that share their children would list 2^64 tensors. So many may be listed, and so many more for
# each name that was read.
_ROOM = 1 << 18
_SHARED = 64


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as its blocks: element type, shape, chunk shape, and block ids in C order over the chunk grid."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    blocks: tuple[Digest, ...]

    @property
    def element_type(self) -> DType:
        return DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.element_type.nbytes(self.elements)

    def block_span(self, index: int) -> tuple[int, int]:
        """``(offset, size)`` in bytes of block ``index`` within the tensor's bytes."""
        start, count = block_elements(self.shape, self.chunks, index)
        return self.element_type.nbytes(start), self.element_type.nbytes(count)

    def same_grid(self, other: TensorEntry) -> bool:
        """Whether both are cut into blocks alike, so that blocks with one index hold the same elements."""
        return self.shape == other.shape and self.chunks == other.chunks

    @cached_property
    def id(self) -> Digest:
        """The tensor's own id, by which statistics of whole tensors are kept."""
        return hash_record("tensor", dump_canonical(self.as_json()))

    def as_json(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "chunks": list(self.chunks),
            "blocks": [block.hex() for block in self.blocks],
        }


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file's content: its size in bytes and the ids of its consecutive pieces."""

    size: int
    blocks: tuple[Digest, ...]

    def as_json(self) -> dict[str, Any]:
        return {"size": self.size, "blocks": [block.hex() for block in self.blocks]}


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: where it lay, and its first bytes (length and JSON header) kept verbatim."""

    path: str
    header: FileEntry

    def as_json(self) -> dict[str, Any]:
        return {"path": self.path, "header": self.header.as_json()}


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the tree."""

    nodes: Mapping[str, Digest] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    def encode(self) -> bytes:
        """The node's canonical bytes."""
        value: dict[str, Any] = {}
        if self.nodes:
            value["nodes"] = {name: node.hex() for name, node in self.nodes.items()}
        if self.tensors:
            value["tensors"] = {name: entry.as_json() for name, entry in self.tensors.items()}
        if self.files:
            value["files"] = {path: entry.as_json() for path, entry in self.files.items()}
        if self.shards:
            value["shards"] = [shard.as_json() for shard in self.shards]
        return dump_canonical(value)


def split_name(name: str) -> tuple[tuple[str, ...], str]:
    """Where a tensor hangs in the tree: module path down to the layer, and the rest of its name.

    >>> split_name("model.layers.0.self_attn.q_proj.weight")
    (('model', 'layers', '0'), 'self_attn.q_proj.weight')
    >>> split_name("model.embed_tokens.weight")
    (('model',), 'embed_tokens.weight')
    >>> split_name("lm_head.weight")
    ((), 'lm_head.weight')
    """
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts[:-1]) if part.isascii() and part.isdigit()), None)
    depth = min(layer + 1 if layer is not None else max(len(parts) - 2, 0), MAXIMUM_DEPTH)
    return tuple(parts[:depth]), ".".join(parts[depth:])


def join_name(path: tuple[str, ...], leaf: str) -> str:
    """Inverse of :func:`split_name`."""
    return ".".join((*path, leaf))


def build_tree(
    tensors: Mapping[str, TensorEntry],
    files: Mapping[str, FileEntry],
    shards: tuple[Shard, ...],
    put: Callable[[bytes], Digest],
) -> Digest:
    """Write a tree bottom-up through ``put`` (node bytes -> node id); returns the root's id."""
    root: dict[str, Any] = {"nodes": {}, "tensors": {}}
    for name, entry in tensors.items():
        path, leaf = split_name(name)
        branch = root
        for part in path:
            branch = branch["nodes"].setdefault(part, {"nodes": {}, "tensors": {}})
        branch["tensors"][leaf] = entry

    def write(branch: dict[str, Any]) -> Node:
        children = {name: put(write(child).encode()) for name, child in branch["nodes"].items()}
        return Node(children, branch["tensors"])

    top = write(root)
    return put(Node(top.nodes, top.tensors, files, shards).encode())


def walk_tensors(
    root: Node, read: Callable[[Digest], Node], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, TensorEntry]]:
    """All tensors below a node with their full names, in the tree's order (layers by number).

    Raises:
        BadInputError: the tree is deeper than :func:`build_tree` makes them, or its nodes share nodes until a small
            tree lists more than any model has.
    """
    check_depth(path)
    nodes = read if isinstance(read, SharedNodes) else SharedNodes(read)
    for leaf, entry in root.tensors.items():
        yield join_name(path, leaf), entry
    for name in sorted(root.nodes, key=natural_key):
        yield from walk_tensors(nodes(root.nodes[name]), nodes, (*path, name))


def check_depth(path: tuple[str, ...]) -> None:
    """Raises BadInputError for a place that is deeper than any in a tree that :func:`build_tree` made."""
    if len(path) > MAXIMUM_DEPTH:
        raise BadInputError(f"the manifest tree below {brief(path[0])!r} is deeper than any that mp makes")


class SharedNodes:
    """The nodes of one walk: each is read once, whoever shares it, and visits are held to what was read."""

    def __init__(self, read: Callable[[Digest], Node]) -> None:
        self._read = read
        self._known: dict[Digest, Node] = {}
        self._left = _ROOM

    def __call__(self, digest: Digest) -> Node:
        node = self._known.get(digest)
        if node is None:
            node = self._known[digest] = self._read(digest)
            self._left += _SHARED * (1 + len(node.nodes) + len(node.tensors))
        self._left -= 1 + len(node.tensors)
        if self._left < 0:
            raise BadInputError("the manifest tree lists the same nodes again and again, more often than any model has")
        return node


def natural_key(name: str) -> tuple[int, int, str]:
    """Sorts ``2`` before ``10``."""
    return (0, int(name), name) if name.isascii() and name.isdigit() and len(name) < 20 else (1, 0, name)


def decode_node(data: bytes, what: str) -> Node:
    """Read a node's bytes strictly; raises BadInputError, whose message begins with ``what``."""
    value = load_strict(data, what)
    if not isinstance(value, dict) or not set(value) <= {"nodes", "tensors", "files", "shards"}:
        raise BadInputError(f"{what}: not a manifest node")
    try:
        return Node(
            {name: Digest.parse(node) for name, node in value.get("nodes", {}).items()},
            {name: decode_tensor(entry) for name, entry in value.get("tensors", {}).items()},
            {path: decode_file(entry) for path, entry in value.get("files", {}).items()},
            tuple(Shard(_text(s["path"]), decode_file(s["header"])) for s in value.get("shards", [])),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInputError(f"{what}: not a manifest node ({brief(error)})") from error


def decode_tensor(value: Any) -> TensorEntry:
    """One leaf from JSON; raises ValueError or TypeError."""
    dtype, shape, chunks = _text(value["dtype"]), _extents(value["shape"]), _extents(value["chunks"])
    if dtype not in DTYPES or len(shape) > MAXIMUM_DIMENSIONS or not is_contiguous(shape, chunks, DTYPES[dtype].bits):
        raise ValueError(f"a tensor of {dtype} {shape} cut into {chunks}")
    blocks = tuple(Digest.parse(block) for block in value["blocks"])
    if len(blocks) != block_count(shape, chunks):
        raise ValueError(f"{len(blocks)} blocks for {shape} cut into {chunks}")
    if blocks and DTYPES[dtype].nbytes(block_elements(shape, chunks, 0)[1]) > MAXIMUM_BLOCK_BYTES:
        raise ValueError(f"a tensor of {dtype} {shape} in blocks that are larger than any, {chunks}")
    return TensorEntry(dtype, shape, chunks, blocks)


def decode_file(value: Any) -> FileEntry:
    """One file's entry from JSON; raises ValueError or TypeError."""
    (size,) = _extents([value["size"]])
    return FileEntry(size, tuple(Digest.parse(block) for block in value["blocks"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _extents(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
        raise TypeError(f"{value!r} is not a list of extents")
    return tuple(value)
