"""What differs between two commits, found by walking only where the ids of manifest nodes differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from mergepipe.store.digest import Digest
from mergepipe.store.manifest import (
    FileEntry,
    Node,
    SharedNodes,
    TensorEntry,
    check_depth,
    join_name,
    natural_key,
    walk_tensors,
)
from mergepipe.store.norms import Norms, add_norms, read_norms
from mergepipe.store.snapshot import Snapshot

if TYPE_CHECKING:
    from mergepipe.store.store import Store

Item = TypeVar("Item")
Change = Literal["added", "removed", "changed", "reshaped"]


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor that differs. ``reshaped``: its dtype, shape or chunk shape did, so that blocks do not correspond.

    ``changed_blocks`` of ``blocks`` are not where they were; ``norms`` are of the delta, where the catalog
    knows them for all changed blocks.
    """

    name: str
    change: Change
    before: TensorEntry | None
    after: TensorEntry | None
    blocks: int
    changed_blocks: int
    norms: Norms | None = None


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file that differs: sizes in bytes, None where it is not there."""

    path: str
    change: Change
    before_bytes: int | None
    after_bytes: int | None


@dataclass(frozen=True, slots=True)
class TreeDiff:
    """All that differs. ``nodes_read``: manifest nodes that had to be looked at, of both sides.

    ``layout_changed``: the safetensors files have other names or headers, whatever is in them.
    """

    tensors: tuple[TensorChange, ...]
    files: tuple[FileChange, ...]
    nodes_read: int
    layout_changed: bool = False


def diff(store: Store, a: Snapshot, b: Snapshot) -> TreeDiff:
    """The changes that lead from ``a`` to ``b``; raises DamagedError where a manifest node cannot be read.

    Raises BadInputError for trees that no release makes (:func:`~mergepipe.store.manifest.walk_tensors`).
    """
    if a.commit.tree == b.commit.tree:
        return TreeDiff((), (), 0)
    seen: set[Digest] = set()

    def read(digest: Digest) -> Node:
        seen.add(digest)
        return a.node(digest)

    pairs = list(_tensor_pairs(a.commit.tree, b.commit.tree, SharedNodes(read), ()))
    tensors = tuple(_tensor_change(store, name, before, after) for name, before, after in pairs)
    return TreeDiff(tensors, tuple(_file_changes(a.files, b.files)), len(seen), a.root.shards != b.root.shards)


def _tensor_pairs(
    before: Digest | None, after: Digest | None, read: Callable[[Digest], Node], path: tuple[str, ...]
) -> Iterator[tuple[str, TensorEntry | None, TensorEntry | None]]:
    """Tensors that differ below two nodes; a subtree that only one side has is walked whole."""
    if before == after:
        return
    check_depth(path)
    left = read(before) if before is not None else Node()
    right = read(after) if after is not None else Node()
    if before is None or after is None:
        for name, entry in walk_tensors(right if before is None else left, read, path):
            yield (name, None, entry) if before is None else (name, entry, None)
        return
    for leaf, old, new in _joined(left.tensors, right.tensors):
        if old != new:
            yield join_name(path, leaf), old, new
    for name, old_node, new_node in _joined(left.nodes, right.nodes):
        yield from _tensor_pairs(old_node, new_node, read, (*path, name))


def _joined(left: Mapping[str, Item], right: Mapping[str, Item]) -> Iterator[tuple[str, Item | None, Item | None]]:
    for name in sorted({**left, **right}, key=natural_key):
        yield name, left.get(name), right.get(name)


def _tensor_change(store: Store, name: str, before: TensorEntry | None, after: TensorEntry | None) -> TensorChange:
    if before is None or after is None:
        entry = after or before
        count = len(entry.blocks) if entry is not None else 0
        return TensorChange(name, "added" if before is None else "removed", before, after, count, count)
    count = len(after.blocks)
    if before.dtype != after.dtype or not before.same_grid(after):
        kept = set(before.blocks)
        moved = sum(block not in kept for block in after.blocks)
        return TensorChange(name, "reshaped", before, after, count, moved)
    pairs = [(old, new) for old, new in zip(before.blocks, after.blocks, strict=True) if old != new]
    with store.catalog.reading() as view:
        norms = [read_norms(view, old, new) for old, new in pairs]
    known = [each for each in norms if each is not None]
    total = add_norms(known) if known and len(known) == len(norms) else None
    return TensorChange(name, "changed", before, after, count, len(pairs), total)


def _file_changes(before: Mapping[str, FileEntry], after: Mapping[str, FileEntry]) -> Iterator[FileChange]:
    for path, old, new in _joined(before, after):
        if old != new:
            change: Change = "added" if old is None else "removed" if new is None else "changed"
            yield FileChange(path, change, old.size if old else None, new.size if new else None)
