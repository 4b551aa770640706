"""Harm done to JSON: one change somewhere, as a person or a fuzzer would make it."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]
_numbers = st.one_of(
    st.integers(-2, 5), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([2**63, 10**400, 1e308, -0.0])
)
_texts = st.one_of(st.text(max_size=6), st.sampled_from(["0", "0-3", "0-4294967295", "3-1", "0,1", "F32", "ties"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), _numbers, _texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)


def paths_of(value: Any, path: Path = ()) -> list[Path]:
    """Where there is something in a JSON value, from the outside in."""
    inner: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(found for key, item in inner for found in paths_of(item, (*path, key)))]


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def with_change(value: Any, path: Path, new: Any) -> Any:
    """A copy with another value at one place."""
    if not path:
        return new
    changed = copy.deepcopy(value)
    at(changed, path[:-1])[path[-1]] = new
    return changed


def without(value: Any, path: Path) -> Any:
    """A copy without what is at one place."""
    changed = copy.deepcopy(value)
    del at(changed, path[:-1])[path[-1]]
    return changed


@st.composite
def mutated_json(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON text with one value replaced, removed, repeated or moved; or with one byte that is another."""
    path = draw(st.sampled_from(paths_of(value)[1:]))
    kind = draw(st.sampled_from(["replace", "replace", "remove", "copy", "nudge", "add", "byte", "cut"]))
    if kind == "remove":
        value = without(value, path)
    elif kind == "copy":
        value = with_change(value, path, at(value, draw(st.sampled_from(paths_of(value)))))
    elif kind == "nudge" and isinstance(at(value, path), int | float):
        value = with_change(value, path, at(value, path) + draw(st.sampled_from([1, -1, 0.5, 1e-6])))
    elif kind == "add" and isinstance(at(value, path), dict):
        value = with_change(value, (*path, draw(st.text(max_size=4))), draw(values))
    elif kind in ("replace", "add", "nudge"):
        value = with_change(value, path, draw(values))
    data = json.dumps(value).encode()
    place = draw(st.integers(0, len(data) - 1))
    if kind == "byte":
        return data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
    return data[:place] if kind == "cut" else data
