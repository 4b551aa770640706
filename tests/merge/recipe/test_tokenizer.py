"""The tokenizer's field: sources, tokens, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mergepipe.merge.recipe import Document, ModelReference, Tokenizer, parse_recipe
from mergepipe.store.errors import BadInputError

BODY = "merge_method: m\nmodels: [{model: a}]\n"


@pytest.mark.parametrize("source", ["union", "base", "some/model"])
def test_sources(source: str, document: Callable[[str], Document]) -> None:
    expected = source if source in ("union", "base") else ModelReference(source)
    assert document(f"{BODY}tokenizer_source: {source}").tokenizer_source == expected
    assert document(f"{BODY}tokenizer: {{source: {source}}}").tokenizer == Tokenizer(source=expected)  # type: ignore[arg-type]


def test_defaults(document: Callable[[str], Document]) -> None:
    assert document(f"{BODY}tokenizer: {{}}").tokenizer == Tokenizer("union", {}, None)
    assert document(BODY).tokenizer is None


def test_all_models_that_it_names(document: Callable[[str], Document]) -> None:
    tokens = "{x: {source: m2}, y: {source: {kind: model_token, model: m3, token_id: 0}}, z: {source: {kind: zero}}}"
    found = document(f"{BODY}tokenizer: {{source: m1, tokens: {tokens}}}")
    assert [str(model) for model in found.references()] == ["a", "m1", "m2", "m3"]
    assert [str(model) for model in found.models_used()] == ["a"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("union", "tokenizer must be a mapping"),
        ("{sorce: base}", "no field 'sorce'"),
        ("{source: 3}", "the tokenizer's source must be text"),
        ("{pad_to_multiple_of: 0}", "whole number from 1, not 0"),
        ("{pad_to_multiple_of: true}", "whole number from 1"),
        ("{tokens: [a]}", "tokens must be a mapping"),
        ("{tokens: {a: b}}", "the token 'a' must be a mapping"),
        ("{tokens: {7: {}}}", "the key 7 is not text"),
        ("{tokens: {a: {force: 1}}}", "force of the token 'a' must be true or false"),
        ("{tokens: {a: {source: {kind: one}}}}", "unknown kind 'one'"),
        ("{tokens: {a: {source: {kind: zero, model: b}}}}", "no field 'model'"),
        ("{tokens: {a: {source: {kind: model_token, model: b}}}}", "needs one of token and token_id"),
        ("{tokens: {a: {source: {kind: model_token, model: b, token: c, token_id: 1}}}}", "needs one of"),
        ("{tokens: {a: {source: {kind: model_token, token: c}}}}", "lacks 'model'"),
        ("{tokens: {a: {source: {kind: model_token, model: b, token_id: -1}}}}", "whole number from 0, not -1"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadInputError, match=says) as caught:
        parse_recipe(f"{BODY}tokenizer: {text}", "r.yml")
    assert caught.value.message.startswith("r.yml:3: ")
    assert caught.value.hint
