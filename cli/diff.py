"""``mp diff``."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store
from mergepipe.cli.tables import Cell, plural, print_table, shape_text
from mergepipe.cli.terminal import say, say_json
from mergepipe.store.diff import FileChange, TensorChange, TreeDiff, diff
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.sizes import format_size
from mergepipe.store.snapshot import Snapshot

EXAMPLES: Final = """
mp diff Qwen3-0.6B math
mp diff merged/v1~1 merged/v1
mp diff math math@{1} --json
"""
_STYLES: Final = {"added": "green", "removed": "red", "changed": "", "reshaped": "yellow"}


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="The commit before.", autocompletion=complete_ref)],
    b: Annotated[str, typer.Argument(metavar="B", help="The commit after.", autocompletion=complete_ref)],
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show what changed between two commits.

    For each tensor that differs: how many of its blocks, and the norm of the difference where the store knows it
    (between a base and what was ingested against it). Reads manifests alone, and of these only what differs.
    """
    with open_store(store) as opened:
        before, after = opened.snapshot(a), opened.snapshot(b)
        found = diff(opened, before, after)
    if json:
        say_json(_as_json(found, before, after))
        return
    _print(found)


def _print(found: TreeDiff) -> None:
    if found.tensors:
        rows = [_tensor_row(change) for change in found.tensors]
        print_table(["tensor", "change", "blocks", "norm", "largest"], rows, right="norm largest")
    if found.files:
        if found.tensors:
            say()
        print_table(["file", "change", "size"], [_file_row(change) for change in found.files])
    if found.tensors or found.files:
        say()
    say(_summary(found))


def _tensor_row(change: TensorChange) -> list[str | Cell]:
    norms = change.norms
    blocks = f"{change.changed_blocks} of {change.blocks}"
    if change.change == "reshaped" and change.before and change.after:
        blocks = f"{_kind(change.before)} -> {_kind(change.after)}"
    elif change.change != "changed":
        entry = change.after or change.before
        blocks = _kind(entry) if entry else ""
    return [
        Cell(change.name, "cyan"),
        Cell(change.change, _STYLES[change.change]),
        blocks,
        f"{norms.l2:.4g}" if norms else "",
        f"{norms.largest:.3g}" if norms else "",
    ]


def _kind(entry: TensorEntry) -> str:
    return f"{entry.dtype} {shape_text(entry.shape)}"


def _file_row(change: FileChange) -> list[str | Cell]:
    sizes = [format_size(size) for size in (change.before_bytes, change.after_bytes) if size is not None]
    return [Cell(change.path, "cyan"), Cell(change.change, _STYLES[change.change]), " -> ".join(sizes)]


def _summary(found: TreeDiff) -> str:
    parts = []
    for kind in ("changed", "reshaped", "added", "removed"):
        count = sum(change.change == kind for change in found.tensors)
        if count:
            parts.append(f"{plural(count, 'tensor')} {kind}")
    changed = [change for change in found.tensors if change.change == "changed"]
    if changed:
        blocks = f"{sum(c.changed_blocks for c in changed):,} of {sum(c.blocks for c in changed):,} blocks"
        parts[0] += f" ({blocks})"
    if found.files:
        parts.append(f"{plural(len(found.files), 'file')} differ" + ("s" if len(found.files) == 1 else ""))
    if found.layout_changed:
        parts.append("the tensors lie in other safetensors files")
    return "; ".join(parts) or "no difference"


def _as_json(found: TreeDiff, before: Snapshot, after: Snapshot) -> dict[str, Any]:
    return {
        "a": before.commit_id.hex(),
        "b": after.commit_id.hex(),
        "tensors": [_tensor_json(change) for change in found.tensors],
        "files": [
            {
                "path": change.path,
                "change": change.change,
                "before_bytes": change.before_bytes,
                "after_bytes": change.after_bytes,
            }
            for change in found.files
        ],
        "layout_changed": found.layout_changed,
        "nodes_read": found.nodes_read,
    }


def _tensor_json(change: TensorChange) -> dict[str, Any]:
    return {
        "name": change.name,
        "change": change.change,
        "blocks": change.blocks,
        "changed_blocks": change.changed_blocks,
        "delta_norm": change.norms.l2 if change.norms else None,
        "largest": change.norms.largest if change.norms else None,
        "changed_elements": change.norms.changed if change.norms else None,
        "before": _entry_json(change.before),
        "after": _entry_json(change.after),
    }


def _entry_json(entry: TensorEntry | None) -> dict[str, Any] | None:
    return {"dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes} if entry else None
