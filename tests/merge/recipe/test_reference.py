"""How models are named, in text and as mappings, as mergekit takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mergepipe.merge.recipe import Document, ModelReference, parse_recipe
from mergepipe.store.errors import BadInputError

FORMS = {
    "org/a": ModelReference("org/a"),
    "org/a@v1": ModelReference("org/a", "v1"),
    "./a+b": ModelReference("./a", None, "b"),
    "a@v1+b@v2": ModelReference("a", "v1", "b", "v2"),
    "a+b@v2": ModelReference("a", None, "b", "v2"),
    "{model: a}": ModelReference("a"),
    "{model: a@v1, lora: b@v2}": ModelReference("a", "v1", "b", "v2"),
    "{model: {path: a, revision: v1}, lora: {path: b}}": ModelReference("a", "v1", "b"),
    "{model: {path: a@b+c}, lora: ~, override_architecture: ~}": ModelReference("a@b+c"),
}


@pytest.fixture(scope="module")
def oracle() -> Any:
    from mergekit.common import ModelReference

    return ModelReference.model_validate


@pytest.mark.parametrize("text", FORMS)
def test_forms(text: str, document: Callable[[str], Document], oracle: Any) -> None:
    import yaml

    found = document(f"merge_method: m\nmodels: [{{model: {text}}}]").models[0].model
    assert found == FORMS[text]
    theirs = oracle(yaml.safe_load(text))
    assert str(found) == str(theirs)
    assert (found.path, found.revision) == (theirs.model.path, theirs.model.revision)
    lora = (theirs.lora.path, theirs.lora.revision) if theirs.lora else (None, None)
    assert (found.lora, found.lora_revision) == lora


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a+b+c", r"more than one '\+'"),
        ("a@b@c", "more than one '@'"),
        ("a@", "has an empty part"),
        ("'@v1'", "has an empty part"),
        ("a+", "has an empty part"),
        ("'+b'", "has an empty part"),
        ("' '", "has an empty part"),
        ("''", "model is empty"),
        ("7", "model must be text, not 7"),
        ("[a]", "must be a mapping, not a list"),
        ("{path: a}", "no field 'path'"),
        ("{lora: a}", "lacks 'model'"),
        ("{model: {revision: a}}", "lacks 'path'"),
        ("{model: {path: a, revision: 1.0}}", "must be text, not 1.0"),
        ("{model: a, override_architecture: Other}", "override_architecture cannot be honoured"),
    ],
)
def test_what_names_no_model(text: str, says: str) -> None:
    with pytest.raises(BadInputError, match=says) as caught:
        parse_recipe(f"merge_method: m\nmodels:\n- model: {text}", "r.yml")
    assert caught.value.message.startswith("r.yml:3: ")
    assert caught.value.hint
