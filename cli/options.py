"""What several commands take: arguments and options by their types, and how the store is found and opened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from mergepipe.cli.chosen import chosen_store
from mergepipe.store.errors import NotFoundError
from mergepipe.store.layout import STORE_DIRECTORY, find_store
from mergepipe.store.store import Store

STORE_HELP: Final = "The store, or the folder that holds it (also: MP_STORE). Else the nearest .mp/ upwards."


def complete_ref(incomplete: str) -> list[str]:
    """Refs that begin so, for the shell's completion; none where there is no store."""
    from mergepipe.store.refs import all_refs

    try:
        with open_store(None) as store, store.catalog.reading() as view:
            return [ref.name for ref in all_refs(view) if ref.name.startswith(incomplete)]
    except Exception:  # whatever is wrong, a shell that completes a word is not the place to say so
        return []


StoreOption = Annotated[Path | None, typer.Option("--store", metavar="DIR", help=STORE_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, and nothing else.")]
RefArgument = Annotated[
    str,
    typer.Argument(metavar="REF", help="A ref, an id's beginning, REF~2, REF@{1}.", autocompletion=complete_ref),
]


def open_store(option: Path | None) -> Store:
    """Open the store that was asked for, else the nearest; raises NotFoundError."""
    return Store.open(chosen_store(option))


def store_directory(folder: Path) -> Path:
    """Where a new store for ``folder`` lies: ``folder/.mp``, unless that is its own name."""
    return folder if folder.name.endswith(STORE_DIRECTORY) else folder / STORE_DIRECTORY


def open_or_make_store(option: Path | None) -> tuple[Store, bool]:
    """The store that was asked for, or the nearest, or a new one in the working directory; and whether it is new.

    Raises:
        NotFoundError: a store was asked for, and is not there.
    """
    asked = chosen_store(option)
    if asked is not None or find_store() is not None:
        return Store.open(asked), False
    return Store.create(store_directory(Path.cwd())), True


def split_path(text: str) -> tuple[str, str]:
    """``REF:path`` as ref and path; the path is '' where there is none."""
    ref, _, path = text.partition(":")
    if not ref:
        raise NotFoundError(f"{text!r} names no ref", hint="Write REF or REF:tensor.")
    return ref, path
