"""``mp ls``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from mergepipe.cli.naming import list_refs
from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store, split_path
from mergepipe.cli.tables import Cell, Row, plural, print_table, shape_text
from mergepipe.cli.terminal import say, say_json
from mergepipe.store.errors import NotFoundError, nearest
from mergepipe.store.manifest import FileEntry, TensorEntry
from mergepipe.store.sizes import format_size
from mergepipe.store.snapshot import Snapshot

EXAMPLES: Final = """
mp ls
mp ls math
mp ls math:model.layers.0             # one layer
mp ls math:tokenizer                  # files too
"""


def command(
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="[REF[:PREFIX]]", help="A commit, or what in it begins so.", autocompletion=complete_ref
        ),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List the refs, or a commit's tensors and files.

    Without REF: all refs, with the commit that each points at. With REF: its tensors (dtype, shape, size, number
    of blocks) and its other files; PREFIX narrows that down.
    """
    if ref is None:
        list_refs(store, None, as_json=json)
        return
    _list_content(store, *split_path(ref), as_json=json)


def _list_content(store: Path | None, ref: str, prefix: str, *, as_json: bool) -> None:
    with open_store(store) as opened:
        snapshot = opened.snapshot(ref)
        tensors = {name: entry for name, entry in snapshot.tensors.items() if _begins(name, prefix)}
        files = {path: entry for path, entry in snapshot.files.items() if path.startswith(prefix)}
    if prefix and not tensors and not files:
        hint = nearest(prefix, _prefixes(snapshot)) or f"`mp ls {ref}` lists them all."
        raise NotFoundError(f"nothing in {ref!r} begins with {prefix!r}", hint=hint)
    if as_json:
        say_json(_as_json(snapshot, tensors, files))
        return
    _print(tensors, files)


def _begins(name: str, prefix: str) -> bool:
    """``layers.1`` means that layer, and not ``layers.10``; ``layers.1.self`` may end within a word."""
    if not name.startswith(prefix):
        return False
    return not (prefix[-1:].isdigit() and name[len(prefix) : len(prefix) + 1].isdigit())


def _prefixes(snapshot: Snapshot) -> set[str]:
    found = set(snapshot.files)
    for name in snapshot.tensors:
        parts = name.split(".")
        found.update(".".join(parts[: end + 1]) for end in range(len(parts)))
    return found


def _as_json(snapshot: Snapshot, tensors: dict[str, TensorEntry], files: dict[str, FileEntry]) -> dict[str, object]:
    return {
        "commit": snapshot.commit_id.hex(),
        "tensors": [
            {
                "name": name,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "chunk_shape": list(entry.chunks),
                "bytes": entry.nbytes,
                "blocks": len(entry.blocks),
            }
            for name, entry in tensors.items()
        ],
        "files": [{"path": path, "bytes": entry.size} for path, entry in files.items()],
    }


def _print(tensors: dict[str, TensorEntry], files: dict[str, FileEntry]) -> None:
    if tensors:
        rows: list[Row] = [
            [
                Cell(name, "cyan"),
                entry.dtype,
                shape_text(entry.shape),
                format_size(entry.nbytes),
                str(len(entry.blocks)),
            ]
            for name, entry in tensors.items()
        ]
        print_table(["tensor", "dtype", "shape", "size", "blocks"], rows, right="size blocks")
    if files:
        if tensors:
            say()
        rows = [[Cell(path, "cyan"), format_size(entry.size)] for path, entry in files.items()]
        print_table(["file", "size"], rows, right="size")
    total = sum(entry.nbytes for entry in tensors.values()) + sum(entry.size for entry in files.values())
    elements = sum(entry.elements for entry in tensors.values())
    say()
    counted = f"{plural(len(tensors), 'tensor')} with {elements:,} elements, {plural(len(files), 'file')}"
    say(f"{counted}: {format_size(total)}")
