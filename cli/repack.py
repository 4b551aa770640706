"""``mp repack``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural
from mergepipe.cli.terminal import note, paint, say, say_json
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.repack import Repacked

EXAMPLES: Final = """
mp repack                             # says what could be saved
mp repack math --base Qwen3-0.6B --apply
mp repack --apply                     # all refs; can be stopped, and goes on where it stopped
"""


def command(
    refs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REF...]", help="Models, by their refs (default: all).", autocompletion=complete_ref),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="REF",
            help="What they differ from (default: the base that the commit names, else one that resembles them).",
            autocompletion=complete_ref,
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else it is only said what would be saved.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Measure every block for that, not a sample.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Store blocks in fewer bytes; ids and contents stay the same.

    Above all, models that came in without --base although their base is in the store: their blocks become
    differences to it. Each new file is read back before it takes the old one's place. Nobody else may be writing
    meanwhile. Plans that were made before may cost other bytes: make them again.
    """
    from mergepipe.store.repack import measure, models_to_repack, repack

    with open_store(store) as opened, progress_bar(quiet=json) as progress:
        models = models_to_repack(opened, refs or (), base)
        if apply:
            results = repack(opened, models, progress)
        else:
            results = measure(opened, models, full=full, progress=progress)
    if json:
        say_json({"applied": apply, "saved_bytes": _saved(results), "models": [_as_json(each) for each in results]})
        return
    for result in results:
        say(_line(result, apply=apply))
    _say_total(results, apply=apply)


def _saved(results: list[Repacked]) -> int:
    return sum(result.saved_bytes for result in results)


def _as_json(result: Repacked) -> dict[str, object]:
    model = result.model
    return {
        "ref": model.ref,
        "commit": model.snapshot.commit_id.hex(),
        "base": model.base_name or None,
        "blocks": result.blocks,
        "measured": result.measured,
        "replaced": result.replaced,
        "before_bytes": result.before_bytes,
        "after_bytes": result.after_bytes,
        "saved_bytes": result.saved_bytes,
        "estimate": result.is_estimate,
        "unreadable": result.unreadable,
        "left": result.left,
    }


def _line(result: Repacked, *, apply: bool) -> str:
    model = result.model
    against = f" against {model.base_name} ({model.why})" if model.base is not None else ""
    about = "about " if result.is_estimate else ""
    if result.replaced:
        sizes = f"{format_size(result.before_bytes)} {'became' if apply else 'would become'} {about}"
        text = f"{about}{plural(result.replaced, 'block')}, {sizes}{format_size(result.after_bytes)}"
    else:
        text = "nothing to gain"
    if result.left:
        text += f"; {plural(result.left, 'block')} left as they were: somebody began to rely on them"
    return f"{paint(model.ref, 'green')}{against}: {text}"


def _say_total(results: list[Repacked], *, apply: bool) -> None:
    saved = _saved(results)
    if not results:
        say("there are no refs")
    elif apply:
        say(f"{format_size(saved)} saved")
    elif saved:
        about = "about " if any(result.is_estimate for result in results) else ""
        say(f"{about}{format_size(saved)} would be saved. Nothing was changed. To do it: the same with --apply")
    unreadable = sum(result.unreadable for result in results)
    if unreadable:
        note(f"hint: {plural(unreadable, 'block')} could not be read. `mp verify` says more.")
