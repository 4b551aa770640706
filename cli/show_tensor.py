"""One tensor of a commit for ``mp show``: its blocks as they lie in the store, and how far they are from the base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergepipe.cli.tables import Cell, plural, print_table, shape_text
from mergepipe.cli.terminal import paint, say
from mergepipe.store.catalog import ObjectRow
from mergepipe.store.digest import Digest
from mergepipe.store.errors import MergePipeError
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.norms import Norms, add_norms, read_norms
from mergepipe.store.sizes import format_size
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store


@dataclass(frozen=True, slots=True)
class _Block:
    """``row`` None: the object is not there. ``same``: the base has this very block."""

    id: Digest
    bytes: int
    row: ObjectRow | None
    same: bool
    norms: Norms | None


def tensor_json(store: Store, snapshot: Snapshot, name: str) -> dict[str, Any]:
    """All that is known of a tensor."""
    entry = snapshot.entry(name)
    base, blocks = _blocks(store, snapshot, name)
    return {
        "commit": snapshot.commit_id.hex(),
        "name": name,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "chunk_shape": list(entry.chunks),
        "bytes": entry.nbytes,
        "base": base,
        "blocks": [
            {
                "id": block.id.hex(),
                "bytes": block.bytes,
                "encoding": block.row.encoding.name.lower() if block.row else None,
                "stored_bytes": block.row.stored_bytes if block.row else None,
                "same_as_base": block.same,
                "delta_norm": block.norms.l2 if block.norms else None,
                "largest": block.norms.largest if block.norms else None,
            }
            for block in blocks
        ],
    }


def print_tensor(store: Store, snapshot: Snapshot, name: str) -> None:
    """The same for people."""
    entry = snapshot.entry(name)
    base, blocks = _blocks(store, snapshot, name)
    stored = sum(block.row.stored_bytes for block in blocks if block.row)
    say(f"{paint(name, 'cyan')}  {entry.dtype}  {shape_text(entry.shape)}")
    say(
        f"{format_size(entry.nbytes)} in {plural(len(blocks), 'block')} of {shape_text(entry.chunks)}",
    )
    say(f"{format_size(stored)} stored")
    if base is not None:
        say(_distance(base, blocks))
    if blocks:
        say()
        headings = ["block", "id", "encoding", "size", "stored", *(["norm", "largest"] if base else [])]
        rows = [_row(index, block, with_base=base is not None) for index, block in enumerate(blocks)]
        print_table(headings, rows, right="block size stored norm largest")


def _row(index: int, block: _Block, *, with_base: bool) -> list[str | Cell]:
    encoding = Cell(block.row.encoding.name.lower()) if block.row else Cell("missing", "red")
    stored = format_size(block.row.stored_bytes) if block.row else ""
    row: list[str | Cell] = [str(index), Cell(block.id.short, "yellow"), encoding, format_size(block.bytes), stored]
    if with_base:
        norms = block.norms
        row += ["same" if block.same else f"{norms.l2:.4g}" if norms else "", f"{norms.largest:.3g}" if norms else ""]
    return row


def _distance(base: str, blocks: list[_Block]) -> str:
    same = sum(block.same for block in blocks)
    known = [block.norms for block in blocks if block.norms is not None]
    text = f"against {base}: {same} of {plural(len(blocks), 'block')} the same"
    if known and len(known) + same == len(blocks):
        total = add_norms(known)
        text += f"; delta norm {total.l2:.4g}, largest {total.largest:.3g}"
    return text


def _blocks(store: Store, snapshot: Snapshot, name: str) -> tuple[str | None, list[_Block]]:
    """The base's name, where there is one to compare with, and the blocks."""
    entry = snapshot.entry(name)
    base, other = _base_entry(store, snapshot, name)
    blocks = []
    with store.catalog.reading() as view:
        for index, digest in enumerate(entry.blocks):
            size = entry.block_span(index)[1]
            at_base = other.blocks[index] if other is not None and index < len(other.blocks) else None
            same = at_base == digest
            norms = read_norms(view, at_base, digest) if at_base is not None and not same else None
            blocks.append(_Block(digest, size, view.object_row(digest), same, norms))
    return base, blocks


def _base_entry(store: Store, snapshot: Snapshot, name: str) -> tuple[str | None, TensorEntry | None]:
    parent = snapshot.commit.parent("base")
    if parent is None:
        return None, None
    try:
        other = store.snapshot_of(parent.commit).tensors.get(name)
    except MergePipeError:  # what the base has is a courtesy here; `mp verify` reports what is wrong with it
        return None, None
    comparable = other is not None and other.chunks == snapshot.entry(name).chunks
    return (parent.name or parent.commit.short, other) if comparable else (None, None)
