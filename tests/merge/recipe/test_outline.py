"""From recipes and tensor names to the result's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.recipe import Document, ModelReference, Outline, OutputTensor, Source, parse_recipe
from mergepipe.merge.recipe import outline as module
from mergepipe.merge.recipe.outline import outline
from mergepipe.store.errors import BadInputError

Parse = Callable[[str], Document]
OWN, SHARED = frozenset({"weight", "density"}), frozenset({"lambda", "normalize"})


def model_names(layers: int, stack: str = "model.layers", parts: Sequence[str] = ("attn.w", "mlp.w")) -> list[str]:
    inside = [f"{stack}.{layer}.{part}" for layer in range(layers) for part in parts]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


def made(document: Document, names: dict[str, Sequence[str]] | int = 4) -> Outline:
    if isinstance(names, int):
        names = {model.path: model_names(names) for model in document.models_used()}
    return outline(document, {ModelReference(path): of for path, of in names.items()}, SHARED, OWN)


def tensors(result: Outline) -> dict[str, OutputTensor]:
    by_name = {tensor.name: tensor for tensor in result.tensors}
    assert len(by_name) == len(result.tensors)
    return by_name


def test_models_are_one_slice_with_the_base_at_its_end(document: Parse) -> None:
    result = made(document("merge_method: m\nmodels: [{model: a}, {model: b}]\nbase_model: c"))
    assert [str(model) for model in result.models] == ["a", "b", "c"]
    assert (result.base, result.layers) == (2, None)
    assert [tensor.name for tensor in result.tensors] == model_names(4)
    name = "model.layers.2.mlp.w"
    sources = (Source(0, name), Source(1, name), Source(2, name))
    assert tensors(result)[name] == OutputTensor(name, sources, 2, {}, ({}, {}, {}))


def test_the_base_keeps_its_place_among_the_models(document: Parse) -> None:
    result = made(document("merge_method: m\nmodels: [{model: a}, {model: b}]\nbase_model: a"))
    assert result.base == 0
    assert {(tensor.base, len(tensor.sources)) for tensor in result.tensors} == {(0, 2)}


def test_no_base_is_none(document: Parse) -> None:
    result = made(document("merge_method: m\nmodels: [{model: a}, {model: b}]"))
    assert result.base is None
    assert {tensor.base for tensor in result.tensors} == {None}


SLICES = """
merge_method: m
base_model: c
parameters: {lambda: [0, 1], weight: 5}
slices:
- sources:
  - {model: a, layer_range: [0, 3], parameters: {weight: [1, 2]}}
  - {model: b, layer_range: [1, 4]}
- base_model: b
  parameters: {weight: {filter: mlp, value: 7}, lambda: 9}
  sources:
  - {model: b, layer_range: [3, 4]}
"""


def test_slices_renumber_and_run_their_own_gradients(document: Parse) -> None:
    result = made(document(SLICES))
    found = tensors(result)
    assert list(found) == model_names(4)
    assert (result.layers, result.base, [str(model) for model in result.models]) == (None, 2, ["a", "b", "c"])
    middle = found["model.layers.1.attn.w"]
    assert middle.sources == (Source(0, "model.layers.1.attn.w"), Source(1, "model.layers.2.attn.w"))
    assert (middle.base, middle.parameters, middle.own) == (None, {"lambda": 0.5}, ({"weight": 1.5}, {"weight": 5}))
    last = found["model.layers.3.mlp.w"]
    assert last.sources == (Source(1, "model.layers.3.mlp.w"),)
    assert (last.base, last.parameters, last.own) == (0, {"lambda": 9}, ({"weight": 7},))
    assert found["model.layers.3.attn.w"].own == ({"weight": 5},)


def test_what_is_of_no_layer_goes_with_the_first_or_last_slice(document: Parse) -> None:
    found = tensors(made(document(SLICES)))
    first, last = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert [source.model for source in first.sources] == [0, 1]
    assert (first.parameters, first.own) == ({"lambda": 0}, ({"weight": 1}, {"weight": 5}))
    assert [source.model for source in last.sources] == [1]
    assert last.parameters == {"lambda": 9}


def test_one_layer_is_at_the_end_of_its_gradient(document: Parse) -> None:
    text = "merge_method: m\nparameters: {lambda: [0, 1]}\nslices: [{sources: [{model: a, layer_range: [2, 3]}]}]"
    result = made(document(text))
    assert result.layers == 1
    found = tensors(result)
    assert found["model.layers.0.mlp.w"].parameters == {"lambda": 1}
    assert found["model.layers.0.mlp.w"].sources == (Source(0, "model.layers.2.mlp.w"),)
    assert found["model.norm.weight"].parameters == {"lambda": 0}


def test_layers_are_counted_where_they_differ_from_the_bases(document: Parse) -> None:
    text = "merge_method: m\nbase_model: c\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]"
    names = {"a": model_names(4), "c": model_names(6)}
    assert made(document(text), names).layers == 4
    assert made(document(text), {"a": model_names(4), "c": model_names(4)}).layers is None


def test_own_parameters_are_found_under_the_sources_own_names(document: Parse) -> None:
    text = """
