"""A plan that holds in a store, with what was found out to say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergepipe.merge.facts import Facts
from mergepipe.merge.inputs import Model
from mergepipe.merge.method import Method
from mergepipe.merge.plan import Plan


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """A plan, just made or checked, with its costs as they are in this store, its models, and what is known of its
    tensors."""

    plan: Plan
    method: Method
    models: Sequence[Model]
    facts: Facts
