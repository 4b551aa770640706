"""``mp heal``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, open_store
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural
from mergepipe.cli.terminal import note, paint, say, say_json
from mergepipe.store.errors import DamagedError
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.heal import HealReport

EXAMPLES: Final = """
mp heal --from /backup/models/.mp     # another store, which may be read-only
mp heal --from ./math --verify        # a checkpoint; reads all of this store first
"""


def command(
    source: Annotated[
        Path, typer.Option("--from", metavar="PATH", help="Another store, or a checkpoint: a folder or a file.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of this store first, to know all that is damaged.")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Put back what is damaged or lost, from a copy or a checkpoint.

    Looks for what `mp verify` found damaged, and for objects whose file is gone or cut. What is taken is checked
    against its id, so it does not matter whose it was; the other store is only read. Ends with exit code 5 where
    something is still missing.
    """
    from mergepipe.store.heal import heal

    with open_store(store) as opened, progress_bar(quiet=json) as progress:
        report = heal(opened, source, verify_first=verify, progress=progress)
    if json:
        say_json(_as_json(report))
    else:
        _print(report, source, verified=verify)
    if report.missing:
        raise typer.Exit(DamagedError.exit_code)


def _as_json(report: HealReport) -> dict[str, object]:
    return {
        "source": report.source,
        "healed": [
            {"id": each.id.hex(), "kind": each.kind.name.lower(), "stored_bytes": each.stored_bytes}
            for each in report.healed
        ],
        "missing": [{"id": each.id.hex(), "kind": _kind(each.kind), "reason": each.reason} for each in report.missing],
        "refused": [{"id": each.id.hex(), "reason": each.reason} for each in report.refused],
    }


def _kind(kind: object) -> str:
    return str(getattr(kind, "name", "unknown")).lower()


def _print(report: HealReport, source: Path, *, verified: bool) -> None:
    for each in report.healed:
        say(f"{paint('healed', 'green')}   {each.kind.name.lower()} {each.id.short}")
    for refused in report.refused:
        say(f"{paint('refused', 'yellow')}  {refused.id.short}: {refused.reason}")
    for broken in report.missing:
        say(f"{paint('missing', 'red')}  {_kind(broken.kind)} {broken.id.short}: {broken.reason}")
    if not report.healed and not report.missing:
        say("nothing is damaged or missing" + ("" if verified else ", as far as is known (--verify reads everything)"))
        return
    written = format_size(sum(each.stored_bytes for each in report.healed))
    say(f"{plural(len(report.healed), 'object')} healed from {source}, {written} written")
    if report.missing:
        note(f"hint: {plural(len(report.missing), 'object')} still missing: try another --from.")
        note("hint: `mp verify` says which refs need them; ingesting the same checkpoints again also repairs them.")
