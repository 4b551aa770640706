"""Every kind of recipe that people write, against mergekit's own planner: same tensors, same inputs, same numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergepipe.merge.recipe import Document, Outline, read_recipe
from mergepipe.merge.recipe.outline import outline

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.yml"))
LAYERS = 12
SET_NOTHING = {"arcee_fusion", "frankenmerge"}


@pytest.fixture(scope="module")
def oracle() -> Any:
    """What is needed of mergekit, with models that are there in name only."""
    from mergekit import merge_methods
    from mergekit.architecture import arch_info_for_config
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=LAYERS, architectures=["LlamaForCausalLM"])
    info = arch_info_for_config(config)
    module = info.modules["default"].architecture
    weights = [*module.pre_weights(config), *module.post_weights(config)]
    for layer in range(LAYERS):
        weights += module.layer_weights(layer, config)
    names = [weight.name for weight in weights]

    def plan(raw: dict[str, Any]) -> list[tuple[str, Any]]:
        raw = {key: value for key, value in raw.items() if key != "name"}
        planner = MergePlanner(MergeConfiguration.model_validate(raw), info, MergeOptions(), config)
        planner._plan()
        return [(weight.name, task) for weight, task in planner._tensors]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelReference, "config", lambda *_, **__: config)
        index = SimpleNamespace(tensor_paths=dict.fromkeys(names))
        patch.setattr(LoaderCache, "get", lambda *_: SimpleNamespace(index=index))
        yield SimpleNamespace(plan=plan, names=names, spec=lambda name: merge_methods.get(name).spec)


def ours(document: Document, oracle: Any) -> Outline:
    spec = oracle.spec(document.method)
    names = dict.fromkeys(document.models_used(), oracle.names)
    shared = frozenset(parameter.name for parameter in spec.shared_parameters)
    return outline(document, names, shared, frozenset(parameter.name for parameter in spec.input_parameters))


def check_values(found: Any, expected: Any, specs: Any, ignored: set[str]) -> int:
    """Each value is the oracle's; what the recipe does not set is the default there. Returns how many it sets."""
    for parameter in specs:
        if parameter.name in ignored or parameter.name not in expected:
            continue
        if parameter.name in found:
            assert parameter.validate(found[parameter.name]) == expected[parameter.name]
        else:
            assert expected[parameter.name] == parameter.validate(parameter.default)
    assert set(found) <= {parameter.name for parameter in specs}
    return len(found)


def compare(document: Document, raw: dict[str, Any], oracle: Any) -> int:
    """Compare a document's outline with the planner's; returns how many parameters the recipe sets."""
    mine, theirs, spec = ours(document, oracle), oracle.plan(raw), oracle.spec(document.method)
    assert sorted(tensor.name for tensor in mine.tensors) == sorted(name for name, _ in theirs)
    by_name = {tensor.name: tensor for tensor in mine.tensors}
    assert len(by_name) == len(theirs)
    compared = 0
    for name, task in theirs:
        tensor = by_name[name]
        gathered = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        weights = {str(model): weight.name for model, weight in gathered.weight_info.items()}
        assert [str(mine.models[source.model]) for source in tensor.sources] == [str(m) for m in task.model_order]
        assert {str(mine.models[source.model]): source.tensor for source in tensor.sources} == weights
        base = None if tensor.base is None else str(mine.models[tensor.sources[tensor.base].model])
        expected_base = str(task.base_model) if task.base_model in task.model_order else None
        assert base == expected_base
        compared += check_values(tensor.parameters, task.parameters, spec.shared_parameters, {"int8_mask"})
        for model, own in zip(task.model_order, tensor.own, strict=True):
            compared += check_values(own, task.input_parameters[model], spec.input_parameters, set())
        assert tensor.missing == ()
    return compared


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_resolves_as_mergekit_does(path: Path, oracle: Any) -> None:
    import yaml

    raws = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    recipe = read_recipe(path)
    assert len(recipe.documents) == len(raws)
    compared = sum(compare(*pair, oracle) for pair in zip(recipe.documents, raws, strict=True))
    assert (compared > 0) == (path.stem not in SET_NOTHING)


def test_a_wrong_value_would_be_seen(oracle: Any) -> None:
    """The comparison itself can fail: the same recipe with one number changed does not compare."""
    import yaml

    path = Path(__file__).parent / "examples" / "ties_gradients.yml"
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    (document,) = read_recipe(path).documents
    assert compare(document, raw, oracle) > 100
    raw["models"][0]["parameters"]["density"][1] = 0.71
    with pytest.raises(AssertionError):
        compare(document, raw, oracle)


def test_a_stack_of_layers_has_a_new_number_of_them(oracle: Any) -> None:
    (document,) = read_recipe(Path(__file__).parent / "examples" / "frankenmerge.yml").documents
    result = ours(document, oracle)
    assert result.layers == 16
    assert result.base is None
    by_name = {tensor.name: tensor for tensor in result.tensors}
    (source,) = by_name["model.layers.15.mlp.up_proj.weight"].sources
    assert (source.model, source.tensor) == (1, "model.layers.11.mlp.up_proj.weight")


def test_tokens_and_templates() -> None:
    from mergepipe.merge.recipe import ModelReference, ModelToken, Token

    (document,) = read_recipe(Path(__file__).parent / "examples" / "tokens.yml").documents
    assert document.chat_template == "chatml"
    tokenizer = document.tokenizer
    assert tokenizer is not None
    assert (tokenizer.source, tokenizer.pad_to_multiple_of) == ("union", 64)
    assert tokenizer.tokens == {
        "<|im_start|>": Token(ModelReference("tuned/code")),
        "<|eot_id|>": Token(ModelToken(ModelReference("tuned/maths"), "</s>", None), force=True),
        "<|row|>": Token(ModelToken(ModelReference("tuned/maths", "v1"), None, 7)),
        "<|unused|>": Token("zero"),
        "<|usual|>": Token(),
    }


def test_adapters_and_revisions() -> None:
    (document,) = read_recipe(Path(__file__).parent / "examples" / "lora.yml").documents
    assert [str(model) for model in document.models_used()] == [
        "plain/base+adapters/maths",
        "plain/base@v1+adapters/code@v2",
        "plain/base+adapters/chat@v3",
        "plain/base",
    ]
