"""Layers from names: stacks, numbers, and what stands before and after them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mergepipe.merge.recipe.layers import Layer, comes_first, layer_of, sort_names, tensor_name

# Their families number what is of no layer, name it by habit alone, or have several towers.
ODD = {"phi-1", "whisper", "t5"}


def architectures() -> list[tuple[str, list[str], list[str]]]:
    """mergekit's own lists of what comes before and after the layers, read as files."""
    spec = importlib.util.find_spec("mergekit")
    assert spec is not None and spec.origin is not None
    found = []
    for path in sorted((Path(spec.origin).parent / "_data" / "architectures").glob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if "modules" not in value and path.stem not in ODD:
            lists = ([weight["name"] for weight in value.get(key, [])] for key in ("pre_weights", "post_weights"))
            found.append((path.stem, *lists))
    return found


@pytest.mark.parametrize(("name", "before", "after"), architectures())
def test_the_same_tensors_come_first_as_in_mergekit(name: str, before: list[str], after: list[str]) -> None:
    assert before, name
    assert [tensor for tensor in before if not comes_first(tensor)] == []
    assert [tensor for tensor in after if comes_first(tensor)] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", Layer("model.layers.", 3, "mlp.up_proj.weight")),
        ("model.layers.12.mlp.experts.7.w1.weight", Layer("model.layers.", 12, "mlp.experts.7.w1.weight")),
        ("h.0.attn.bias", Layer("h.", 0, "attn.bias")),
        ("0.weight", Layer("", 0, "weight")),
        ("blocks.5", Layer("blocks.", 5, "")),
        ("model.norm.weight", None),
        ("mm.linear_1.weight", None),
        ("layers.03.weight", None),  # could not be written back
        ("layers.123456.weight", None),
        ("layers.٣.weight", None),
        ("", None),
    ],
)
def test_the_first_number_is_the_layer(name: str, expected: Layer | None) -> None:
    assert layer_of(name) == expected
    if expected is not None:
        assert tensor_name(expected.stack, expected.number, expected.rest) == name


def test_the_main_stack_has_the_most_tensors() -> None:
    text = [f"model.layers.{layer}.{part}" for layer in range(3) for part in "ab"]
    vision = [f"vision.layers.{layer}.a" for layer in range(5)]
    names = sort_names([*vision, *text, "norm.weight"])
    assert names.main() == "model.layers."
    assert names.stacks == {"vision.layers.": 5, "model.layers.": 3}
    assert names.loose == ("norm.weight",)
    assert names.layers["model.layers.", 1] == ("a", "b")
    assert sort_names(["norm.weight"]).main() is None
