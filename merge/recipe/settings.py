"""Parameters as recipes write them: a value, a gradient over the layers, or rules that pick by a tensor's name.

A setting is a tuple of rules, and the first whose filter the tensor's name contains decides. A rule holds one value, or
a gradient: numbers interpolate linearly over ``t``, which goes from 0 to 1 over a slice's layers; booleans and text
step. Where no rule matches, the next scope is asked; where none is left, the recipe has not set the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mergepipe.merge.method import Value
from mergepipe.merge.recipe.fields import fields, kind_of, mapping, required, text
from mergepipe.merge.recipe.nodes import Entries, Items, Node, Place, Scalar, shown

_FORM: Final = "Write a value, a list of values (a gradient), or a list of {filter: …, value: …}."
_LONGEST_NUMBER: Final = 100


@dataclass(frozen=True, slots=True)
class Rule:
    """``values`` for tensors whose name contains ``filter``; None and ``*`` match all. A tuple is a gradient."""

    filter: str | None
    values: Value | tuple[Value, ...]

    def matches(self, tensor_name: str) -> bool:
        if self.filter is None or self.filter == "*":
            return True
        return bool(tensor_name) and self.filter in tensor_name


@dataclass(frozen=True, slots=True)
class Setting:
    """What one scope says of one parameter, and where it says so."""

    place: Place
    rules: tuple[Rule, ...]


Settings = Mapping[str, Setting]
"""One scope: settings by the parameter's name."""


def evaluate(setting: Setting, tensor_name: str, t: float) -> Value | None:
    """The value for a tensor at ``t`` in [0, 1], or None where the setting says nothing of it.

    The first rule that matches decides, even where its gradient is empty and it decides nothing.
    """
    for rule in setting.rules:
        if rule.matches(tensor_name):
            return _along(rule.values, t) if isinstance(rule.values, tuple) else rule.values
    return None


def _along(values: tuple[Value, ...], t: float) -> Value | None:
    if not values:
        return None
    position = t * (len(values) - 1)
    index = int(position)
    here, after = values[index], values[min(len(values) - 1, index + 1)]
    if isinstance(here, (bool, str)) or isinstance(after, (bool, str)):
        return here
    share = position - index
    return (1 - share) * here + share * after


def resolve(names: Iterable[str], scopes: Iterable[Settings], tensor_name: str, t: float) -> dict[str, Value]:
    """The parameters that the scopes set for a tensor, the most specific scope first. Unset ones are left out."""
    scopes = tuple(scopes)
    found: dict[str, Value] = {}
    for name in names:
        for scope in scopes:
            value = evaluate(scope[name], tensor_name, t) if name in scope else None
            if value is not None:
                found[name] = value
                break
    return found


def read_settings(node: Node | None) -> dict[str, Setting]:
    """The settings of one ``parameters`` mapping; raises BadInputError."""
    if node is None:
        return {}
    entries = mapping(node, "parameters", "Write `name: value` lines under it.").entries
    return {name: Setting(entry.place, _rules(name, entry.node)) for name, entry in entries.items()}


def _rules(name: str, node: Node) -> tuple[Rule, ...]:
    if isinstance(node, Entries):
        return (_rule(name, node),)
    if isinstance(node, Items) and any(isinstance(item, Entries) for item in node.items):
        return tuple(_rule(name, item) for item in node.items)
    return (Rule(None, _values(name, node)),)


def _rule(name: str, node: Node) -> Rule:
    found = fields(node, f"a rule of {shown(name)}", ("filter", "value"))
    value = required(found, "value", f"a rule of {shown(name)}", node.place)
    return Rule(_filter(name, found.get("filter")), _values(name, value))


def _filter(name: str, node: Node | None) -> str | None:
    if node is None:
        return None
    if isinstance(node, Scalar) and node.value == "":
        return ""  # which every name contains
    return text(node, f"a filter of {shown(name)}")


def _values(name: str, node: Node) -> Value | tuple[Value, ...]:
    if not isinstance(node, Items):
        return _value(name, node)
    values = tuple(_value(name, item) for item in node.items)
    kinds = {_kind(value) for value in values}
    if len(kinds) > 1:
        raise node.place.error(
            f"the gradient of {shown(name)} mixes {' and '.join(sorted(kinds))}", "Give values of one kind."
        )
    return values


def _kind(value: Value) -> str:
    if isinstance(value, bool):
        return "booleans"
    return "text" if isinstance(value, str) else "numbers"


def _value(name: str, node: Node) -> Value:
    if not isinstance(node, Scalar) or node.value is None:
        raise node.place.error(f"{shown(name)} is {kind_of(node)}, which is no value of a parameter", _FORM)
    value = _number(node.value) if isinstance(node.value, str) else node.value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isfinite(value):
        raise node.place.error(f"{shown(name)} is {kind_of(node)}, not a finite number", "Give a finite number.")
    return value


def _number(value: str) -> Value:
    """The number that text spells (YAML 1.1 takes ``1e-3`` for text), or the text itself."""
    if len(value) > _LONGEST_NUMBER or not value.isascii() or "_" in value:
        return value
    try:
        return float(value)
    except ValueError:
        return value
