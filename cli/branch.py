"""``mp branch``."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from mergepipe.cli.naming import list_refs, set_ref
from mergepipe.cli.options import JsonOption, StoreOption, complete_ref

EXAMPLES: Final = """
mp branch                             # list them
mp branch experts/math math           # one more name for what math is now
mp branch experts/math math~1 --force # move it one commit back
"""


def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The branch to make.")] = None,
    ref: Annotated[
        str | None,
        typer.Argument(metavar="[REF]", help="The commit that it shall point at.", autocompletion=complete_ref),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Move it where it exists.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List branches, or make one.

    A branch is a name that moves: ingest and merge move it to each new commit.
    """
    if name is None:
        list_refs(store, "branch", as_json=json)
    else:
        set_ref(store, name, ref, "branch", force=force, as_json=json)
