"""What is computed: methods, budgets, plans and their execution."""

from mergepipe.merge.budget import Budget, parse_budget
from mergepipe.merge.build import Expert, parse_expert, plan_merge
from mergepipe.merge.executor import MergeResult, execute
from mergepipe.merge.plan import Plan, decode_plan, read_plan

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
