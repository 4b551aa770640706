"""A plan in a few lines, and as scripts read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergepipe.cli.tables import plural
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.merge.explain import Reading
    from mergepipe.merge.plan import Plan


def as_json(plan: Plan, reading: Reading) -> dict[str, object]:
    """The plan's costs and certificate. ``reading``: what of the experts is read, and at which level."""
    return {
        "plan": plan.id.hex(),
        "method": plan.method,
        "experts": [item.name for item in plan.experts],
        "budget_bytes": plan.budget_bytes,
        **plan.costs.as_json(),
        **reading.as_json(),
        "bound": plan.bound.as_json(),
    }


def summary_lines(plan: Plan, reading: Reading) -> list[str]:
    """The plan for people."""
    from mergepipe.merge.executor import describe

    costs = plan.costs
    budget = f" (budget {format_size(plan.budget_bytes)})" if plan.budget_bytes is not None else ""
    reads = f"{format_size(costs.expert_bytes)} of the experts' {format_size(costs.expert_bytes_full)}"
    part = f"{_part(costs.expert_bytes, costs.expert_bytes_full)}{budget}{_levels(reading)}"
    variants = f", {plural(len(plan.variants), 'set')} of parameters" if len(plan.variants) > 1 else ""
    return [
        f"plan {plan.id.short}: {describe(plan)}{variants}",
        f"  reads      {reads}, {part}; {format_size(costs.base_bytes)} of the base",
        f"  computes   {plural(costs.computed_blocks, 'block')}, refers to {costs.referenced_blocks:,} as they are",
        *_bound_lines(plan),
    ]


def _part(read: int, full: int) -> str:
    """``10%``, ``0.5%``, ``10.2%``."""
    return f"{100 * read / full:.3g}%" if full else "nothing to read"


def _levels(reading: Reading) -> str:
    """``: 9.1 MiB as previews of 1,204 blocks, 3.2 MiB as 40 exact blocks``; nothing where no preview is read."""
    if not reading.preview_blocks:
        return ""
    previews = f"{format_size(reading.preview_bytes)} as previews of {plural(reading.preview_blocks, 'block')}"
    return f": {previews}, {format_size(reading.exact_bytes)} as {plural(reading.exact_blocks, 'exact block')}"


def _bound_lines(plan: Plan) -> list[str]:
    bound = plan.bound
    if bound.update is None or bound.absolute == 0:
        return ["  certified  equal to the merge that reads everything"]
    relative = bound.estimate / bound.update if bound.update else 0.0
    lines = [
        f"  certified  within {bound.absolute:.4g} (L2) of the full merge, {bound.relative:.1%} of its update",
        f"  likely     {bound.estimate:.4g} from it, {relative:.1%}: an estimate, no proof",
    ]
    if any(setting.parameters.get("exact") is False for setting in plan.settings):
        lines.append("  thresholds at the catalog's resolution, in both (--param exact=true reads all experts once)")
    return lines
