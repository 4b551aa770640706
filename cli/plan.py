"""``mp plan``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_or_make_store, open_store
from mergepipe.cli.plan_summary import as_json, summary_lines
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.terminal import note, say, say_json
from mergepipe.store.errors import UsageError

if TYPE_CHECKING:
    from mergepipe.merge.checked import CheckedPlan
    from mergepipe.merge.curve import Sweep
    from mergepipe.merge.method import Value
    from mergepipe.merge.plan import Plan
    from mergepipe.store.store import Store

EXAMPLES: Final = """
mp plan recipe.yml -o p.json
mp plan recipe.yml --budget 10% -o p.json
mp plan recipe.yml --budget 10% --exact-only -o p.json
mp plan recipe.yml --curve                                   # what each budget would give
mp plan recipe.yml --curve --png curve.png
mp plan --base Qwen3-0.6B --expert math:0.6 --expert code:0.4 --method ties --density 0.3 --budget 10% -o p.json
mp plan --expert math --expert code --method linear -o p.json
mp plan --base Qwen3-0.6B --expert math:0.6,density=0.2 --expert code:0.4 --method ties --max-error 0.2 -o p.json
mp plan --base Qwen3-0.6B --expert my-lora:0.7 --expert tv:1,as=task_vector --method task_arithmetic -o p.json
"""

RecipeArgument = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="A mergekit recipe (YAML), in place of --base and the rest.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", metavar="SIZE|SHARE", help="Most expert bytes to read: 2GiB, or 10% of a full read."),
]
MaxErrorOption = Annotated[
    float | None, typer.Option("--max-error", help="Read as little as keeps the relative bound below this.")
]
ExactOnlyOption = Annotated[
    bool, typer.Option("--exact-only", help="Read blocks whole or not at all: no previews in their place.")
]
AllowMissingOption = Annotated[
    bool, typer.Option("--allow-missing", help="Merge each tensor from the models that have it.")
]


def command(
    recipe: RecipeArgument = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="REF", help="What the experts are added to.", autocompletion=complete_ref),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option("--expert", metavar="REF[:WEIGHT]", help="A model to merge; repeat it. REF:0.6,density=0.2 too."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="How to merge: `mp methods` lists them.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of each tensor's changes to keep (ties, dare_ties, …).")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="Another of the method's parameters; repeat it."),
    ] = None,
    budget: BudgetOption = None,
    max_error: MaxErrorOption = None,
    exact_only: ExactOnlyOption = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="TYPE", help="Element type of the result (default: the base's).")
    ] = None,
    allow_missing: AllowMissingOption = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write the plan.")
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Show what budgets from 0.5% to 100% would give, and make no plan.")
    ] = False,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="With --curve: also draw it into this file.")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Decide what a merge will read, before anything is read.

    The plan fixes the inputs by their ids, the method, which blocks of which expert are read, what that costs, and
    how far the result can be from the merge that reads everything. `mp merge --plan FILE` does exactly that.
    Statistics that the store does not have yet are made first, once. Models that a recipe names by their folders
    are ingested. Where the experts have previews (`mp ingest --previews`), a budget is spent on these too: a coarse
    look at many blocks mostly says more than a full look at few.
    """
    from mergepipe.merge.budget import parse_budget
    from mergepipe.merge.explain import reading

    limits = parse_budget(budget, max_error)
    given = {"--base": base, "--expert": expert, "--method": method, "--density": density, "--param": param}
    given["--dtype"] = dtype
    _check_given(recipe, given)
    _check_curve(curve, png, {"--budget": budget, "--max-error": max_error, "--output": output})
    if curve:
        from mergepipe.merge.curve import EVERYTHING

        limits = EVERYTHING
    with store_for(recipe, store) as opened, progress_bar(quiet=json) as progress:
        checked: CheckedPlan | None = None
        notes: list[str] = []
        if recipe is not None:
            from mergepipe.merge.recipes import plan_last

            checked, notes = plan_last(
                opened, recipe, limits, allow_missing=allow_missing, previews=not exact_only, progress=progress
            )
            plan = checked.plan
        else:
            from mergepipe.merge.build import parse_expert, plan_merge

            plan = plan_merge(
                opened, base, [parse_expert(text) for text in expert or []], method or "",
                parameters=_parameters(density, param or []), budget=limits, dtype=dtype,
                allow_missing=allow_missing, previews=not exact_only, progress=progress, notes=notes,
            )  # fmt: skip
        for text in notes:
            note(text)
        if curve:
            found = _sweep(opened, plan, checked, exact_only=exact_only)
        else:
            levels = reading(opened, plan)
    if curve:
        from mergepipe.cli.curve import show_curve

        show_curve(found, plan, png, json=json)
        return
    if output is not None:
        _write(plan, output)
    if json:
        say_json(as_json(plan, levels))
        return
    for line in summary_lines(plan, levels):
        say(line)
    if output is not None:
        say(f"written to {output}: mp merge --plan {output} --as NAME")
    else:
        note("The plan was not kept: write it with -o p.json.")


@contextmanager
def store_for(recipe: Path | None, option: Path | None) -> Iterator[Store]:
    """The store; a recipe may begin one, which goes again where nothing could be stored."""
    opened, is_new = open_or_make_store(option) if recipe is not None else (open_store(option), False)
    with opened:
        try:
            if is_new:
                note(f"made a store in {opened.layout.root}")
            yield opened
        except BaseException:
            if is_new:
                opened.discard_if_empty()
            raise


def _check_given(recipe: Path | None, given: Mapping[str, object]) -> None:
    """Either a recipe, or what replaces one."""
    named = [name for name, value in given.items() if value not in (None, [])]
    if recipe is not None and named:
        raise UsageError(f"{named[0]} and a recipe exclude each other", hint="Write it into the recipe.")
    if recipe is None and not given["--method"]:
        raise UsageError("name a recipe, or --method and --expert", hint="`mp plan --help` shows both.")


def _check_curve(curve: bool, png: Path | None, others: Mapping[str, object]) -> None:
    """A curve is of all budgets, and no plan."""
    if not curve:
        if png is not None:
            raise UsageError("--png draws a curve, and needs --curve", hint="Write: mp plan … --curve --png FILE")
        return
    named = [name for name, value in others.items() if value is not None]
    if named:
        raise UsageError(f"{named[0]} and --curve exclude each other", hint="First the curve, then a plan.")
    if png is not None:
        from mergepipe.cli.curve import check_drawing

        check_drawing()


def _sweep(store: Store, plan: Plan, checked: CheckedPlan | None, *, exact_only: bool) -> Sweep:
    from mergepipe.merge.curve import facts_for_sweep, sweep

    facts, method = facts_for_sweep(store, plan) if checked is None else (checked.facts, checked.method)
    return sweep(facts, method, previews=not exact_only)


def _parameters(density: float | None, settings: list[str]) -> dict[str, Value]:
    from mergepipe.merge.build import parse_value

    found: dict[str, Value] = {} if density is None else {"density": density}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--param {setting!r} is not NAME=VALUE", hint="Write it as in --param lambda=0.9")
        found[name.strip()] = parse_value(value, f"--param {setting}")
    return found


def _write(plan: Plan, output: Path) -> None:
    from mergepipe.store.filesystem import explain_os_error

    try:
        plan.write(output)
    except OSError as error:
        raise explain_os_error(error, f"writing the plan to {output}") from error
