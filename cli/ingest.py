"""``mp ingest``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_or_make_store
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural, seconds_text, share
from mergepipe.cli.terminal import note, paint, say, say_json
from mergepipe.store.errors import DamagedError, UsageError
from mergepipe.store.refs import find_ref, load_commit, ref_name_for
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.ingest import IngestResult
    from mergepipe.store.store import Store

EXAMPLES: Final = """
mp ingest ./Qwen3-0.6B
mp ingest ./math ./code --base Qwen3-0.6B
mp ingest ./math ./code --base Qwen3-0.6B --previews
mp ingest ./math --base auto --message "second epoch"
mp ingest ./lora-chat --base Qwen3-0.6B --ref adapters/chat
"""


def command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Model folders, adapter folders, .safetensors, .bin or .pt files."),
    ],
    ref: Annotated[
        str | None, typer.Option("--ref", metavar="NAME", help="The ref to move (default: the folder's name).")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="REF|auto",
            help="What they were trained from: differences are stored. auto: find it.",
            autocompletion=complete_ref,
        ),
    ] = None,
    previews: Annotated[
        bool,
        typer.Option(
            "--previews/--no-previews",
            help="Keep a coarse form of every difference too, for at most 8% more bytes: a budget then buys a look at "
            "every block instead of a few blocks whole. Needs --base. Not made by default.",
        ),
    ] = False,
    message: Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="Why; the log shows it.")] = "",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Store checkpoints; experts as differences from their base.

    Takes Hugging Face folders (sharded or not, with every other file in them), PEFT adapter folders, single
    .safetensors files, and PyTorch files (weights only: no code in them is run). Each becomes a commit that
    its ref points at. Several given together are all stored, or none. What is in the store already is not
    written again.
    """
    if previews and base is None:
        raise UsageError(
            "previews are of differences, and there is no base to differ from",
            hint="Name the base with --base REF (or --base auto), or leave --previews out.",
        )
    options = {"base": base, "ref": ref, "message": message, "previews": previews}
    results = _ingest(store, paths, options, quiet=json)
    for result in results:
        for text in result.notes:
            note(f"note: {text}")
    if json:
        say_json([_as_json(result) for result in results])
        return
    for result in results:
        say(_line(result))


def _ingest(where: Path | None, paths: Sequence[Path], options: dict[str, Any], *, quiet: bool) -> list[IngestResult]:
    """Ingest into the store that was asked for, or a new one, which goes again where nothing could be stored."""
    opened, is_new = open_or_make_store(where)
    with opened:
        try:
            if is_new:
                note(f"made a store in {opened.layout.root}")
            if options["base"] is None:
                with suppress(DamagedError):  # a suggestion is no reason to fail
                    _suggest(opened, paths, options["ref"])
            with progress_bar(quiet=quiet) as progress:
                return opened.ingest(paths, **options, progress=progress)
        except BaseException:
            if is_new:
                opened.discard_if_empty()
            raise


def _suggest(store: Store, paths: Sequence[Path], ref: str | None) -> None:
    """Say which base a checkpoint seems to have, with the command that would have used it."""
    from mergepipe.store.suggest import suggest_base

    for path in paths:
        found = None if _has_base(store, ref or ref_name_for(path)) else suggest_base(store, path, ref)
        if found is not None:
            words = ["mp", "ingest", str(path), *(["--ref", ref] if ref else []), "--base", found.ref]
            note(f"{path} looks like a fine-tune of {found.ref}: {found.reason}.")
            note(f"To store only the differences, stop here (Ctrl-C) and run: {shlex.join(words)}")


def _has_base(store: Store, ref: str) -> bool:
    """Whether what the ref stands for was ingested against a base already."""
    with store.catalog.reading() as view:
        found = find_ref(view, ref)
        return found is not None and load_commit(view, found.commit).parent("base") is not None


def _as_json(result: IngestResult) -> dict[str, object]:
    return {
        "ref": result.ref,
        "commit": result.commit.hex(),
        "tensors": result.tensors,
        "blocks": result.blocks,
        "raw_bytes": result.raw_bytes,
        "stored_bytes": result.stored_bytes,
        "written_bytes": result.written_bytes,
        "reused_blocks": result.reused_blocks,
        "elapsed_seconds": result.elapsed_seconds,
        "unchanged": result.unchanged,
        "previews": result.previews,
        "preview_bytes": result.preview_bytes,
        "notes": list(result.notes),
    }


def _line(result: IngestResult) -> str:
    head = f"{paint(result.ref, 'green')}  {paint(result.commit.short, 'yellow')}"
    content = f"{format_size(result.raw_bytes)} in {plural(result.tensors, 'tensor')}"
    coarse = ""
    if result.previews:
        coarse = f"; {plural(result.previews, 'preview')} made, {format_size(result.preview_bytes)}"
        coarse += f" ({share(result.preview_bytes, result.raw_bytes)})" if result.raw_bytes else ""
    if result.unchanged:
        repaired = f"; {format_size(result.written_bytes)} that were damaged written anew"
        return f"{head}  {content}: as it was{repaired if result.written_bytes else ', nothing to write'}{coarse}"
    blocks = plural(result.blocks, "block")
    shared = share(result.reused_blocks, result.blocks)
    known = f"{blocks}, {shared} of them known already" if result.reused_blocks else blocks
    new = f"{format_size(result.written_bytes)} written"
    if result.raw_bytes:
        new += f" ({share(result.written_bytes, result.raw_bytes)})"
    return f"{head}  {content}, {known}: {new}, {seconds_text(result.elapsed_seconds)}{coarse}"
