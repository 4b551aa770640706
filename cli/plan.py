"""``mp plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, complete_ref, open_store
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural, share
from mergepipe.cli.terminal import note, say, say_json
from mergepipe.store.errors import UsageError
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.merge.method import Value
    from mergepipe.merge.plan import Plan

EXAMPLES: Final = """
mp plan --base Qwen3-0.6B --expert math:0.6 --expert code:0.4 --method ties --density 0.3 --budget 10% -o p.json
mp plan --base Qwen3-0.6B --expert math --expert code --method linear -o p.json
mp plan --base Qwen3-0.6B --expert math:0.6,density=0.2 --expert code:0.4 --method ties --max-error 0.2 -o p.json
"""


def command(
    base: Annotated[
        str, typer.Option("--base", metavar="REF", help="What the experts are added to.", autocompletion=complete_ref)
    ],
    expert: Annotated[
        list[str],
        typer.Option("--expert", metavar="REF[:WEIGHT]", help="A model to merge; repeat it. REF:0.6,density=0.2 too."),
    ],
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="linear, task_arithmetic or ties.")],
    density: Annotated[
        float | None, typer.Option("--density", help="Share of each tensor's largest changes to keep (ties).")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="Another of the method's parameters; repeat it."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="SIZE|SHARE", help="Most expert bytes to read: 2GiB, or 10% of a full read."),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Read as little as keeps the relative bound below this.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="TYPE", help="Element type of the result (default: the base's).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write the plan.")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Decide what a merge will read, before anything is read.

    The plan fixes the inputs by their ids, the method, which blocks of which expert are read, what that costs, and
    how far the result can be from the merge that reads everything. `mp merge --plan FILE` does exactly that.
    Statistics that the store does not have yet are made first, once.
    """
    from mergepipe.merge.budget import parse_budget
    from mergepipe.merge.build import parse_expert, plan_merge

    parameters = _parameters(density, param or [])
    experts = [parse_expert(text) for text in expert]
    with open_store(store) as opened, progress_bar(quiet=json) as progress:
        plan = plan_merge(
            opened,
            base,
            experts,
            method,
            parameters=parameters,
            budget=parse_budget(budget, max_error),
            dtype=dtype,
            progress=progress,
        )
    if output is not None:
        _write(plan, output)
    if json:
        say_json(as_json(plan))
        return
    for line in summary_lines(plan):
        say(line)
    if output is not None:
        say(f"written to {output}: mp merge --plan {output} --as NAME")
    else:
        note("The plan was not kept: write it with -o p.json.")


def as_json(plan: Plan) -> dict[str, object]:
    """The plan's costs and certificate, as scripts read them."""
    return {
        "plan": plan.id.hex(),
        "budget_bytes": plan.budget_bytes,
        "expert_bytes": plan.costs.expert_bytes,
        "expert_bytes_full": plan.costs.expert_bytes_full,
        "base_bytes": plan.costs.base_bytes,
        "computed_blocks": plan.costs.computed_blocks,
        "referenced_blocks": plan.costs.referenced_blocks,
        "bound": {"absolute": plan.bound.absolute, "relative": plan.bound.relative, "update": plan.bound.update},
    }


def summary_lines(plan: Plan) -> list[str]:
    """The plan for people."""
    costs = plan.costs
    experts = ", ".join(f"{item.name}:{float(item.parameters['weight']):g}" for item in plan.experts)
    budget = f" (budget {format_size(plan.budget_bytes)})" if plan.budget_bytes is not None else ""
    reads = f"{format_size(costs.expert_bytes)} of the experts' {format_size(costs.expert_bytes_full)}"
    part = share(costs.expert_bytes, costs.expert_bytes_full) if costs.expert_bytes_full else "nothing to read"
    return [
        f"plan {plan.id.short}: {plan.method} of {experts} on {plan.base.name}",
        f"  reads      {reads}, {part}{budget}; {format_size(costs.base_bytes)} of the base",
        f"  computes   {plural(costs.computed_blocks, 'block')}, refers to {costs.referenced_blocks:,} as they are",
        _bound_line(plan),
    ]


def _bound_line(plan: Plan) -> str:
    bound = plan.bound
    if bound.absolute == 0:
        return "  certified  equal to the merge that reads everything"
    loose = "; a loose bound, as signs are elected" if plan.method == "ties" else ""
    return f"  certified  within {bound.absolute:.4g} (L2) of the full merge, {bound.relative:.1%} of its update{loose}"


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
