"""YAML from a stranger: the types of PyYAML's safe loader, with lines, and limits that hold."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.recipe.nodes import MAXIMUM_DEPTH, MAXIMUM_VALUES, Entries, Items, Node, Scalar, load
from mergepipe.store.errors import BadInputError

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def value_of(node: Node) -> Any:
    if isinstance(node, Items):
        return [value_of(item) for item in node.items]
    if isinstance(node, Entries):
        return {key: value_of(entry.node) for key, entry in node.entries.items()}
    return node.value


@given(plain, st.booleans())
def test_reads_what_pyyaml_writes(value: Any, flow: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True)
    expected = yaml.safe_load(text)
    assert [value_of(node) for node in load(text, "r.yml")] == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    "text",
    [
        *("0777", "0x1F", "0b101", "1_000", "190:20:30", "+12", ".5", "1.5e+3", "1e-3", "1e3", ".inf", "yes", "Off"),
        *("~", "Null", "'12'", '"yes"', "!!str 12", "!!float 3", "!!int '4'", "! 12", "!!bool 'no'", "-", "a: b"),
        *("{a: &x [1, 2], b: *x}", "&a {x: &b 1, y: *b}", "{a: &x {p: 1, q: 2}, b: {<<: *x, q: 3}}"),
        "{a: &x {p: 1}, c: &y {p: 2, q: 3}, b: {<<: [*x, *y]}}",
        "{'<<': 1}",
        "x: |\n  two\n  lines\n",
    ],
)
def test_types_are_those_of_the_safe_loader(text: str) -> None:
    expected = yaml.safe_load(text)
    assert [value_of(node) for node in load(text, "r.yml")] == ([] if expected is None else [expected])


def test_dates_stay_text() -> None:
    assert load("2024-01-31", "r.yml") == (Scalar(load("a", "r.yml")[0].place, "2024-01-31"),)


def test_lines_are_counted_from_one() -> None:
    (node,) = load("# note\na: 1\nb:\n  - x\n  -\n    y\n", "r.yml")
    assert isinstance(node, Entries)
    items = node.entries["b"].node
    assert isinstance(items, Items)
    assert (node.entries["b"].place.line, [item.place.line for item in items.items]) == (3, [4, 6])


def laughs(levels: int, width: int) -> str:
    lines = ["l0: &l0 [" + "x," * width + "]"]
    lines += [f"l{n}: &l{n} [{','.join([f'*l{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


MERGES = f"a: &a {{{','.join(f'k{n}: 1' for n in range(2000))}}}\n" + "".join(f"m{n}: {{<<: *a}}\n" for n in range(999))

HOSTILE = {
    "laughs": (laughs(12, 9), "values, with aliases unfolded"),
    "wide laughs": (laughs(3, 3000), "values, with aliases unfolded"),
    "merges": (MERGES, "values, with aliases unfolded"),
    "millions of items": ("[" + "1," * 1_900_000 + "]", "values, with aliases unfolded"),
    "millions of documents": ("--- 1\n" * 600_000, "values, with aliases unfolded"),
    "deep lists": ("[" * 1_000_000, "levels deep"),
    "deep mappings": ("{a: " * 500_000, "levels deep"),
    "deep keys": ("? " * 100_000, "levels deep"),
    "deep by aliases": (
        "a0: &a0 [1]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 80)),
        "levels deep",
    ),
    "inside itself": ("a: &a [1, *a]", "stands inside itself"),
    "merged into itself": ("&a {<<: *a}", "stands inside itself"),
    "no anchor": ("a: *b", "has no anchor"),
    "an anchor of another document": ("--- &a 1\n--- *a", "has no anchor"),
    "merge of text": ("{<<: 1}", "only mappings can be merged"),
    "merge of a list of text": ("{<<: [{a: 1}, b]}", "only mappings can be merged"),
    "merged twice": ("{<<: {a: 1}, <<: {b: 1}}", "stands twice"),
    "twice": ("a: 1\nb: 2\na: 3", "r.yml:3: the key 'a' stands twice"),
    "a number as a key": ("1: a", "the key 1 is not text"),
    "yes as a key": ("yes: a", "the key True is not text"),
    "a list as a key": ("? [a]\n: b", "a key is not text"),
    "python": ("!!python/object/apply:os.system ['true']", "the tag .* is not for recipes"),
    "a python name": ("a: !!python/name:os.system", "the tag .* is not for recipes"),
    "binary": ("!!binary aGk=", "the tag .* is not for recipes"),
    "a set": ("!!set {a}", "the tag .* is not for recipes"),
    "a list tagged as text": ("!!str [a]", "the tag .* is not for recipes"),
    "text tagged as a list": ("!!seq a", "the tag .* is not for recipes"),
    "a number that is none": ("!!int a", "not a value of the type int"),
    "binary digits that are none": ("0b_", "not a value of the type int"),
    "a long number": ("!!int " + "9" * 10_000, "the tag .* is not for recipes"),
    "unclosed": ("a: [1", "not valid YAML"),
    "a tab": ("a:\n\t- b", "r.yml:2: not valid YAML"),
    "a NUL": ("a: 1\nb: \0", "not valid YAML"),
    "half a character": ("a: 1\nb: \ud800", "r.yml:2: half of a character"),
    "another YAML": ("%YAML 3.0\n--- a", "not valid YAML"),
    "large": ("# " + "x" * (4 << 20), "larger than 4 MiB"),
    "large in UTF-8": ("# " + "é" * (3 << 20), "larger than 4 MiB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused_soon(name: str) -> None:
    text, says = HOSTILE[name]
    before = time.process_time()
    with pytest.raises(BadInputError, match=says) as caught:
        load(text, "r.yml")
    assert caught.value.message.startswith("r.yml:")
    assert caught.value.message.split(":")[1].isdigit()
    assert len(caught.value.message) < 400
    assert caught.value.hint
    assert time.process_time() - before < 20  # seconds; each takes well under two


def test_limits_are_as_they_say() -> None:
    fits = "[" * MAXIMUM_DEPTH + "]" * MAXIMUM_DEPTH
    assert len(load(fits, "r.yml")) == 1
    with pytest.raises(BadInputError):
        load(f"[{fits}]", "r.yml")
    assert len(load("[" + "1," * (MAXIMUM_VALUES - 1) + "]", "r.yml")) == 1
    with pytest.raises(BadInputError):
        load("[" + "1," * MAXIMUM_VALUES + "]", "r.yml")


def test_long_digits_are_text() -> None:
    (node,) = load("1" * 5000, "r.yml")
    assert value_of(node) == "1" * 5000


@given(st.text(alphabet="ab&*<:-[]{}!'\"#|>%@`,?~ \n\t0.1\0é\x85\ufeff", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        load(text, "r.yml")
    except BadInputError as error:
        assert error.message.startswith("r.yml:") and error.hint
