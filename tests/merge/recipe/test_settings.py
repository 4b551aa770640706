"""Values, gradients and filters, against mergekit's own evaluation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.recipe import parse_recipe
from mergepipe.merge.recipe.nodes import Place
from mergepipe.merge.recipe.settings import Rule, Setting, evaluate, resolve
from mergepipe.store.errors import BadInputError

NAMES = ["model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight", "model.layers.10.mlp.up_proj.weight"]
PLACE = Place("r.yml", 1)


@pytest.fixture(scope="module")
def oracle() -> Any:
    from mergekit.config import MergeConfiguration, evaluate_setting
    from mergekit.merge_methods.base import ParameterScope, ParameterSpec
    from mergekit.parameter_resolver import resolve_parameter

    def settings(text: str) -> dict[str, Any]:
        return MergeConfiguration.model_validate(yaml.safe_load(text)).parameters or {}

    def spec(name: str, kind: type, default: object) -> Any:
        return ParameterSpec(name, kind, ParameterScope.INPUT, default)

    return SimpleNamespace(settings=settings, evaluate=evaluate_setting, resolve=resolve_parameter, spec=spec)


numbers = st.one_of(
    st.floats(-1e6, 1e6).map(lambda value: value + 0.0),
    st.integers(-1000, 1000),
    st.sampled_from(["1e-3", "5E4", "-2e+1", "0.5", "1e5"]),  # YAML 1.1 takes some of them for text
)
words = st.sampled_from(["sum", "count", "a b", "true.", "null value"])
filters = st.sampled_from([None, "*", "", "mlp", "self_attn", "layers.1", "proj", "nowhere"])
positions = st.one_of(st.sampled_from([0.0, 1.0, 1 / 3, 0.5]), st.floats(0, 1))


def settings_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    plain = st.one_of(values, st.lists(values, max_size=5))
    rule = st.builds(lambda f, v: {"value": v} if f is None else {"filter": f, "value": v}, filters, plain)
    return st.one_of(plain, rule, st.lists(rule, min_size=1, max_size=4))


def recipe_text(parameters: dict[str, Any]) -> str:
    return yaml.safe_dump({"merge_method": "linear", "models": [{"model": "a"}], "parameters": parameters})


def own_settings(text: str) -> Any:
    return parse_recipe(text, "r.yml").documents[0].parameters


@pytest.mark.parametrize(
    ("kind", "values"), [(float, numbers), (bool, st.booleans()), (str, words)], ids=["float", "bool", "str"]
)
def test_evaluates_as_mergekit_does(oracle: Any, kind: type, values: st.SearchStrategy[Any]) -> None:
    validate = oracle.spec("p", kind, kind()).validate

    @given(settings_of(values), st.sampled_from(["", *NAMES]), positions)
    def check(setting: Any, name: str, t: float) -> None:
        text = recipe_text({"p": setting})
        expected = oracle.evaluate(name, oracle.settings(text)["p"], t, validate=validate)
        found = evaluate(own_settings(text)["p"], name, t)
        assert (found is None) == (expected is None)
        assert found is None or validate(found) == expected

    check()


def test_resolves_scopes_as_mergekit_does(oracle: Any) -> None:
    default = -12345.0
    spec = oracle.spec("p", float, default)
    scope = st.one_of(st.just({}), st.fixed_dictionaries({"p": settings_of(numbers)}))

    @given(st.lists(scope, max_size=4), st.sampled_from(NAMES), positions)
    def check(scopes: list[dict[str, Any]], name: str, t: float) -> None:
        texts = [recipe_text(scope) for scope in scopes]
        expected = oracle.resolve(spec, [oracle.settings(text) for text in texts], tensor_name=name, t=t)
        found = resolve(["p"], [own_settings(text) for text in texts], name, t)
        assert found.get("p", default) == expected

    check()


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ((0, 10), 0.25, 2.5),
        ((0, 10), 1.0, 10),
        ((1, 2, 4), 0.75, 3.0),
        ((7,), 0.9, 7),
        ((), 0.5, None),
        ((True, False), 0.999, True),
        ((True, False), 1.0, False),
        (("a", "b", "c"), 0.5, "b"),
    ],
)
def test_gradients(values: Any, t: float, expected: Any) -> None:
    assert evaluate(Setting(PLACE, (Rule(None, values),)), "x", t) == expected


def test_the_first_matching_rule_decides_even_if_it_says_nothing() -> None:
    silent = Setting(PLACE, (Rule("mlp", ()), Rule(None, 3.0)))
    assert evaluate(silent, "a.mlp.b", 0) is None
    assert evaluate(silent, "a.attn.b", 0) == 3.0
    wide = {"p": Setting(PLACE, (Rule(None, 9.0),))}
    assert resolve(["p", "q"], [{"p": silent}, wide], "a.mlp.b", 0) == {"p": 9.0}
    assert resolve(["p"], [{"p": silent}, wide], "a.attn.b", 0) == {"p": 3.0}


def test_no_rule_with_a_filter_matches_a_nameless_tensor() -> None:
    assert evaluate(Setting(PLACE, (Rule("a", 1.0),)), "", 0) is None
    assert evaluate(Setting(PLACE, (Rule("*", 1.0),)), "", 0) == 1.0


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (".nan", "not a finite number"),
        ("-.inf", "not a finite number"),
        ("'nan'", "not a finite number"),
        ("1e999", "not a finite number"),
        ("'Infinity'", "not a finite number"),
        ("null", "no value of a parameter"),
        ("[[1]]", "no value of a parameter"),
        ("[1, true]", "mixes booleans and numbers"),
        ("[1, up]", "mixes numbers and text"),
        ("{filter: mlp}", "lacks 'value'"),
        ("{filter: 3, value: 1}", "must be text"),
        ("{filtre: mlp, value: 1}", "no field 'filtre'"),
        ("[{value: 1}, 2]", "must be a mapping"),
        ("{value: {value: 1}}", "no value of a parameter"),
    ],
)
def test_what_is_no_setting_is_refused_with_its_line(value: str, says: str) -> None:
    text = f"merge_method: linear\nmodels:\n- model: a\nparameters:\n  p: {value}\n"
    with pytest.raises(BadInputError, match=says) as caught:
        parse_recipe(text, "r.yml")
    assert caught.value.message.startswith("r.yml:5: ")
    assert caught.value.hint


def test_the_longest_numbers_still_are_numbers() -> None:
    text = recipe_text({"p": 1}).replace("p: 1", "p: 0x" + "f" * 90)
    assert evaluate(own_settings(text)["p"], "x", 0) == int("f" * 90, 16)
    longer = text.replace("f" * 90, "f" * 120)
    assert evaluate(own_settings(longer)["p"], "x", 0) == "0x" + "f" * 120
