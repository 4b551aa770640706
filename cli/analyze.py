"""``mp analyze``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural
from mergepipe.cli.terminal import paint, say, say_json
from mergepipe.store.errors import BadInputError, UsageError
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.analyze import Analysis
    from mergepipe.store.snapshot import Snapshot
    from mergepipe.store.store import Store

EXAMPLES: Final = """
mp analyze math --previews            # as `mp ingest --previews` would have done
mp analyze math code --base Qwen3-0.6B
"""


class _Model(NamedTuple):
    """A model, what it is compared with, and how that is named."""

    ref: str
    snapshot: Snapshot
    base: Snapshot
    base_name: str


def command(
    refs: Annotated[
        list[str], typer.Argument(metavar="REF...", help="Models, by their refs.", autocompletion=complete_ref)
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="REF",
            help="What to compare them with (default: the base that each was stored against).",
            autocompletion=complete_ref,
        ),
    ] = None,
    previews: Annotated[bool, typer.Option("--previews", help="Make the previews that are missing as well.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what ingest did not: statistics, and previews.

    Both are of models against their base. Reads the tensors of which something is missing, once, and nothing where
    all is known. Statistics are what plans are made from; `mp plan` makes those that it lacks by itself. Previews are
    a coarse look at every block for about 8% of its bytes, and let a budget go further. A preview that `mp verify`
    found damaged is made anew.
    """
    from mergepipe.store.analyze import Analysis, analyze, lacking, level_for

    done: list[tuple[_Model, Analysis]] = []
    with open_store(store) as opened:
        models = [_model(opened, ref, base) for ref in dict.fromkeys(refs)]
        with progress_bar(quiet=json) as progress:
            for model in models:
                pairs = lacking(opened, model.base, model.snapshot, previews=previews)
                level = level_for(opened, model.base, model.snapshot) if previews and pairs else None
                found = analyze(opened, pairs, progress, previews=level) if pairs else Analysis()
                done.append((model, found))
    if json:
        say_json([_as_json(model, found) for model, found in done])
        return
    for model, found in done:
        say(f"{paint(model.ref, 'green')}  against {model.base_name}: {_text(found, previews=previews)}")


def _model(store: Store, ref: str, base: str | None) -> _Model:
    """A model with its base; raises UsageError or BadInputError where they cannot be compared."""
    snapshot = store.snapshot(ref)
    if "adapter_config.json" in snapshot.files:
        raise UsageError(
            f"{ref!r} is an adapter: it has no tensors that could be compared with a base's",
            hint="There is nothing to measure before it is merged, and it takes few bytes itself.",
        )
    if base is not None:
        found, name = store.snapshot(base), base
    else:
        parent = snapshot.commit.parent("base")
        if parent is None:
            raise UsageError(
                f"{ref!r} was stored without a base, so there is nothing to compare it with",
                hint=f"Name one: mp analyze {ref} --base REF",
            )
        found, name = store.snapshot_of(parent.commit), parent.name or parent.commit.short
    if not snapshot.tensors.keys() & found.tensors.keys():
        raise BadInputError(
            f"none of the {len(snapshot.tensors)} tensors of {ref!r} is in the base {name!r}",
            hint="Name the base that it was trained from with --base REF.",
        )
    return _Model(ref, snapshot, found, name)


def _as_json(model: _Model, found: Analysis) -> dict[str, object]:
    return {
        "ref": model.ref,
        "commit": model.snapshot.commit_id.hex(),
        "base": model.base_name,
        "tensors": found.tensors,
        "raw_bytes": found.read_bytes,
        "read_bytes": found.stored_bytes,
        "previews": found.previews,
        "preview_bytes": found.preview_bytes,
        "previewed_bytes": found.previewed_bytes,
    }


def _text(found: Analysis, *, previews: bool) -> str:
    if not found.tensors:
        return "nothing was missing, nothing was read"
    text = f"{plural(found.tensors, 'tensor')} measured, {format_size(found.stored_bytes)} read"
    if not previews:
        return text
    if not found.previews:
        return f"{text}; no previews: there would have been nothing to gain"
    share = f", {found.preview_bytes / found.previewed_bytes:.1%} of their blocks" if found.previewed_bytes else ""
    return f"{text}; {plural(found.previews, 'preview')} made: {format_size(found.preview_bytes)}{share}"
