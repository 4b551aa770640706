"""``mp merge``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption
from mergepipe.cli.plan import (
    AllowMissingOption,
    BudgetOption,
    ExactOnlyOption,
    MaxErrorOption,
    RecipeArgument,
    store_for,
)
from mergepipe.cli.plan_summary import as_json as plan_as_json
from mergepipe.cli.plan_summary import summary_lines
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural, seconds_text
from mergepipe.cli.terminal import note, paint, say, say_json
from mergepipe.store.errors import BadInputError, UsageError
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.merge.audit import Audit
    from mergepipe.merge.executor import MergeResult
    from mergepipe.merge.explain import Reading
    from mergepipe.merge.plan import Plan
    from mergepipe.store.parallel import Progress
    from mergepipe.store.store import Store

EXAMPLES: Final = """
mp merge recipe.yml --as merged/v1
mp merge recipe.yml --as merged/v1 --budget 10% --audit
mp merge --plan p.json --as merged/v1
mp merge --plan p.json --as merged/v1 --message "a third of math"
mp merge --plan p.json --dry-run
"""


def command(
    recipe: RecipeArgument = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="A plan, as `mp plan` wrote it.")] = None,
    name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="The ref that points at the result.")] = None,
    message: Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="Why; the log shows it.")] = "",
    budget: BudgetOption = None,
    max_error: MaxErrorOption = None,
    exact_only: ExactOnlyOption = False,
    allow_missing: AllowMissingOption = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute every block, also those that an earlier merge has.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the plan and show it; merge nothing.")] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="Then read everything, and measure the true deviation beside the bound.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Where tiles are merged: cpu; by torch: cuda, torch-cpu.")
    ] = "cpu",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Merge: carry out a recipe or a plan; the result is a commit.

    Reads what the plan names and nothing else; the bytes are measured, and more than the budget is a failure, not a
    warning. Blocks that no expert changes are referred to, blocks that were computed before are not computed again:
    a merge that was interrupted goes on where it stopped.
    """
    from mergepipe.merge.budget import parse_budget

    plans = {
        "--budget": budget,
        "--max-error": max_error,
        "--exact-only": exact_only or None,
        "--allow-missing": allow_missing or None,
    }
    _check_given(recipe, plan, name, dry_run, plans)
    limits = parse_budget(budget, max_error)
    with store_for(recipe, store) as opened, progress_bar(quiet=json) as progress:
        if not dry_run and _is_new(opened, name or ""):
            _load_kernels()
        if dry_run:
            planned, reading = _planned(opened, recipe, plan, limits, allow_missing, exact_only, progress)
            done: list[tuple[Plan, MergeResult]] = []
        else:
            done = _merge(
                opened, recipe, plan, name or "", limits, progress,
                message=message, allow_missing=allow_missing, exact_only=exact_only, use_cache=not no_cache,
                device=device,
            )  # fmt: skip
        audits = [_audit(opened, found, progress) for found, _ in done] if audit else []
    if dry_run:
        _show_plan(planned, reading, json=json)
    else:
        _show(done, audits, json=json)


def _is_new(store: Store, name: str) -> bool:
    """Whether there is something to compute, as far as the ref's name tells: it is not there yet."""
    from mergepipe.store.refs import find_ref

    with store.catalog.reading() as view:
        return find_ref(view, name) is None


def _load_kernels() -> None:
    """Load the compiled kernels while the merge is being planned; whoever needs them waits for them."""
    from importlib import import_module
    from threading import Thread

    Thread(target=import_module, args=("mergepipe.merge.tile_kernels",), daemon=True).start()


def _check_given(
    recipe: Path | None, plan: Path | None, name: str | None, dry_run: bool, limits: dict[str, Any]
) -> None:
    if (recipe is None) == (plan is None):
        raise UsageError("name a recipe or --plan FILE, one of them", hint="mp merge recipe.yml --as NAME")
    if name is None and not dry_run:
        raise UsageError("--as NAME is missing: the ref that points at the result", hint="Add --as merged/v1")
    given = [option for option, value in limits.items() if value is not None]
    if plan is not None and given:
        raise UsageError(f"{given[0]} belongs to `mp plan`, and a plan is fixed", hint="Make another plan.")


