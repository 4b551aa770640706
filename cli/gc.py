"""``mp gc``."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, open_store
from mergepipe.cli.tables import plural
from mergepipe.cli.terminal import say, say_json
from mergepipe.store.errors import UsageError
from mergepipe.store.sizes import format_size

EXAMPLES: Final = """
mp gc --previews                      # says what would be freed
mp gc --previews --apply
mp analyze math code --previews       # makes them again, the very same
"""


def command(
    previews: Annotated[bool, typer.Option("--previews", help="Drop all previews; no weights are lost.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else it is only said what would be freed.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Free disk space: drop the previews, which can be made again.

    Says what would be freed, and frees it with --apply alone. Plans that were made with previews cannot be carried
    out without them: `mp analyze REF --previews` makes them again. Nothing else can be dropped so far: commits, and
    the blocks that no ref needs any more, stay.
    """
    from mergepipe.store.drop_previews import drop_previews, plan_removal

    if not previews:
        raise UsageError(
            "only previews can be dropped so far; commits and their blocks all stay",
            hint="`mp gc --previews` says how much that would free.",
        )
    with open_store(store) as opened:
        found = drop_previews(opened) if apply else plan_removal(opened)
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
