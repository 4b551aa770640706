"""The plan of a merge in words: a line for ``mp log``, and for ``mp show`` its summary beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Final

from mergepipe.cli.plan_head import ModelHead, PlanHead, Values
from mergepipe.cli.tables import Cell, Row, plural, seconds_text
from mergepipe.store.sizes import format_size

Measured = Mapping[str, int | float]
# What is counted: the name, the plan's counter, the commit's.
_COUNTERS: Final = (
    ("expert bytes", "expert_bytes", "expert_bytes_read"),
    ("base bytes", "base_bytes", "base_bytes_read"),
    ("bytes written", "", "written_bytes"),
    ("blocks computed", "computed_blocks", "computed_blocks"),
    ("blocks known from before", "", "cached_blocks"),
    ("blocks referred to", "referenced_blocks", "referenced_blocks"),
    ("time", "", "elapsed_seconds"),
)


def default_message(plan: PlanHead) -> str:
    """What the engine writes as the commit's message where the user gives none."""
    experts = [_weighted(expert, head=True) for expert in plan.experts]
    together = " and ".join([", ".join(experts[:-1]), experts[-1]] if len(experts) > 1 else experts)
    return f"{plan.method} of {together}" + (f" on {plan.base.name}" if plan.based else "")


def origin_line(plan: PlanHead) -> str:
    """``ties of math:0.6, code:0.4 on base · 10% of 5.1 GiB read · bound 3.1e-3``.

    The share and the bound stand there where something was left out, or could have been.
    """
    weights = any("weight" in expert.values for expert in plan.experts)
    method = plan.method + ("" if weights else _in_brackets(plan.values))
    parts = [f"{method} of {', '.join(_weighted(expert) for expert in plan.experts)}"]
    if plan.based:
        parts[0] += f" on {one_line(plan.base.name)}"
    full = plan.costs["expert_bytes_full"]
    if plan.budget_bytes is not None or plan.bound["update"] is not None:
        if full:
            parts.append(f"{percent(plan.costs['expert_bytes'] / full)} of {format_size(full)} read")
        parts.append("equal to the full merge" if plan.is_exact else f"bound {scientific(plan.bound['relative'])}")
    return " · ".join(parts)


def summary_rows(plan: PlanHead) -> list[Row]:
    """The plan's method, models and certificate, as rows of two columns."""
    rows: list[Row] = [
        ["plan", Cell(plan.id.hex(), "yellow")],
        ["method", f"{plan.method}, version {plan.method_version}{_in_brackets(plan.values)}"],
        ["models", f"base {_model(plan.base)}{'' if plan.based else ' (only to compare the experts with)'}"],
        *(["", f"expert {_model(expert)}{_in_brackets(expert.values)}"] for expert in plan.experts),
    ]
    if plan.settings > 1:
        rows.append(["settings", f"{plan.settings:,} sets of parameters, each for a part of the model"])
    if plan.dtype is not None:
        rows.append(["type", plan.dtype])
    if plan.budget_bytes is not None:
        rows.append(["budget", f"{format_size(plan.budget_bytes)} of the experts"])
    rows.append(["reads", _reads(plan)])
    return [*rows, *_bound(plan)]


def cost_rows(plan: PlanHead, measured: Measured) -> list[Row]:
    """What the plan foresaw beside what was measured; counters that neither has are left out."""
    rows: list[Row] = []
    for name, planned, counter in _COUNTERS:
        cells = [_amount(counter, plan.costs.get(planned)), _amount(counter, measured.get(counter))]
        if any(cells):
            rows.append([name, *cells])
    return rows


def again_lines(plan: PlanHead, ref: str) -> list[str]:
    """How to carry the plan out once more."""
    return [
        f"run it again:  mp show {quote(ref)} --plan -o {plan.id.short}.json",
        f"               mp merge --plan {plan.id.short}.json --as NAME",
    ]


def percent(part: float) -> str:
    """``10%``, ``0.42%``: three digits at most."""
    return f"{100 * part:.3g}%"


def scientific(value: float | None) -> str:
    """``3.1e-3``; ``unknown`` for None."""
    if value is None:
        return "unknown"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def one_line(name: str) -> str:
    """A name from a plan, which is any text, without line breaks."""
    return " ".join(name.split()) if not name.isprintable() else name


def _weighted(expert: ModelHead, *, head: bool = False) -> str:
    """``math:0.6``, ``math:0.2..0.8``, ``math``; ``head``: with the weight that the plan's head says."""
    own = expert.parameters.get("weight")
    weights = (() if own is None else (own,)) if head else expert.values.get("weight", ())
    name = expert.name if head else one_line(expert.name)
    return f"{name}:{_range(weights)}" if weights else name


def _model(model: ModelHead) -> str:
    kind = "" if model.kind == "model" else f", {model.kind.replace('_', ' ')}"
    onto = f" on {model.onto.short}" if model.onto is not None else ""
    return f"{one_line(model.name)}  {model.commit.short}{kind}{onto}"


def _in_brackets(values: Values) -> str:
    """`` (weight 0.6, density 0.3)``; nothing where there are none."""
    names = sorted(values, key=lambda name: (name != "weight", name))
    return f" ({', '.join(f'{name} {_range(values[name])}' for name in names)})" if names else ""


def _range(values: Sequence[float | bool]) -> str:
    """``0.6``, ``0.2..0.8``, ``true``, ``false or true``."""
    shown = [("true" if value else "false") if isinstance(value, bool) else f"{value:g}" for value in values]
    if len(shown) == 1:
        return shown[0]
    return " or ".join(shown) if isinstance(values[0], bool) else f"{shown[0]}..{shown[-1]}"


def _reads(plan: PlanHead) -> str:
    read, full = plan.costs["expert_bytes"], plan.costs["expert_bytes_full"]
    if not full:
        return "nothing: no expert differs from the base"
    reads = f"{format_size(read)} of the experts' {format_size(full)}, {percent(read / full)}"
    if not plan.preview_blocks:
        return reads
    return f"{reads}: {plural(plan.preview_blocks, 'block')} as previews, {plan.exact_blocks:,} exact"


def _bound(plan: PlanHead) -> list[Row]:
    if plan.is_exact:
        return [["bound", "equal to the merge that reads everything"]]
    absolute, update, estimate = (plan.bound[name] or 0.0 for name in ("absolute", "update", "estimate"))
    return [
        [
            "bound",
            f"at most {absolute:.4g} (L2) from the full merge, {scientific(plan.bound['relative'])} of its update",
        ],
        ["", f"likely {estimate:.4g}, {scientific(estimate / update if update else 0.0)} of its update"],
    ]


def _amount(counter: str, value: int | float | None) -> str:
    if value is None:
        return ""
    if counter.endswith("seconds"):
        return seconds_text(value)
    return format_size(int(value)) if "bytes" in counter else f"{value:,}"


def measured_text(name: str, value: int | float) -> str:
    """Any other counter of a commit."""
    if "bytes" in name and isinstance(value, int):
        return format_size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