merge_method: m
parameters: {weight: [{filter: layers.2, value: 2}, {value: 0}], lambda: {filter: layers.2, value: 3}}
slices: [{sources: [{model: a, layer_range: [2, 3]}, {model: b, layer_range: [0, 1]}]}]
"""
    tensor = tensors(made(document(text)))["model.layers.0.mlp.w"]
    assert (tensor.own, tensor.parameters) == (({"weight": 2}, {"weight": 0}), {})


def test_scopes_from_the_model_to_the_recipe(document: Parse) -> None:
    text = """
merge_method: m
parameters: {weight: 1, density: 1, lambda: 1, normalize: true}
modules:
  default:
    parameters: {weight: 2, density: 2, lambda: 2}
    slices:
    - parameters: {weight: 3, density: {filter: mlp, value: 3}}
      sources:
      - {model: a, layer_range: [0, 1], parameters: {weight: {filter: attn, value: 4}}}
"""
    found = tensors(made(document(text), 1))
    assert found["model.layers.0.attn.w"].own == ({"weight": 4, "density": 2},)
    assert found["model.layers.0.mlp.w"].own == ({"weight": 3, "density": 3},)
    assert found["model.layers.0.mlp.w"].parameters == {"lambda": 2, "normalize": True}


def test_sources_that_lack_a_tensor_are_left_out_and_reported(document: Parse) -> None:
    names = {"a": [*model_names(2), "extra.bias"], "b": model_names(2)[:-1], "c": model_names(2)}
    text = "merge_method: m\nmodels: [{model: a}, {model: b, parameters: {weight: 2}}]\nbase_model: c"
    found = tensors(made(document(text), names))
    assert found["lm_head.weight"].sources == (Source(0, "lm_head.weight"), Source(2, "lm_head.weight"))
    assert (found["lm_head.weight"].missing, found["lm_head.weight"].base) == ((1,), 1)
    assert (found["extra.bias"].missing, found["extra.bias"].base) == ((1, 2), None)
    assert found["extra.bias"].own == ({},)
    assert found["model.norm.weight"].own == ({}, {"weight": 2}, {})


def test_every_stack_has_its_own_gradient(document: Parse) -> None:
    names = [*(f"vision.layers.{layer}.w" for layer in range(5)), *model_names(3)]
    text = "merge_method: m\nmodels: [{model: a}]\nparameters: {lambda: [0, 1]}"
    found = tensors(made(document(text), {"a": names}))
    assert sorted(found) == sorted(names)
    assert [found[f"vision.layers.{n}.w"].parameters["lambda"] for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [found[f"model.layers.{n}.mlp.w"].parameters["lambda"] for n in range(3)] == [0, 0.5, 1]


def test_slices_cut_the_main_stack_and_leave_others_whole(document: Parse) -> None:
    names = [*(f"vision.layers.{layer}.w" for layer in range(5)), *model_names(3)]
    text = "merge_method: m\nslices: [{sources: [{model: a, layer_range: [1, 3]}]}]"
    found = tensors(made(document(text), {"a": names}))
    layers = [name for name in found if ".layers." in name]
    text_layers = [f"model.layers.{n}.{part}" for n in range(2) for part in ("attn.w", "mlp.w")]
    assert layers == [*(f"vision.layers.{n}.w" for n in range(5)), *text_layers]
    assert found["model.layers.0.mlp.w"].sources == (Source(0, "model.layers.1.mlp.w"),)
    assert found["vision.layers.4.w"].sources == (Source(0, "vision.layers.4.w"),)


def test_models_without_layers_merge_too(document: Parse) -> None:
    result = made(document("merge_method: m\nmodels: [{model: a}]"), {"a": ["x", "y.weight"]})
    assert [tensor.name for tensor in result.tensors] == ["x", "y.weight"]


def test_the_memory_switch_is_accepted_and_dropped(document: Parse) -> None:
    text = "merge_method: m\nmodels: [{model: a, parameters: {int8_mask: true}}]\nparameters: {int8_mask: true}"
    names = {ModelReference("a"): model_names(1)}
    for shared in (SHARED, SHARED | {"int8_mask"}):
        for tensor in outline(document(text), names, shared, OWN).tensors:
            assert (tensor.parameters, tensor.own) == ({}, ({},))


@pytest.mark.parametrize(
    ("text", "line", "says", "hint"),
    [
        ("models:\n- model: a\nparameters:\n  wieght: 1", 5, "no parameter 'wieght'", "'weight'"),
        ("models:\n- model: a\n  parameters:\n    densitty: 1", 5, "no parameter 'densitty'", "'density'"),
        ("models:\n- model: a\n  parameters:\n    weight: 1\n    normalize: 1", 6, "one value for all models", "Move"),
        ("slices:\n- sources:\n  - {model: a, layer_range: [0, 1]}\n  parameters: {tt: 1}", 5, "no parameter", "Known"),
        ("modules:\n  m:\n    models: [{model: a}]\n    parameters: {gamma: 1}", 5, "no parameter 'gamma'", ""),
        ("slices:\n- sources:\n  - {model: a, layer_range: [0, 5]}", 4, r"\[0, 5\] is not in 'a', which has 4", "4"),
        (
            "slices:\n- sources:\n  - {model: a, layer_range: [0, 3]}\n  - {model: b, layer_range: [0, 2]}",
            3,
            "a slice have 2 and 3 layers",
            "same length",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_line(
    document: Parse, text: str, line: int, says: str, hint: str
) -> None:
    recipe = document(f"merge_method: m\n{text}\n")
    with pytest.raises(BadInputError, match=says) as caught:
        made(recipe)
    assert caught.value.message.startswith(f"r.yml:{line}: ")
    assert caught.value.hint is not None and hint in caught.value.hint


def test_models_of_other_heights_are_refused(document: Parse) -> None:
    recipe = document("merge_method: m\nmodels:\n- model: a\n- model: b\n")
    with pytest.raises(
        BadInputError, match=r"r\.yml:4: 'b' has 3 layers under 'model\.layers\.', and those before it 4"
    ):
        made(recipe, {"a": model_names(4), "b": model_names(3)})
    vision = {"a": [*model_names(4), "v.0.w", "v.1.w"], "b": [*model_names(4), "v.0.w"]}
    with pytest.raises(BadInputError, match=r"'b' has 1 layers under 'v\.'"):
        made(recipe, vision)
    without = {"a": vision["a"], "b": model_names(4)}
    assert tensors(made(recipe, without))["v.1.w"].missing == (1,)


def test_other_stacks_of_slices_must_agree(document: Parse) -> None:
    text = "merge_method: m\nslices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]"
    names = {"a": [*model_names(4), "v.0.w", "v.1.w"], "b": [*model_names(4), "v.0.w"]}
    with pytest.raises(BadInputError, match=r"'b' has 1 layers under 'v\.'"):
        made(document(text), names)


def test_layers_of_a_model_without_any_are_refused(document: Parse) -> None:
    recipe = document("merge_method: m\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]")
    with pytest.raises(BadInputError, match="which has 0 layers"):
        made(recipe, {"a": ["x"]})


def test_results_have_a_size(document: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "merge_method: m\nslices:\n" + "- sources: [{model: a, layer_range: [0, 4]}]\n" * 9
    assert made(document(text)).layers == 36
    for limit in (30, 60):  # by its layers, by its tensors
        monkeypatch.setattr(module, "MAXIMUM_TENSORS", limit)
        with pytest.raises(BadInputError, match=rf"more than {limit} tensors"):
            made(document(text))


ranges = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted)


@given(st.lists(st.tuples(st.sampled_from("abc"), ranges), min_size=1, max_size=6))
def test_stacked_slices_give_every_layer_once_in_order(slices: list[tuple[str, list[int]]]) -> None:
    lines = [f"- sources: [{{model: {name}, layer_range: [{low}, {high}]}}]" for name, (low, high) in slices]
    (document,) = parse_recipe("merge_method: m\nslices:\n" + "\n".join(lines), "r.yml").documents
    result = made(document, 5)
    expected = [(name, layer) for name, (low, high) in slices for layer in range(low, high)]
    assert [tensor.name for tensor in result.tensors] == model_names(len(expected))
    found = tensors(result)
    for number, (name, layer) in enumerate(expected):
        (source,) = found[f"model.layers.{number}.attn.w"].sources
        assert (str(result.models[source.model]), source.tensor) == (name, f"model.layers.{layer}.attn.w")
