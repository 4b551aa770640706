"""Recipes as documents: what each field means, and what is refused, with its line."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.recipe import Document, ModelReference, parse_recipe, read_recipe
from mergepipe.merge.recipe.document import DTYPES
from mergepipe.store.errors import BadInputError, MergePipeError, NotFoundError

Parse = Callable[[str], Document]
EXAMPLES = {path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "examples").glob("*.yml")}
FULL = """# a recipe
name: mine
merge_method: ties
models:
  - model: a@main
    parameters: {weight: 1}
  - model: b+c
base_model: base
dtype: torch.float32
out_dtype: bfloat16
tokenizer_source: b@v2
chat_template: auto
parameters:
  lambda: 2
"""


def test_every_field(document: Parse) -> None:
    found = document(FULL)
    assert (found.name, found.method, found.chat_template) == ("mine", "ties", "auto")
    assert [model.model for model in found.models] == [ModelReference("a", "main"), ModelReference("b", None, "c")]
    assert (found.base_model, found.tokenizer_source) == (ModelReference("base"), ModelReference("b", "v2"))
    assert (found.dtype, found.out_dtype, found.tokenizer, found.slices) == ("F32", "BF16", None, ())
    lines = {name: place.line for name, place in found.places.items()}
    assert sorted(lines.values()) == [2, 3, 4, 8, 9, 10, 11, 12, 13]
    assert (lines["name"], lines["models"], lines["base_model"], lines["parameters"]) == (2, 4, 8, 13)
    assert (found.parameters["lambda"].place.line, found.models[0].parameters["weight"].place.line) == (14, 6)
    assert found.models[1].place.line == 7
    assert found.place_of("tokenizer") == found.place
    assert list(found.references()) == [*found.models_used(), ModelReference("b", "v2")]


def test_null_and_empty_fields_are_as_good_as_absent(document: Parse) -> None:
    nothing = "slices: ~\nmodules:\ndtype: ''\nout_dtype: null\ntokenizer:\nname: ''\nbase_model:\nparameters:\n"
    found = document(f"merge_method: m\nmodels: [{{model: a, parameters: }}]\n{nothing}")
    assert (found.dtype, found.out_dtype, found.name, found.base_model, found.parameters) == (None,) * 4 + ({},)
    assert set(found.places) == {"merge_method", "models"}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_have_safetensors_names(document: Parse, name: str) -> None:
    for text in (name, f"torch.{name}"):
        assert document(f"merge_method: m\nmodels: [{{model: a}}]\ndtype: {text}").dtype == DTYPES[name]


def test_one_module_is_read_as_the_recipe_itself(document: Parse) -> None:
    text = "merge_method: m\nmodules: {default: {models: [{model: a}], parameters: {weight: 2}}}"
    found = document(text)
    assert [str(model.model) for model in found.models] == ["a"]
    assert set(found.module_parameters) == {"weight"} and not found.parameters


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("merge_method: m", 1, "exactly one of models, slices, modules"),
        ("merge_method: m\nmodels: [{model: a}]\nslices: []", 1, "and has models and slices"),
        ("merge_method: m\nmodels: []", 2, "models is empty"),
        ("merge_method: m\nslices: []", 2, "slices is empty"),
        ("merge_method: m\nmodels: a", 2, "models must be a list, not 'a'"),
        ("merge_method: m\nmodels:\n- a", 3, "a model must be a mapping"),
        ("merge_method: m\nmodels:\n- {}", 3, "lacks 'model'"),
        ("models: [{model: a}]", 1, "lacks 'merge_method'"),
        ("merge_method: 3\nmodels: [{model: a}]", 1, "merge_method must be text, not 3"),
        ("merge_method: m\nmodels: [{model: a}]\nbase-model: a", 3, "no field 'base-model'"),
        ("merge_method: m\nmodels:\n- model: a\n  weight: 1", 4, "a model has no field 'weight'"),
        ("merge_method: m\nmodels:\n- model: a\n  layer_range: [0, 1]", 4, "no field 'layer_range'"),
        ("merge_method: m\nmodels:\n- model: a\n- model: b\n- model: a", 5, "the model 'a' stands twice"),
        ("merge_method: m\nmodels: [{model: a}]\ndtype: auto", 3, "dtype 'auto'"),
        ("merge_method: m\nmodels: [{model: a}]\nout_dtype: int64", 3, "out_dtype 'int64'"),
        ("merge_method: m\nmodels: [{model: a}]\ndtype: 16", 3, "dtype must be text"),
        ("merge_method: m\nmodels: [{model: a}]\nchat_template: [a]", 3, "chat_template must be text, not a list"),
        ("merge_method: m\nmodels: [{model: a}]\nparameters: [1]", 3, "parameters must be a mapping"),
        ("merge_method: m\nmodels: [{model: a}]\ntokenizer: {}\ntokenizer_source: base", 4, "both tokenizer and"),
        ("merge_method: m\nmodules: {}", 2, "0 modules"),
        ("merge_method: m\nmodules:\n  a: {models: [{model: a}]}\n  b: {models: [{model: a}]}", 4, "2 modules"),
        ("merge_method: m\nmodules:\n  a: {}", 3, "exactly one of models, slices"),
        ("merge_method: m\nmodules:\n  a: {modules: {}}", 3, "no field 'modules'"),
        ("merge_method: m\nslices:\n- sources: []", 3, "sources is empty"),
        ("merge_method: m\nslices:\n- {}", 3, "lacks 'sources'"),
        ("merge_method: m\nslices:\n- sources:\n  - model: a", 4, "lacks 'layer_range'"),
        ("merge_method: m\nslices:\n- sources:\n  - {model: a, layer_range: [1]}", 4, "two numbers, not 1"),
        ("merge_method: m\nslices:\n- sources:\n  - {model: a, layer_range: 4}", 4, "layer_range must be a list"),
        ("merge_method: m\nslices:\n- sources:\n  - {model: a, layer_range: [2, 1]}", 4, "backwards, from 2 to 1"),
        (
            "merge_method: m\nslices:\n- sources:\n  - {model: a, layer_range: [-1, 1]}",
            4,
            "whole number from 0, not -1",
        ),
        ("merge_method: m\nslices:\n- sources:\n  - {model: a, layer_range: [0, 1.5]}", 4, "whole number from 0"),
        ("merge_method: m\nslices:\n- sources:\n  - {model: a, layer_range: [0, yes]}", 4, "whole number from 0"),
        ("merge_method: m\nslices:\n- residual_weight: 0.5\n  sources: []", 3, "residual_weight cannot be honoured"),
        (
            "merge_method: m\nslices:\n- sources:\n  - {model: a, layer_range: [0, 1]}\n"
            "  - {model: a, layer_range: [1, 2]}",
            5,
            "the model 'a' stands twice",
        ),
    ],
)
def test_what_a_recipe_may_not_say(text: str, line: int, says: str) -> None:
    with pytest.raises(BadInputError, match=says) as caught:
        parse_recipe(text, "r.yml")
    assert caught.value.message.startswith(f"r.yml:{line}: ")
    assert caught.value.hint


def test_unknown_fields_suggest_the_nearest() -> None:
    with pytest.raises(BadInputError) as caught:
        parse_recipe("merge_metod: m\nmodels: [{model: a}]", "r.yml")
    assert caught.value.hint == "Did you mean 'merge_method'?"
    with pytest.raises(BadInputError) as caught:
        parse_recipe("x" * 100_000 + ": m", "r.yml")
    assert len(caught.value.message) < 200


def named(name: str, *uses: str) -> str:
    models = ", ".join(f"{{model: {use}}}" for use in uses)
    return f"{f'name: {name}' if name else ''}\nmerge_method: m\nmodels: [{models}]\n"


def order(*texts: str) -> list[str | None]:
    return [document.name for document in parse_recipe("---\n".join(texts), "r.yml").documents]


def test_documents_come_after_those_that_they_use() -> None:
    assert order(named("", "x", "y"), named("y", "x"), named("x", "z"), named("w", "z")) == ["x", "w", "y", None]
    assert order(named("b", "z"), named("a", "z")) == ["b", "a"]
    assert order(named("b", "a+adapter"), named("a", "z")) == ["a", "b"]
    assert order(named("b", "z") + "tokenizer_source: a\n", named("a", "z")) == ["a", "b"]


def test_empty_documents_are_skipped() -> None:
    assert order("", named("", "a"), "# note\n", "~\n") == [None]


@pytest.mark.parametrize(
    ("texts", "line", "says"),
    [
        ((named("a", "b"), named("b", "a")), 1, "needs its own result"),
        ((named("a", "a"),), 1, "needs its own result"),
        ((named("a", "z"), named("a", "y")), 5, "the name 'a' is taken"),
        ((named("", "z"), named("", "y")), 6, "a second document without a name"),
        (("", "~\n"), 1, "the recipe is empty"),
    ],
)
def test_documents_that_cannot_be_merged_in_any_order(texts: tuple[str, ...], line: int, says: str) -> None:
    with pytest.raises(BadInputError, match=says) as caught:
        order(*texts)
    assert caught.value.message.startswith(f"r.yml:{line}: ")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(FULL, encoding="utf-8")
    assert read_recipe(path) == parse_recipe(FULL, str(path))
    path.write_bytes(b"merge_method: m\nname: \xff\n")
    with pytest.raises(BadInputError, match=r"r\.yml:2: not UTF-8"):
        read_recipe(path)
    path.write_bytes(b"# " + b"x" * (4 << 20))
    with pytest.raises(BadInputError, match="larger than 4 MiB"):
        read_recipe(path)
    with pytest.raises(NotFoundError, match="no such recipe"):
        read_recipe(tmp_path / "other.yml")
    with pytest.raises(BadInputError, match="not a file"):
        read_recipe(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInputError, match="not a file"):
        read_recipe(tmp_path / "pipe")
    with pytest.raises(MergePipeError):
        read_recipe(Path("nul\0.yml"))


def mutate(text: str, dice: random.Random) -> str:
    """A recipe with some of its pieces dropped, doubled, swapped or replaced."""
    bits = ["&a ", "*a", "<<: *a", "[", "]", "{", "}", ": ", "- ", "\n", "\t", "!!int ", "null", ".nan", "1e999", "'"]
    for _ in range(dice.randint(1, 4)):
        lines = text.split("\n")
        at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
        kind = dice.randrange(5)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[other])
        elif kind == 2:
            lines[at] = " " * dice.randint(0, 6) + lines[at].lstrip()
        elif kind == 3:
            lines[at], lines[other] = lines[other], lines[at]
        else:
            place = dice.randint(0, len(lines[at]))
            lines[at] = lines[at][:place] + dice.choice(bits) + lines[at][place + dice.randint(0, 3) :]
        text = "\n".join(lines) or "a"
    return text


@given(st.sampled_from(sorted(EXAMPLES)), st.randoms(use_true_random=False))
def test_broken_recipes_are_read_or_refused(name: str, dice: random.Random) -> None:
    text = mutate(EXAMPLES[name], dice)
    try:
        parse_recipe(text, "r.yml")
    except BadInputError as error:
        assert error.message.startswith("r.yml:") and error.hint
