"""``mp show``."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store, split_path
from mergepipe.cli.show_plan import plan_lines, read_plan_summary
from mergepipe.cli.show_tensor import print_tensor, tensor_json
from mergepipe.cli.tables import local_time, plural, print_table
from mergepipe.cli.terminal import paint, say, say_json
from mergepipe.store.digest import Digest
from mergepipe.store.errors import NotFoundError, nearest
from mergepipe.store.history import children, refs_by_commit
from mergepipe.store.sizes import format_size
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store
from mergepipe.store.usage import logical_bytes, stored_bytes_of

EXAMPLES: Final = """
mp show merged/v1
mp show math:model.embed_tokens.weight
mp show math:config.json              # prints the file
"""


def command(
    target: Annotated[
        str,
        typer.Argument(metavar="REF[:TENSOR|FILE]", help="A commit, or one thing in it.", autocompletion=complete_ref),
    ],
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show a commit, a tensor or a file in detail.

    A commit: what it was made from, when, by whom, at what cost, and what the plan of a merge said. A tensor: its
    blocks with their ids, encodings and stored sizes, and how far each is from the base. A file: its content.
    """
    ref, name = split_path(target)
    with open_store(store) as opened:
        snapshot = opened.snapshot(ref)
        if not name:
            _show_commit(opened, snapshot, as_json=json)
        elif name in snapshot.tensors:
            if json:
                say_json(tensor_json(opened, snapshot, name))
            else:
                print_tensor(opened, snapshot, name)
        elif name in snapshot.files:
            _show_file(snapshot, name, as_json=json)
        else:
            hint = nearest(name, [*snapshot.tensors, *snapshot.files]) or f"`mp ls {ref}` lists what there is."
            raise NotFoundError(f"there is no tensor or file {name!r} in {ref!r}", hint=hint)


def _show_file(snapshot: Snapshot, path: str, *, as_json: bool) -> None:
    entry = snapshot.files[path]
    if as_json:
        say_json({"path": path, "bytes": entry.size, "blocks": [block.hex() for block in entry.blocks]})
        return
    for piece in snapshot.file_pieces(entry):
        sys.stdout.buffer.write(piece)


def _show_commit(store: Store, snapshot: Snapshot, *, as_json: bool) -> None:
    commit = snapshot.commit
    with store.catalog.reading() as view:
        refs = refs_by_commit(view).get(snapshot.commit_id, [])
        made_from_this = children(view, snapshot.commit_id)
    facts: dict[str, Any] = {
        "commit": snapshot.commit_id.hex(),
        "refs": [ref.name for ref in refs],
        "kind": commit.kind,
        "message": commit.message,
        "author": commit.author,
        "time": commit.time,
        "tool": commit.tool,
        "tree": commit.tree.hex(),
        "parents": [parent.as_json() for parent in commit.parents],
        "children": [{"commit": child.hex(), "role": role} for child, role in made_from_this],
        "tensors": len(snapshot.tensors),
        "elements": sum(entry.elements for entry in snapshot.tensors.values()),
        "dtypes": sorted({entry.dtype for entry in snapshot.tensors.values()}),
        "files": len(snapshot.files),
        "logical_bytes": logical_bytes(snapshot),
        "stored_bytes": stored_bytes_of(store, snapshot.commit_id),
        "measured": commit.measured,
        "plan": read_plan_summary(store, commit.plan) if commit.plan else None,
    }
    if as_json:
        say_json(facts)
        return
    _print_commit(facts)


def _print_commit(facts: dict[str, Any]) -> None:
    refs = f"  ({paint(', '.join(facts['refs']), 'green')})" if facts["refs"] else ""
    say(f"{facts['kind']} {paint(facts['commit'], 'yellow')}{refs}")
    say(f"by {facts['author']}, {local_time(facts['time'])}, {facts['tool']}")
    say()
    say(f"    {facts['message']}")
    if facts["parents"]:
        say()
        print_table(["made from", "", ""], [_relative(each, each["name"]) for each in facts["parents"]])
    if facts["children"]:
        say()
        print_table(["led to", ""], [_relative(each, None) for each in facts["children"]])
    say()
    say(f"content   {plural(facts['tensors'], 'tensor')} with {facts['elements']:,} elements ({_dtypes(facts)})")
    say(f"          {plural(facts['files'], 'file')}; {format_size(facts['logical_bytes'])} in all")
    say(f"stored    {format_size(facts['stored_bytes'])}")
    if facts["measured"]:
        say()
        print_table(["measured", ""], [[name, _measure(name, value)] for name, value in facts["measured"].items()])
    if facts["plan"]:
        say()
        for line in plan_lines(facts["plan"]):
            say(line)


def _dtypes(facts: dict[str, Any]) -> str:
    return ", ".join(facts["dtypes"]) or "none"


def _relative(relative: dict[str, Any], name: str | None) -> list[str]:
    short = Digest.parse(relative["commit"]).short
    return [relative["role"], short] if name is None else [relative["role"], short, name]


def _measure(name: str, value: int | float) -> str:
    if "bytes" in name and isinstance(value, int):
        return format_size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
