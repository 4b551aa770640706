"""A plan as the commands that look need it: its head, read from the record that a commit names, without the engine.

The engine's own reader (:mod:`mergepipe.merge.plan_file`) checks every field of a stranger's file, and loads what
computes. Here the bytes come from the store, under the id that the commit names: a field that is not as the engine
writes it means a damaged store, or a plan of another format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from mergepipe.store.canonical import load_strict
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, DamagedError
from mergepipe.store.frame import Kind

if TYPE_CHECKING:
    from mergepipe.store.store import Store

FORMAT: Final = 2
Parameters: TypeAlias = Mapping[str, float | bool]
Values: TypeAlias = Mapping[str, tuple[float | bool, ...]]
"""Parameters with all values that some tensor is merged with, ascending."""


@dataclass(frozen=True, slots=True)
class ModelHead:
    """One model of a plan. ``kind``: model, adapter (which goes onto ``onto``, None: the base) or task_vector.

    ``parameters``: its own, as the plan's head has them; ``values``: as the tensors have them.
    """

    commit: Digest
    name: str
    kind: str
    onto: Digest | None
    parameters: Parameters
    values: Values

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "commit": self.commit.hex(),
            "kind": self.kind,
            "onto": self.onto.hex() if self.onto else None,
            "parameters": dict(self.parameters),
        }


@dataclass(frozen=True, slots=True)
class PlanHead:
    """What a plan says as a whole. ``settings``: how many sets of parameters its tensors are merged with.

    ``preview_blocks`` and ``exact_blocks``: how many previews and blocks of the experts are read, each counted for
    every expert that has it.
    """

    id: Digest
    method: str
    method_version: int
    parameters: Parameters
    values: Values
    base: ModelHead
    based: bool
    experts: tuple[ModelHead, ...]
    settings: int
    dtype: str | None
    budget_bytes: int | None
    costs: Mapping[str, int]
    bound: Mapping[str, float | None]
    preview_blocks: int = 0
    exact_blocks: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether the result is the full merge."""
        return not self.bound["absolute"]

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id.hex(),
            "method": self.method,
            "method_version": self.method_version,
            "parameters": dict(self.parameters),
            "base": self.base.as_json(),
            "based": self.based,
            "experts": [expert.as_json() for expert in self.experts],
            "settings": self.settings,
            "dtype": self.dtype,
            "budget_bytes": self.budget_bytes,
            "preview_blocks": self.preview_blocks,
            "exact_blocks": self.exact_blocks,
            "costs": dict(self.costs),
            "bound": dict(self.bound),
        }


def read_plan_record(store: Store, plan: Digest) -> dict[str, Any]:
    """A plan's JSON value; raises DamagedError where it cannot be read."""
    try:
        value = load_strict(store.reader.read_record(Kind.PLAN, plan), f"plan {plan.short}")
    except BadInputError as error:
        raise DamagedError(error.message, hint="`mp verify` lists what is damaged.") from error
    if not isinstance(value, dict):
        raise DamagedError(f"plan {plan.short} is not a plan", hint="`mp verify` lists what is damaged.")
    return value


def plan_file_text(value: Mapping[str, Any]) -> str:
    """The plan as a file: the same text as ``mp plan -o`` writes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_plan_head(store: Store, plan: Digest) -> PlanHead:
    """What a plan says as a whole; raises DamagedError where it cannot be read, or is of another format."""
    value = read_plan_record(store, plan)
    if value.get("format") != FORMAT:
        raise DamagedError(
            f"plan {plan.short} is of format {value.get('format')!r}, and this mp reads {FORMAT}",
            hint="Look at it with the mp that made it, or make the merge again.",
        )
    try:
        return _head(plan, value)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DamagedError(f"plan {plan.short} is not a plan ({error})") from error


def _head(plan: Digest, value: dict[str, Any]) -> PlanHead:
    everyone = list(range(1, len(value["experts"]) + 1))
    own = [model["parameters"] for model in value["experts"]]
    settings = [{"experts": everyone, "parameters": value["parameters"], "own": own}, *value["variants"]]
    used = sorted({int(tensor["setting"]) for tensor in value["tensors"].values()}) if value["complete"] else [0]
    merged = [settings[number] for number in used if settings[number]["experts"]] or settings[:1]
    return PlanHead(
        id=plan,
        method=str(value["method"]),
        method_version=int(value["method_version"]),
        parameters=dict(value["parameters"]),
        values=_values([setting["parameters"] for setting in merged]),
        base=_model(value["base"], []),
        based=bool(value["based"]),
        experts=tuple(
            _model(model, list(_own(merged, number)) or [model["parameters"]])
            for number, model in enumerate(value["experts"], 1)
        ),
        settings=len(merged),
        dtype=None if value["dtype"] is None else str(value["dtype"]),
        budget_bytes=None if value["budget_bytes"] is None else int(value["budget_bytes"]),
        costs={str(name): int(number) for name, number in value["costs"].items()},
        bound={str(name): None if size is None else float(size) for name, size in value["bound"].items()},
        preview_blocks=sum(_blocks(tensor.get("previews", ())) for tensor in value["tensors"].values()),
        exact_blocks=sum(_blocks(tensor["reads"]) for tensor in value["tensors"].values()),
    )


def _blocks(lists: Sequence[str]) -> int:
    """How many blocks all these lists of ranges name, such as ``0-2,5``."""
    total = 0
    for part in (part for text in lists if text for part in text.split(",")):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def _own(settings: Sequence[dict[str, Any]], number: int) -> Iterator[Parameters]:
    """What each of these settings gives one expert."""
    for setting in settings:
        for expert, parameters in zip(setting["experts"], setting["own"], strict=True):
            if expert == number:
                yield parameters


def _model(value: dict[str, Any], given: Sequence[Parameters]) -> ModelHead:
    return ModelHead(
        commit=Digest.parse(value["commit"]),
        name=str(value["name"]),
        kind=str(value["kind"]),
        onto=Digest.parse(value["onto"]) if value["onto"] is not None else None,
        parameters=dict(value["parameters"]),
        values=_values(given),
    )


def _values(given: Sequence[Parameters]) -> Values:
    found: dict[str, set[float | bool]] = {}
    for parameters in given:
        for name, value in parameters.items():
            found.setdefault(name, set()).add(value)
    return {name: tuple(sorted(values)) for name, values in found.items()}
