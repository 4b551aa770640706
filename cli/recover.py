"""``mp recover``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mergepipe.cli.chosen import chosen_store
from mergepipe.cli.options import JsonOption, StoreOption
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural
from mergepipe.cli.terminal import note, paint, say, say_json
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.recover import Recovery

EXAMPLES: Final = """
mp recover                            # says what can be recovered, and changes nothing
mp recover --apply
mp recover --full --apply             # reads every block, and not only its header
"""
_MOST_LINES: Final = 20


def command(
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else it is only said what would be there.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Read all objects whole, not only their headers.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Rebuild a lost or damaged catalog from the objects.

    Objects, commits and previews are found by reading the object files; refs and their logs by the journal
    (refs.journal), which is written with every move. Without it, each commit that no other stands on gets a ref
    recovered/ID. The old catalog is kept beside the new one. Where the catalog is as it should be, nothing is done.
    """
    from mergepipe.store.layout import find_layout
    from mergepipe.store.recover import recover

    with progress_bar(quiet=json) as progress:
        recovery = recover(find_layout(chosen_store(store)), apply=apply, full=full, progress=progress)
    if json:
        say_json(_as_json(recovery))
        return
    _print_found(recovery, full=full)
    _print_refs(recovery)
    _print_end(recovery)


def _as_json(recovery: Recovery) -> dict[str, Any]:
    restored, journal, kept = recovery.restored, recovery.journal, recovery.kept
    return {
        "applied": recovery.applied,
        "needed": recovery.is_needed,
        "catalog": recovery.catalog or None,
        "differences": recovery.differences,
        "objects": len(recovery.found.objects),
        "stored_bytes": recovery.found.checked_bytes,
        "previews": len(recovery.found.previews),
        "damaged": [{"id": digest.hex(), "reason": why} for digest, why in sorted(recovery.found.damaged.items())],
        "commits": sorted(digest.hex() for digest in recovery.commits),
        "unfinished": [digest.hex() for digest in restored.unfinished],
        "lost_commits": [digest.hex() for digest in recovery.lost],
        "refs_from": restored.source,
        "refs": [
            {"ref": ref.name, "type": ref.kind, "commit": ref.commit.hex()} for _, ref in sorted(restored.refs.items())
        ],
        "made_refs": [ref.name for ref in restored.made],
        "lost_refs": {name: digest.hex() for name, digest in sorted(restored.lost.items())},
        "unreadable_lines": journal.unreadable if journal else 0,
        "kept": str(kept) if kept else None,
    }


def _print_found(recovery: Recovery, *, full: bool) -> None:
    found, restored = recovery.found, recovery.restored
    if recovery.catalog:
        say(f"{paint('lost', 'red')}     {recovery.catalog}")
    for database, what in recovery.differences.items():
        say(f"{paint('differs', 'yellow')}  {database}: {what}")
    previews = f", {plural(len(found.previews), 'preview')}" if found.previews else ""
    say(
        f"objects  {plural(len(found.objects), 'object')}, {format_size(found.checked_bytes)}{previews}"
        + ("" if full else " (of blocks the headers; `mp verify` reads all)")
    )
    _print_some(
        [f"{paint('damaged', 'red')}  {digest.short}: {why}" for digest, why in sorted(found.damaged.items())]
    )  # fmt: skip
    say(f"commits  {len(recovery.commits):,}")
    _print_some(
        [f"{paint('lost', 'red')}     commit {digest.short}, which others were made from" for digest in recovery.lost]
    )
    if restored.unfinished:
        say(f"         {plural(len(restored.unfinished), 'commit')} left out, which a crash left unfinished")


def _print_refs(recovery: Recovery) -> None:
    restored, journal = recovery.restored, recovery.journal
    source = {
        "journal": "as the journal says",
        "catalog": "as the old catalog says",
        "commits": "there is no journal: each commit that no other stands on gets one",
    }
    moves = sum(map(len, restored.log.values()))
    say(f"refs     {len(restored.refs):,}, {plural(moves, 'move')} in their logs ({source[restored.source]})")
    if journal is not None and (journal.unreadable or journal.torn):
        say(f"         {plural(journal.unreadable, 'line')} of the journal cannot be read")
    for name, digest in sorted(restored.lost.items()):
        where = f"it is at {restored.refs[name].commit.short}" if name in restored.refs else "it is gone"
        say(f"{paint('lost', 'red')}     {name} was at {digest.short}, which is not there: {where}")
    _print_some([f"new      {ref.name} for {ref.commit.short}, to which nothing leads" for ref in restored.made])


def _print_some(lines: list[str]) -> None:
    for line in lines[:_MOST_LINES]:
        say(line)
    if len(lines) > _MOST_LINES:
        say(f"         and {len(lines) - _MOST_LINES:,} more (--json lists all)")


def _print_end(recovery: Recovery) -> None:
    if not recovery.is_needed:
        say("The catalog is as it should be.")
    elif recovery.applied:
        say(paint("The catalog was rebuilt.", "green"))
        if recovery.kept is not None:
            say(f"The old one is kept in {recovery.kept}.")
        note("Statistics of differences and cached results come back as plans need them, or with `mp analyze`.")
    else:
        say("Nothing was changed. To rebuild the catalog: mp recover --apply")
    if recovery.found.damaged:
        note("hint: Ingest the same checkpoints again: what is damaged is then written anew.")
