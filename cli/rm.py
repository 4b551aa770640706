"""``mp rm``."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store
from mergepipe.cli.terminal import paint, say, say_json
from mergepipe.store.commits import default_author
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import require_ref

EXAMPLES: Final = """
mp rm experts/old
mp rm merged/try-1 merged/try-2
mp branch experts/old 3fa9c1d2        # it is back; `mp log --reflog` has the id
"""


def command(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Branches or tags.", autocompletion=complete_ref)
    ],
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Remove refs; what they stood for stays in the store.

    Commits and blocks are kept, and so is the ref's log: `mp branch NAME ID` brings a removed ref back.
    """
    with open_store(store) as opened:
        with opened.catalog.reading() as view:
            found = [require_ref(view, name) for name in dict.fromkeys(names)]
        author = default_author()
        updates = [RefUpdate(ref.name, ref.commit, None, ref.kind, "rm", author) for ref in found]
        publish(opened.catalog, None, Changes(refs=updates))
    if json:
        say_json([{"ref": ref.name, "type": ref.kind, "commit": ref.commit.hex()} for ref in found])
        return
    for ref in found:
        say(f"removed {ref.kind} {paint(ref.name, 'green')}, which was at {paint(ref.commit.short, 'yellow')}")
    say("What they stood for stays in the store. To have it back:")
    for ref in found:
        say(f"  mp {ref.kind} {ref.name} {ref.commit.short}")
