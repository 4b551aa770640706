"""``mp gc``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, open_store
from mergepipe.cli.tables import plural
from mergepipe.cli.terminal import note, say, say_json
from mergepipe.store.errors import UsageError
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.gc import Collection
    from mergepipe.store.store import Store

EXAMPLES: Final = """
mp gc                                 # says what would be freed
mp gc --apply
mp gc --grace 0 --apply               # also what was removed a minute ago
mp gc --previews --apply              # previews instead; `mp analyze REF --previews` makes them again
"""


def command(
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else it is only said what would be freed.")] = False,
    grace: Annotated[
        str | None, typer.Option("--grace", metavar="AGE", help="Keep what is younger: 14d (the default), 12h, 0.")
    ] = None,
    previews: Annotated[
        bool, typer.Option("--previews", help="Drop all previews, and nothing else; no weights are lost.")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Free disk space: remove what no ref needs any more.

    A ref needs its commit, all commits that this was made from, and all that they consist of. What was removed or
    moved lately is kept for a grace period, and so is what somebody is reading or writing. Nothing is freed without
    --apply. Safe to interrupt, and safe beside ingests and merges.
    """
    if previews and grace is not None:
        raise UsageError("--grace and --previews exclude each other", hint="Previews of any age can be made again.")
    with open_store(store) as opened:
        if previews:
            _drop_previews(opened, apply=apply, json=json)
            return
        from mergepipe.store.gc import DEFAULT_GRACE_SECONDS, collect, parse_age

        seconds = DEFAULT_GRACE_SECONDS if grace is None else parse_age(grace)
        found = collect(opened, apply=apply, grace_seconds=seconds)
    if json:
        say_json({"applied": apply, **asdict(found), "freed_bytes": found.freed_bytes})
        return
    _print(found, apply=apply, grace=grace or "14d")


def _print(found: Collection, *, apply: bool, grace: str) -> None:
    verb = "removed" if apply else "would be removed"
    parts = [
        f"{plural(count, kind)}, {format_size(found.bytes[kind])}" for kind, count in sorted(found.objects.items())
    ]
    if found.stray_files:
        parts.append(f"{plural(found.stray_files, 'file')} that a crash left, {format_size(found.stray_bytes)}")
    for part in parts:
        say(f"  {part}")
    if parts or found.rows:
        say(f"{verb}: {format_size(found.freed_bytes)}")
    else:
        say("nothing to remove")
        if grace != "0":
            note(f"What was removed or moved in the last {grace} is kept; `mp gc --grace 0` shows what that is.")
    if found.kept_young:
        size = format_size(found.kept_young_bytes)
        note(
            f"{plural(found.kept_young, 'object')} ({size}) that nothing needs: younger than {grace}, so kept (--grace)"
        )
    if not apply and (parts or found.rows):
        say("Nothing was changed. To do it: mp gc --apply")


def _drop_previews(store: Store, *, apply: bool, json: bool) -> None:
    from mergepipe.store.drop_previews import drop_previews, plan_removal

    found = drop_previews(store) if apply else plan_removal(store)
    count, size = len(found.ids), found.freed_bytes
    if json:
        say_json({"applied": apply, "previews": count, "freed_bytes": size})
    elif not count:
        say("there are no previews")
    elif apply:
        say(f"dropped {plural(count, 'preview')}: {format_size(size)} freed")
    else:
        say(f"{plural(count, 'preview')} would go: {format_size(size)}")
        say("Nothing was changed. To drop them: mp gc --previews --apply")
