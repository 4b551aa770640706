"""What is computed: methods, budgets, plans and their execution.

The names are imported when they are asked for: listing the methods loads neither the engine nor a compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mergepipe.merge.budget import Budget, parse_budget
    from mergepipe.merge.build import Expert, parse_expert, plan_merge
    from mergepipe.merge.executor import MergeResult, execute
    from mergepipe.merge.plan import Plan
    from mergepipe.merge.plan_file import decode_plan, read_plan

__all__ = [
    "Budget",
    "Expert",
    "MergeResult",
    "Plan",
    "decode_plan",
    "execute",
    "parse_budget",
    "parse_expert",
    "plan_merge",
    "read_plan",
]
_HOMES: Final = {
    "budget": ("Budget", "parse_budget"),
    "build": ("Expert", "parse_expert", "plan_merge"),
    "executor": ("MergeResult", "execute"),
    "plan": ("Plan",),
    "plan_file": ("decode_plan", "read_plan"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mergepipe.merge.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
