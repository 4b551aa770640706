"""``mp tag``."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from mergepipe.cli.naming import list_refs, set_ref
from mergepipe.cli.options import JsonOption, StoreOption, complete_ref

EXAMPLES: Final = """
mp tag                                # list them
mp tag v1.0 merged/v1
"""


def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The tag to make.")] = None,
    ref: Annotated[
        str | None,
        typer.Argument(metavar="[REF]", help="The commit that it shall stand for.", autocompletion=complete_ref),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List tags, or make one; tags do not move.

    A tag stands for one commit for good: neither ingest nor merge can move it, only `mp rm` takes it away.
    """
    if name is None:
        list_refs(store, "tag", as_json=json)
    else:
        set_ref(store, name, ref, "tag", force=False, as_json=json)
