"""What ``mp branch``, ``mp tag`` and ``mp ls`` share: refs in a table, and making one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergepipe.cli.options import open_store
from mergepipe.cli.tables import Cell, Row, first_line, local_time, print_table
from mergepipe.cli.terminal import note, paint, say, say_json
from mergepipe.store.commits import Commit, default_author
from mergepipe.store.errors import ConflictError, UsageError
from mergepipe.store.history import short_length
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import Ref, all_refs, check_ref_name, find_ref, load_commit, resolve


def list_refs(store: Path | None, kind: str | None, *, as_json: bool) -> None:
    """Print all refs of a kind (None: of both) with what they point at."""
    with open_store(store) as opened, opened.catalog.reading() as view:
        refs = [ref for ref in all_refs(view) if kind in (None, ref.kind)]
        commits = [load_commit(view, ref.commit) for ref in refs]
        digits = short_length(view, (ref.commit for ref in refs))
    if as_json:
        say_json([_as_json(ref, commit) for ref, commit in zip(refs, commits, strict=True)])
        return
    if not refs:
        note(f"There is no {kind or 'ref'} yet." + ("" if kind == "tag" else " `mp ingest PATH` makes the first."))
        return
    rows: list[Row] = [
        [
            Cell(ref.name, "magenta" if ref.kind == "tag" else "green"),
            Cell(ref.commit.hex()[:digits], "yellow"),
            "tag" if ref.kind == "tag" and kind is None else commit.kind,
            local_time(commit.time),
            first_line(commit.message),
        ]
        for ref, commit in zip(refs, commits, strict=True)
    ]
    print_table(["ref", "commit", "kind", "time", "message"], rows)


def set_ref(store: Path | None, name: str, target: str | None, kind: str, *, force: bool, as_json: bool) -> None:
    """Make a ref, or move a branch with ``force``.

    Raises:
        UsageError: no target, or a name that a ref cannot have.
        ConflictError: the name is taken.
    """
    if target is None:
        raise UsageError(f"which commit shall {name!r} point at?", hint=f"Write: mp {kind} {name} REF")
    check_ref_name(name)
    with open_store(store) as opened:
        with opened.catalog.reading() as view:
            commit = resolve(view, target)
            found = find_ref(view, name)
        _check_free(found, name, kind, force=force)
        before = found.commit if found else None
        if before != commit:
            update = RefUpdate(name, before, commit, kind, f"{kind}: {target}", default_author())
            publish(opened.catalog, None, Changes(refs=[update]))
    if as_json:
        say_json({"ref": name, "type": kind, "commit": commit.hex(), "before": before.hex() if before else None})
        return
    moved = f" (it was at {before.short})" if before and before != commit else ""
    say(f"{kind} {paint(name, 'green')} is at {paint(commit.short, 'yellow')}{moved}")


def _check_free(found: Ref | None, name: str, kind: str, *, force: bool) -> None:
    if found is None or (force and found.kind == kind == "branch"):
        return
    article = "branch" if found.kind == "branch" else "tag"
    hint = "Move it with --force." if kind == found.kind == "branch" else f"Take another name, or first: mp rm {name}"
    raise ConflictError(f"there is a {article} {name!r} already, at {found.commit.short}", hint=hint)


def _as_json(ref: Ref, commit: Commit) -> dict[str, Any]:
    return {
        "ref": ref.name,
        "type": ref.kind,
        "commit": ref.commit.hex(),
        "kind": commit.kind,
        "time": commit.time,
        "author": commit.author,
        "message": commit.message,
    }
