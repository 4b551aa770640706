"""``mp export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, RefArgument, StoreOption, open_store
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural, seconds_text
from mergepipe.cli.terminal import say, say_json
from mergepipe.store.digest import Digest
from mergepipe.store.sizes import format_size, parse_size

if TYPE_CHECKING:
    from mergepipe.store.export import ExportResult

EXAMPLES: Final = """
mp export merged/v1 ./out
mp export merged/v1 ./out --force --max-shard-size 2GB
mp export math ./math-f32 --dtype float32
"""


def command(
    ref: RefArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace DIR where it exists.")] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="SIZE", help="Lay the tensors out anew, in files up to this size."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help="Convert floating-point tensors: float32, bfloat16, float16, ..."),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Write a commit out again as safetensors.

    What came in as safetensors comes out byte for byte, with all other files of its folder. DIR appears only
    when it is whole, and is never overwritten without --force.
    """
    size = parse_size(max_shard_size) if max_shard_size is not None else None
    with open_store(store) as opened:
        snapshot = opened.snapshot(ref)
        with progress_bar(quiet=json) as progress:
            result = snapshot.export(directory, force=force, max_shard_bytes=size, dtype=dtype, progress=progress)
    if json:
        say_json(_as_json(ref, snapshot.commit_id, result))
    else:
        say(_line(result))


def _as_json(ref: str, commit: Digest, result: ExportResult) -> dict[str, object]:
    return {
        "ref": ref,
        "commit": commit.hex(),
        "directory": str(result.directory),
        "files": result.files,
        "written_bytes": result.written_bytes,
        "identical": result.identical,
        "elapsed_seconds": result.elapsed_seconds,
    }


def _line(result: ExportResult) -> str:
    written = f"{plural(result.files, 'file')}, {format_size(result.written_bytes)}"
    same = ", identical to what came in" if result.identical else ""
    return f"{result.directory}: {written}{same}, {seconds_text(result.elapsed_seconds)}"
