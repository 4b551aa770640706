"""``mp log``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer

from mergepipe.cli.graph import Lanes
from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store
from mergepipe.cli.plan_head import PlanHead, read_plan_head
from mergepipe.cli.show_plan import default_message, one_line, origin_line
from mergepipe.cli.tables import Cell, Row, first_line, local_time, print_table
from mergepipe.cli.terminal import note, paint, say, say_json
from mergepipe.store.commits import Commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import MergePipeError
from mergepipe.store.history import Entry, Move, reflog, refs_by_commit, short_length, walk
from mergepipe.store.refs import Ref, all_refs, require_ref, resolve
from mergepipe.store.store import Store

EXAMPLES: Final = """
mp log merged/v1 --graph
mp log -n 0 --json                    # everything, for a script
mp log math --reflog                  # where math has been: math@{1}, math@{2}, ...
"""


def command(
    ref: Annotated[
        str | None,
        typer.Argument(metavar="[REF]", help="Where to start (default: all refs).", autocompletion=complete_ref),
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Draw the lines between commits.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=0, help="How many; 0 is all.")] = 20,
    moves: Annotated[bool, typer.Option("--reflog", help="Show how refs moved instead, also removed ones.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show where models came from, newest first.

    Each commit with the refs that point at it, and what it was made from: the previous commit of its ref, the
    base, the experts. With --graph a merge says how: its method, the experts with their weights, how much of them
    was read, and how far (relative to its update) it can be from the merge that reads everything.
    """
    with open_store(store) as opened:
        if moves:
            _log_moves(opened, ref, limit, as_json=json)
        else:
            _log_commits(opened, ref, limit, graph=graph, as_json=json)


def _log_commits(store: Store, ref: str | None, limit: int, *, graph: bool, as_json: bool) -> None:
    with store.catalog.reading() as view:
        starts = [resolve(view, ref)] if ref is not None else [each.commit for each in all_refs(view)]
        entries = list(walk(view, starts, limit + 1 if limit else None))
        is_cut = bool(limit) and len(entries) > limit
        entries = entries[:limit] if limit else entries
        names = refs_by_commit(view)
        digits = short_length(view, (entry.id for entry in entries))
    if as_json:
        say_json([_commit_json(entry, names.get(entry.id, []), _plan_of(store, entry.commit)) for entry in entries])
        return
    if not entries:
        note("There are no commits yet. `mp ingest PATH` makes the first.")
    page = _Page(names, digits)
    lanes = Lanes()
    for entry in entries:
        if graph:
            page.draw(entry, lanes, _plan_of(store, entry.commit))
        else:
            page.print(entry)
    if is_cut:
        note(f"(the newest {limit}; -n 0 shows all)")


def _plan_of(store: Store, commit: Commit) -> PlanHead | None:
    """What a merge's plan says; None where it has none, or where that cannot be read: `mp show` says why."""
    if commit.plan is None:
        return None
    try:
        return read_plan_head(store, commit.plan)
    except MergePipeError:
        return None


@dataclass(frozen=True, slots=True)
class _Page:
    """What all commits of one answer share: the refs that point at them, and how many digits tell them apart."""

    names: Mapping[Digest, Sequence[Ref]]
    digits: int

    def print(self, entry: Entry) -> None:
        say(self._headline(entry, entry.commit.message))
        origin = _origin(entry.commit)
        if origin:
            say(" " * (self.digits + 2) + origin)

    def draw(self, entry: Entry, lanes: Lanes, plan: PlanHead | None) -> None:
        """The commit, and the lines that lead to its parents; the message is left out where it only names the plan."""
        commit = entry.commit
        message = commit.message if plan is None or commit.message != default_message(plan) else ""
        own, links, below = lanes.place(entry.id, [parent.commit for parent in commit.parents])
        say(f"{own}  {self._headline(entry, message)}")
        origin = _origin(commit) if plan is None else origin_line(plan)
        if links or origin:
            say(f"{links or below}  {origin}".rstrip())

    def _headline(self, entry: Entry, message: str) -> str:
        commit, refs = entry.commit, self.names.get(entry.id, [])
        parts = [paint(entry.id.hex()[: self.digits], "yellow")]
        if refs:
            shown = [paint(ref.name, "magenta" if ref.kind == "tag" else "green") for ref in refs]
            parts.append(f"({', '.join(shown)})")
        parts += [commit.kind, local_time(commit.time), commit.author, first_line(message)]
        return "  ".join(part for part in parts if part)


def _origin(commit: Commit) -> str:
    """``previous; base: Qwen3-0.6B; experts: math, code``: the parents, but for a plain previous one alone."""
    if all(parent.role == "previous" for parent in commit.parents):
        return ""
    names: dict[str, list[str]] = {}
    for parent in commit.parents:
        names.setdefault(parent.role, []).append(one_line(parent.name) or parent.commit.short)
    parts = []
    for role, found in names.items():
        label = role if len(found) == 1 else f"{role}s"
        parts.append(paint(label, "dim") + ("" if role == "previous" else f": {', '.join(found)}"))
    return "; ".join(parts)


def _commit_json(entry: Entry, refs: Sequence[Ref], plan: PlanHead | None) -> dict[str, Any]:
    commit = entry.commit
    return {
        "commit": entry.id.hex(),
        "kind": commit.kind,
        "refs": [ref.name for ref in refs],
        "parents": [parent.as_json() for parent in commit.parents],
        "message": commit.message,
        "time": commit.time,
        "author": commit.author,
        "tree": commit.tree.hex(),
        "plan": commit.plan.hex() if commit.plan else None,
        "merge": plan.as_json() if plan is not None else None,
        "measured": commit.measured,
        "tool": commit.tool,
    }


def _log_moves(store: Store, ref: str | None, limit: int, *, as_json: bool) -> None:
    with store.catalog.reading() as view:
        moves = reflog(view, ref)
        if ref is not None and not moves:
            require_ref(view, ref)
    moves = moves[:limit] if limit else moves
    if as_json:
        say_json([_move_json(move) for move in moves])
        return
    if not moves:
        note("No ref has moved yet.")
    rows: list[Row] = [
        [
            Cell(f"{move.ref}@{{{move.ago}}}", "green"),
            Cell(move.new.short, "yellow") if move.new else Cell("removed", "red"),
            local_time(move.time),
            move.author,
            move.reason,
        ]
        for move in moves
    ]
    print_table(["move", "commit", "time", "author", "reason"], rows)


def _move_json(move: Move) -> dict[str, Any]:
    return {
        "ref": move.ref,
        "ago": move.ago,
        "old": move.old.hex() if move.old else None,
        "new": move.new.hex() if move.new else None,
        "reason": move.reason,
        "author": move.author,
        "time": move.time,
    }