def _planned(
    store: Store, recipe: Path | None, plan: Path | None, limits: Any, allow_missing: bool, exact_only: bool,
    progress: Progress | None,
) -> tuple[Plan, Reading]:  # fmt: skip
    from mergepipe.merge.explain import reading
    from mergepipe.merge.recipes import plan_last
    from mergepipe.merge.validate import check_plan

    if recipe is None:
        assert plan is not None
        found = check_plan(store, _read_plan(plan)).plan
        return found, reading(store, found)
    checked, notes = plan_last(
        store, recipe, limits, allow_missing=allow_missing, previews=not exact_only, progress=progress
    )
    for text in notes:
        note(text)
    return checked.plan, reading(store, checked.plan)


def _read_plan(path: Path) -> Plan:
    from mergepipe.merge.plan_file import read_plan

    try:
        return read_plan(path)
    except BadInputError as error:
        hint = error.hint or "A plan is what `mp plan … -o p.json` writes. A recipe goes without --plan."
        raise BadInputError(error.message, hint=hint) from error


def _merge(
    store: Store, recipe: Path | None, plan: Path | None, name: str, limits: Any, progress: Progress | None, *,
    message: str, allow_missing: bool, exact_only: bool, use_cache: bool, device: str,
) -> list[tuple[Plan, MergeResult]]:  # fmt: skip
    from mergepipe.merge.executor import execute
    from mergepipe.merge.recipes import merge_recipe

    if recipe is None:
        assert plan is not None
        found = _read_plan(plan)
        options = {"message": message, "use_cache": use_cache, "progress": progress, "device": device}
        return [(found, execute(store, found, name, **options))]  # type: ignore[arg-type]
    done, notes = merge_recipe(
        store, recipe, name, limits, message=message, allow_missing=allow_missing, previews=not exact_only,
        use_cache=use_cache, progress=progress, device=device,
    )  # fmt: skip
    for text in notes:
        note(text)
    return done


def _audit(store: Store, plan: Plan, progress: Progress | None) -> Audit:
    from mergepipe.merge.audit import audit

    return audit(store, plan, progress)


def _show_plan(plan: Plan, reading: Reading, *, json: bool) -> None:
    if json:
        say_json(plan_as_json(plan, reading))
        return
    for line in summary_lines(plan, reading):
        say(line)


def _show(done: list[tuple[Plan, MergeResult]], audits: list[Audit], *, json: bool) -> None:
    if json:
        values = [{**asdict(result), "commit": result.commit.hex(), "plan": result.plan.hex()} for _, result in done]
        for value, found in zip(values, audits, strict=False):
            value["audit"] = {**asdict(found), "relative": found.relative, "holds": found.holds}
        say_json({**values[-1], "earlier": values[:-1]} if len(values) > 1 else values[0])
        return
    for number, (_, result) in enumerate(done):
        for line in _lines(result):
            say(line)
        if audits:
            say(_audit_line(audits[number]))


def _audit_line(found: Audit) -> str:
    if not found.bound:
        return "  audited    nothing was left out: the deviation is 0"
    within = "within" if found.holds else paint("OVER", "red")
    return (
        f"  audited    {found.deviation:.4g} (L2) from the full merge, {found.relative:.2%} of its true update; "
        f"{within} the bound of {found.bound:.4g} (likely {found.estimate:.4g}); read {format_size(found.read_bytes)}"
    )


def _lines(result: MergeResult) -> list[str]:
    head = f"{paint(result.ref, 'green')}  {paint(result.commit.short, 'yellow')}"
    budget = f" of {format_size(result.budget_bytes)} allowed" if result.budget_bytes is not None else ""
    state = "as it was" if result.unchanged else f"{format_size(result.written_bytes)} written"
    return [
        f"{head}  {state}, {seconds_text(result.elapsed_seconds)}, {format_size(result.peak_memory_bytes)} of memory",
        f"  read {format_size(result.expert_bytes_read)} of the experts{budget}, "
        f"{format_size(result.base_bytes_read)} of the base",
        f"  {plural(result.computed_blocks, 'block')} computed, {result.cached_blocks:,} known from before, "
        f"{result.referenced_blocks:,} the base's own",
    ]
