"""``mp export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, RefArgument, StoreOption, open_store
from mergepipe.cli.plan_head import plan_file_text, read_plan_record
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural, seconds_text
from mergepipe.cli.terminal import note, say, say_json
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, DamagedError
from mergepipe.store.sizes import format_size, parse_size

if TYPE_CHECKING:
    from mergepipe.store.export import ExportResult
    from mergepipe.store.snapshot import Snapshot
    from mergepipe.store.store import Store

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
    no_card: Annotated[
        bool, typer.Option("--no-card", help="Of a merge: write no README.md and no mergepipe_plan.json of its own.")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Write a commit out again as safetensors.

    What came in as safetensors comes out byte for byte, with all other files of its folder. A merge gets a model
    card (README.md, in the place of its base's) that says what was merged, and its plan (mergepipe_plan.json). DIR
    appears only when it is whole, and is never overwritten without --force.
    """
    size = parse_size(max_shard_size) if max_shard_size is not None else None
    with open_store(store) as opened:
        snapshot = opened.snapshot(ref)
        made = {} if no_card else _made_files(opened, snapshot, ref, dtype)
        options = {"force": force, "max_shard_bytes": size, "dtype": dtype, "extra_files": made, "leave_out": made}
        with progress_bar(quiet=json) as progress:
            result = snapshot.export(directory, **options, progress=progress)
    if json:
        say_json(_as_json(ref, snapshot.commit_id, result))
    else:
        say(_line(result))


def _made_files(store: Store, snapshot: Snapshot, ref: str, dtype: str | None) -> dict[str, bytes]:
    """A merge's model card and its plan; none of what was ingested, or where the plan cannot be read."""
    plan = snapshot.commit.plan
    if plan is None:
        return {}
    from mergepipe.merge.card import CARD, PLAN_FILE, model_card
    from mergepipe.merge.plan_file import decode_plan

    try:
        text = plan_file_text(read_plan_record(store, plan)).encode()
        decoded = decode_plan(text, f"plan {plan.short}")
    except (BadInputError, DamagedError) as error:
        note(f"There is no {CARD} of the merge: {error.message}")
        return {}
    card = model_card(snapshot.commit_id, snapshot.commit, decoded, title=ref, files=snapshot.files.keys(), dtype=dtype)
    return {CARD: card.encode(), PLAN_FILE: text}


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
