"""Canonical JSON: one byte string for one value, and strict reading of a stranger's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store.canonical import as_text, dump_canonical, load_strict
from mergepipe.store.errors import BadInputError

text = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_values_come_back(value: object) -> None:
    assert load_strict(dump_canonical(value), "x") == value


@given(st.dictionaries(text, st.integers(), max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, int], random: object) -> None:
    items = list(value.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    assert dump_canonical(dict(items)) == dump_canonical(value)


def test_the_form_is_fixed() -> None:
    value = {"b": [1, 2.5, None, True], "a": 'é"\\\n\x01', "": {}}
    assert dump_canonical(value) == '{"":{},"a":"é\\"\\\\\\n\\u0001","b":[1,2.5,null,true]}'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": -float("inf")}, "\ud800"])
def test_what_has_no_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        dump_canonical(value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a":1,"b":2,"a":1}', "the key 'a' stands twice"),
        (b'{"a":{"b":1,"b":1}}', "the key 'b' stands twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b'{"a":1} x', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"{'a':1}", "not valid JSON"),
        (b'"\xff"', "not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b'{"\\ud800":1}', "half of a character"),
        (b'["a\\udfff"]', "half of a character"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"1" * 100_000, "not valid JSON"),
    ],
)
def test_a_strangers_json_is_read_strictly(data: bytes, said: str) -> None:
    with pytest.raises(BadInputError) as caught:
        load_strict(data, "the file x")
    assert caught.value.message.startswith("the file x")
    assert said in caught.value.message


def test_both_halves_of_a_character_are_one() -> None:
    assert load_strict(b'"\\ud834\\udd1e"', "x") == "\U0001d11e"


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_bad_input(data: bytes) -> None:
    try:
        value = load_strict(data, "x")
    except BadInputError:
        return
    assert value == json.loads(data)


def test_text_with_bytes_that_are_no_characters_can_be_kept() -> None:
    assert as_text("plain é") == "plain é"
    assert as_text("m\udcff") == "m?"
