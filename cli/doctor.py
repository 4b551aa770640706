"""``mp doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import typer

from mergepipe.cli.chosen import chosen_store
from mergepipe.cli.options import JsonOption, StoreOption
from mergepipe.cli.tables import plural
from mergepipe.cli.terminal import paint, say, say_json

if TYPE_CHECKING:
    from mergepipe.store.doctor import Examination

EXAMPLES: Final = """
mp doctor
mp doctor --store /backup/models/.mp --json
"""
_STYLES: Final = {"ok": "green", "warning": "yellow", "problem": "red"}


def command(store: StoreOption = None, json: JsonOption = False) -> None:
    """Look at the store and the machine, and say what may go wrong.

    Filesystems, space, permissions, the catalog, what writers left behind, object files against the catalog (for ten
    seconds at most), versions and limits. Contents are not read: `mp verify` does that. Works on a read-only disk, and
    where the catalog cannot be opened. Ends with exit code 0 where nothing is a problem, and 5 where something is
    damaged.
    """
    from mergepipe.store.doctor import examine

    found = examine(chosen_store(store))
    if json:
        say_json(_as_json(found))
    else:
        _print(found)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def _as_json(found: Examination) -> dict[str, object]:
    return {
        "store": str(found.store) if found.store is not None else None,
        "findings": [
            {"check": each.check, "level": each.level.value, "text": each.text, "advice": each.advice or None}
            for each in found.findings
        ],
    }


def _print(found: Examination) -> None:
    width = max(len(each.check) for each in found.findings)
    for each in found.findings:
        level = each.level.value
        say(f"{paint(level, _STYLES[level])}{' ' * (7 - len(level))}  {each.check.ljust(width)}  {each.text}")
        if each.advice:
            say(f"{' ' * (7 + 2 + width + 2)}{paint(each.advice, 'dim')}")
    problems = sum(each.level.value == "problem" for each in found.findings)
    warnings = sum(each.level.value == "warning" for each in found.findings)
    say(f"{plural(problems, 'problem')}, {plural(warnings, 'warning')}")
