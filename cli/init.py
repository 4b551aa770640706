"""``mp init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from mergepipe.cli.chosen import chosen_store
from mergepipe.cli.options import JsonOption, StoreOption, store_directory
from mergepipe.cli.terminal import say, say_json
from mergepipe.store.sizes import format_size, parse_size
from mergepipe.store.store import Store

EXAMPLES: Final = """
mp init                               # in ./.mp
mp init /models                       # in /models/.mp
mp init --catalog /var/tmp/catalog    # objects here (also on NFS), the catalog on a local disk
"""


def command(
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="The folder to put .mp/ into.")] = None,
    block_size: Annotated[
        str, typer.Option("--block-size", metavar="SIZE", help="What blocks of weights aim at: a power of two.")
    ] = "2MiB",
    catalog: Annotated[
        Path | None, typer.Option("--catalog", metavar="DIR", help="Keep the catalog here, on a local disk.")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Make an empty store.

    A store is one folder, .mp/, that holds everything. `mp ingest` makes one by itself where none is found.
    """
    folder = directory or chosen_store(store) or Path.cwd()
    root = store_directory(folder)
    with Store.create(root, block_bytes=parse_size(block_size), catalog=catalog) as made:
        layout = made.layout
    if json:
        say_json({"store": str(root), "block_bytes": layout.block_bytes, "catalog": str(layout.catalog)})
        return
    say(f"made a store in {root}, with blocks of {format_size(layout.block_bytes)}")
