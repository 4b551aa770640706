"""``mp verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural
from mergepipe.cli.terminal import note, paint, say, say_json
from mergepipe.store.errors import DamagedError
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.check import VerifyReport

EXAMPLES: Final = """
mp verify
mp verify merged/v1                   # only what this ref needs
mp verify --fast                      # sizes and headers alone
mp verify --resume                    # after an interruption
"""


def command(
    ref: Annotated[
        str | None,
        typer.Argument(metavar="[REF]", help="Check only what this commit needs.", autocompletion=complete_ref),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Look at sizes and headers alone.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a check was interrupted.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Check every byte of the store against its id.

    Ends with exit code 5 where something is damaged, and says which refs and tensors need it. Damage is
    remembered: ingesting the same checkpoint again repairs it, and `mp analyze REF --previews` damaged previews.
    """
    from mergepipe.store.check import verify

    with open_store(store) as opened, progress_bar(quiet=json) as progress:
        report = verify(opened, ref, fast=fast, resume=resume, progress=progress)
    if json:
        say_json(_as_json(report))
    else:
        _print(report, fast=fast)
    if report.damaged:
        raise typer.Exit(DamagedError.exit_code)


def _as_json(report: VerifyReport) -> dict[str, object]:
    return {
        "objects": report.objects,
        "skipped": report.skipped,
        "checked_bytes": report.checked_bytes,
        "elapsed_seconds": report.elapsed_seconds,
        "damaged": [
            {"id": each.id.hex(), "kind": each.kind, "reason": each.reason, "used_by": list(each.used_by)}
            for each in report.damaged
        ],
    }


def _print(report: VerifyReport, *, fast: bool) -> None:
    looked = f"{plural(report.objects, 'object')}, {format_size(report.checked_bytes)}"
    if report.elapsed_seconds > 1 and not fast:
        looked += f" at {format_size(round(report.checked_bytes / report.elapsed_seconds))}/s"
    if report.skipped:
        looked += f" ({report.skipped:,} were looked at before the interruption)"
    if not report.damaged:
        say(f"{looked}: all as they should be" + (" (sizes and headers; contents were not read)" if fast else ""))
        return
    for damage in report.damaged:
        say(f"{paint('damaged', 'red')}  {damage.kind} {damage.id.short}: {damage.reason}")
        for user in damage.used_by:
            say(f"         needed by {user}")
    say(f"{looked}: {plural(len(report.damaged), 'object')} damaged")
    kinds = {damage.kind == "preview" for damage in report.damaged}
    if False in kinds:
        note("hint: Ingest the same checkpoints again: what is damaged is then written anew.")
    if True in kinds:
        note("hint: `mp analyze REF --previews` makes damaged previews anew.")
