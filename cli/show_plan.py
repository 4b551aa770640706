"""The plan of a merge in a few lines, read from the record that the commit points at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergepipe.store.canonical import load_strict
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError
from mergepipe.store.frame import Kind
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.store import Store


def read_plan_summary(store: Store, plan: Digest) -> dict[str, Any]:
    """What a plan says as a whole; its tensors are counted, not listed. Raises DamagedError."""
    value = load_strict(store.reader.read_record(Kind.PLAN, plan), f"plan {plan.short}")
    if not isinstance(value, dict):
        raise BadInputError(f"plan {plan.short}: not a plan")
    kept = {name: item for name, item in value.items() if name != "tensors"}
    return {"id": plan.hex(), **kept, "computed_tensors": len(value.get("tensors", ()))}


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The summary for people."""
    costs, bound = plan.get("costs", {}), plan.get("bound", {})
    lines = [f"plan      {plan['id'][:12]}: {plan.get('method')}{_parameters(plan.get('parameters'))}"]
    lines += [
        f"          expert {model.get('name')}{_parameters(model.get('parameters'))}"
        for model in plan.get("experts", ())
    ]
    if "expert_bytes" in costs:
        budget = plan.get("budget_bytes")
        allowed = f", {format_size(budget)} allowed" if isinstance(budget, int) else ""
        lines.append(
            f"          reads {format_size(costs['expert_bytes'])} of the experts' "
            f"{format_size(costs['expert_bytes_full'])}{allowed}; computes {costs['computed_blocks']:,} blocks "
            f"in {plan['computed_tensors']:,} tensors, keeps {costs['referenced_blocks']:,}"
        )
    if "relative" in bound:
        lines.append(f"          at most {bound['relative']:.1%} away from the merge that reads everything")
    return lines


def _parameters(values: Any) -> str:
    if not isinstance(values, dict) or not values:
        return ""
    return " (" + ", ".join(f"{name} {value:g}" for name, value in values.items()) + ")"
