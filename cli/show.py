"""``mp show``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store, split_path
from mergepipe.cli.plan_head import PlanHead, plan_file_text, read_plan_head, read_plan_record
from mergepipe.cli.show_plan import again_lines, cost_rows, measured_text, one_line, summary_rows
from mergepipe.cli.show_tensor import print_tensor, tensor_json
from mergepipe.cli.tables import local_time, plural, print_table
from mergepipe.cli.terminal import paint, say, say_json
from mergepipe.store.digest import Digest
from mergepipe.store.errors import MergePipeError, NotFoundError, UsageError, nearest
from mergepipe.store.filesystem import explain_os_error
from mergepipe.store.history import children, refs_by_commit
from mergepipe.store.sizes import format_size
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store
from mergepipe.store.usage import logical_bytes, stored_bytes_of

EXAMPLES: Final = """
mp show merged/v1
mp show math:model.embed_tokens.weight
mp show math:config.json              # prints the file
mp show merged/v1 --plan -o p.json    # the plan again, as `mp merge --plan` takes it
"""


def command(
    target: Annotated[
        str,
        typer.Argument(metavar="REF[:TENSOR|FILE]", help="A commit, or one thing in it.", autocompletion=complete_ref),
    ],
    plan: Annotated[bool, typer.Option("--plan", help="Print the plan of a merge instead, all of it.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="With --plan: write it to this file.")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show a commit, a tensor or a file in detail.

    A commit: what it was made from, when, and by whom. A merge also: what its plan said, and what it cost beside
    what the plan foresaw. A tensor: its blocks with their ids, encodings and stored sizes, and how far each is from
    the base. A file: its content.
    """
    ref, name = split_path(target)
    if output is not None and not plan:
        raise UsageError("-o says where to write a plan, and needs --plan", hint=f"Write: mp show {ref} --plan -o FILE")
    if plan and name:
        raise UsageError(f"{target!r} is not a commit, and has no plan", hint=f"Write: mp show {ref} --plan")
    with open_store(store) as opened:
        snapshot = opened.snapshot(ref)
        if plan:
            _show_plan(opened, snapshot, ref, output, as_json=json)
        elif not name:
            _show_commit(opened, snapshot, ref, as_json=json)
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


def _show_plan(store: Store, snapshot: Snapshot, ref: str, output: Path | None, *, as_json: bool) -> None:
    plan = snapshot.commit.plan
    if plan is None:
        raise NotFoundError(f"{ref!r} has no plan: it is no merge", hint="`mp log --graph` shows which commits are.")
    text = plan_file_text(read_plan_record(store, plan))
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise explain_os_error(error, f"writing the plan to {output}") from error
    if as_json:
        say_json({"plan": plan.hex(), "file": str(output)})
    else:
        say(f"written to {output}: mp merge --plan {output} --as NAME")


def _show_commit(store: Store, snapshot: Snapshot, ref: str, *, as_json: bool) -> None:
    plan, unreadable = _plan_of(store, snapshot.commit.plan)
    facts = _facts(store, snapshot)
    if as_json:
        say_json({**facts, "plan": plan.as_json() if plan is not None else unreadable})
        return
    _print_commit(facts)
    measured = facts["measured"]
    if plan is not None:
        _print_plan(plan, measured, ref)
    elif measured:
        say()
        print_table(["measured", ""], [[name, measured_text(name, value)] for name, value in measured.items()])
    if unreadable is not None:
        say()
        say(f"plan      {unreadable['id']}: cannot be read ({unreadable['error']})")


def _facts(store: Store, snapshot: Snapshot) -> dict[str, Any]:
    """All that a commit says of itself, and the catalog of it."""
    commit = snapshot.commit
    with store.catalog.reading() as view:
        refs = refs_by_commit(view).get(snapshot.commit_id, [])
        made_from_this = children(view, snapshot.commit_id)
    return {
        "commit": snapshot.commit_id.hex(),
        "refs": [each.name for each in refs],
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
    }


def _plan_of(store: Store, plan: Digest | None) -> tuple[PlanHead | None, dict[str, str] | None]:
    """What a plan says; where it cannot be read, its id and why."""
    if plan is None:
        return None, None
    try:
        return read_plan_head(store, plan), None
    except MergePipeError as error:
        return None, {"id": plan.hex(), "error": error.message}


def _print_plan(plan: PlanHead, measured: dict[str, int | float], ref: str) -> None:
    say()
    print_table(["", ""], summary_rows(plan))
    say()
    print_table(["costs", "planned", "measured"], cost_rows(plan, measured), right="planned measured")
    say()
    for line in again_lines(plan, ref):
        say(line)


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
    say(f"tree      {facts['tree']}")
    say(f"stored    {format_size(facts['stored_bytes'])}")


def _dtypes(facts: dict[str, Any]) -> str:
    return ", ".join(facts["dtypes"]) or "none"


def _relative(relative: dict[str, Any], name: str | None) -> list[str]:
    short = Digest.parse(relative["commit"]).short
    return [relative["role"], short] if name is None else [relative["role"], short, one_line(name)]
