"""``mp du``."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store
from mergepipe.cli.tables import Cell, Row, plural, print_table
from mergepipe.cli.terminal import say, say_json
from mergepipe.store.refs import require_ref
from mergepipe.store.sizes import format_size
from mergepipe.store.usage import usage

EXAMPLES: Final = """
mp du
mp du math code
mp du --json
"""


def command(
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Show these refs alone.", autocompletion=complete_ref)
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Show what the store takes on disk, and which ref holds it.

    logical: the model as it came. stored: its objects as they lie on disk, with the base blocks that its
    differences need. alone: what no other ref needs as well, and so what `mp rm` could make free. previews: of its
    blocks, which are counted apart; `mp gc --previews` drops all of them.
    """
    with open_store(store) as opened:
        if refs:
            with opened.catalog.reading() as view:
                for name in refs:
                    require_ref(view, name)
        found = usage(opened)
        if refs:
            found = replace(found, refs=tuple(ref for ref in found.refs if ref.ref in refs))
    if json:
        say_json(asdict(found))
        return
    rows: list[Row] = [
        [
            Cell(ref.ref, "green"),
            format_size(ref.logical_bytes),
            format_size(ref.stored_bytes),
            format_size(ref.alone_bytes),
            format_size(ref.preview_bytes) if ref.previews else "",
        ]
        for ref in found.refs
    ]
    if rows:
        print_table(["ref", "logical", "stored", "alone", "previews"], rows, right="logical stored alone previews")
    if refs:
        return
    say()
    ratio = f", {found.logical_bytes / found.stored_bytes:.1f} times less" if found.stored_bytes else ""
    say(f"logical       {format_size(found.logical_bytes)} in {plural(len(found.refs), 'ref')}")
    say(f"deduplicated  {format_size(found.unique_bytes)}")
    say(f"stored        {format_size(found.stored_bytes)} in {plural(found.objects, 'object')}{ratio}")
    if found.previews:
        of_these = f"{format_size(found.preview_bytes)} of that in {plural(found.previews, 'preview')}"
        whole = found.previewed_bytes
        part = f", {found.preview_bytes / whole:.1%} of {format_size(whole)} in their blocks" if whole else ""
        say(f"previews      {of_these}{part}")
