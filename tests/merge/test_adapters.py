"""Adapters as experts: deltas as PEFT merges them, whatever the cut, and nothing that is not understood."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge import adapter_kernels
from mergepipe.merge.adapters import Adapter, AdapterReader, LowRank, is_adapter, read_adapter
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError, DamagedError
from mergepipe.store.objects import ObjectReader, Role
from support.adapters import (
    CONFIG,
    EMBED,
    HEAD,
    PREFIX,
    UP,
    AdapterFiles,
    Arrays,
    Floats,
    Q,
    base_tensors,
    embedding,
    factors,
    random,
    write_adapter,
)
from support.merges import ingest_model, weights_of
from support.stores import flip_bit, object_path
from support.strategies import seeds


@pytest.fixture
def read(store: Store, tmp_path: Path) -> AdapterFiles:
    return AdapterFiles(store, tmp_path)


def delta(store: Store, low: LowRank) -> Floats:
    out = np.empty(math.prod(low.shape), np.float32)
    AdapterReader(store.reader).delta_into(low, 0, out)
    return out.reshape(low.shape)


def applied(store: Store, adapter: Adapter) -> Arrays:
    """The base's weights with the adapter, in float32."""
    result = {}
    for name, weight in weights_of(store, "base").items():
        if name in adapter.replaced:
            entry = adapter.replaced[name]
            key = next(key for key, other in store.snapshot("adapter").tensors.items() if other == entry)
            result[name] = weights_of(store, "adapter")[key]
        else:
            result[name] = weight + delta(store, adapter.deltas[name]) if name in adapter.deltas else weight
    return result


# ---- the real PEFT as the oracle


@dataclass(frozen=True)
class Case:
    """A model and the arguments of PEFT's LoraConfig, and how many tensors they change and replace."""

    model: str
    changed: int
    replaced: int
    arguments: dict[str, Any]


CASES = {
    "patterns": Case("llama", 10, 0, {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj", "o_proj"],
        "rank_pattern": {"q_proj": 8, "1.mlp.up_proj": 2, r"^model\.layers\.0\.self_attn\.v_proj": 6, "own_proj": 64},
        "alpha_pattern": {r"layers\.[01]\.mlp\..*": 3, "layers.0.self_attn.q_proj": 5, "q_proj": 20},
    }),
    "rslora": Case("llama", 14, 0, {"r": 16, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True}),
    "embeddings": Case("llama", 3, 6, {
        "r": 5, "lora_alpha": 2, "target_modules": ["embed_tokens", "k_proj"], "modules_to_save": ["lm_head", "norm"],
        "alpha_pattern": {"embed_tokens": 7},
    }),
    "fan_in_fan_out": Case("gpt2", 7, 0, {
        "r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True,
    }),
}  # fmt: skip


def tiny_model(kind: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=128, n_positions=16)
        return transformers.GPT2LMHeadModel(config)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128, tie_word_embeddings=False,
        )
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore")
def test_the_result_is_that_of_peft(store: Store, tmp_path: Path, case: Case) -> None:
    import peft
    import torch

    model = tiny_model(case.model)
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(**case.arguments, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    expected = {name: weight.numpy() for name, weight in copy.deepcopy(tuned).merge_and_unload().state_dict().items()}

    store.ingest([tmp_path / "base"], ref="base")
    store.ingest([tmp_path / "adapter"], ref="adapter", base="base")
    assert is_adapter(store.snapshot("adapter"))
    assert not is_adapter(store.snapshot("base"))
    adapter = read_adapter(store, store.snapshot("adapter"), store.snapshot("base").tensors)
    assert len(adapter.deltas) == case.changed
    assert len(adapter.replaced) == case.replaced
    for name, weight in applied(store, adapter).items():
        error, largest = np.abs(weight - expected[name]).max(), np.abs(expected[name]).max()
        assert error <= 1e-6 * largest, name


# ---- any cut gives the same bits


def in_order(left: Floats, right: Floats, scale: float) -> Floats:
    """The product as it is defined: float32 sums from the first rank to the last."""
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        total += left[:, k : k + 1] * right[k : k + 1]
    return np.asarray(total * np.float32(scale), np.float32)


@given(st.data(), seeds)
def test_any_part_of_a_product_has_the_same_bits(data: st.DataObject, seed: int) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 2, 7, 64, 130, 700]))
    rank = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 64, 257]))
    left, right = random(rows, rank, seed=seed), random(rank, columns, seed=seed + 1)
    start = data.draw(st.integers(0, rows * columns))
    out = np.empty(data.draw(st.integers(0, rows * columns - start)), np.float32)
    adapter_kernels.low_rank(left, right, np.float32(0.3), start, out)
    expected = in_order(left, right, 0.3).reshape(-1)[start : start + out.size]
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_cuts_and_threads_do_not_matter(store: Store, read: AdapterFiles) -> None:
    adapter = read({**factors(UP, 80, 32), **embedding()})
    for low in adapter.deltas.values():
        whole = delta(store, low).reshape(-1)
        for step in (1, 7, 31, 32, 33, 1000, whole.size):
            parts, reader = np.zeros_like(whole), AdapterReader(store.reader)

            def part(
                start: int, reader: AdapterReader = reader, low: LowRank = low, parts: Floats = parts, step: int = step
            ) -> None:
                reader.delta_into(low, start, parts[start : start + step])

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(part, range(0, whole.size, step)))
            assert parts.tobytes() == whole.tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_factors_of_any_type_are_multiplied_in_float32(store: Store, read: AdapterFiles, dtype: Any) -> None:
    tensors = {name: array.astype(dtype) for name, array in factors(UP, 80, 32).items()}
    adapter = read(tensors)
    a, b = (array.astype(np.float32) for array in tensors.values())
    np.testing.assert_array_equal(delta(store, adapter.deltas[f"{UP}.weight"]), in_order(b, a, 2.0))


def test_a_part_that_the_delta_does_not_have_is_refused(store: Store, read: AdapterFiles) -> None:
    low = read(factors(Q, 32, 32)).deltas[f"{Q}.weight"]
    for start, size in ((-1, 1), (1020, 5), (1025, 0)):
        with pytest.raises(ValueError, match="a delta that has 1024"):
            AdapterReader(store.reader).delta_into(low, start, np.empty(size, np.float32))


# ---- what is read


def test_factors_are_read_once_and_counted(store: Store, read: AdapterFiles) -> None:
    adapter = read({**factors(UP, 80, 32), **factors(HEAD, 128, 32)})
    reader = ObjectReader(store.layout)
    deltas = AdapterReader(reader)
    lows = list(adapter.deltas.values())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: deltas.delta_into(lows[n % 2], n, np.empty(5, np.float32)), range(400)))
    blocks = {block for low in lows for entry in (low.a, low.b) for block in entry.blocks}
    assert reader.counters.objects == {Role.BASE: 0, Role.EXPERT: 4, Role.OTHER: 0}
    assert len(blocks) == 3  # both have the same A, and a pair is what is kept
    stored = [object_path(store, block).stat().st_size for low in lows for e in (low.a, low.b) for block in e.blocks]
    assert reader.counters.stored[Role.EXPERT] == sum(stored)


def test_the_cache_is_bounded(store: Store, read: AdapterFiles) -> None:
    """The last two stay whatever their size is; what went is read again."""
    tensors = {**factors(UP, 80, 32), **factors(HEAD, 128, 32), **embedding()}
    lows = list(read(tensors).deltas.values())
    for limit, reads in ((0, [2, 4, 6, 8, 8, 8, 10]), (1 << 20, [2, 4, 6, 6, 6, 6, 6])):
        reader = ObjectReader(store.layout)
        deltas = AdapterReader(reader, cache_bytes=limit)
        seen = []
        for number in (0, 1, 2, 0, 2, 0, 1):
            deltas.delta_into(lows[number], 0, np.empty(1, np.float32))
            seen.append(reader.counters.objects[Role.EXPERT])
        assert seen == reads


def test_a_damaged_factor_is_said_each_time(hurt_store: Store, tmp_path: Path) -> None:
    store = hurt_store
    ingest_model(store, tmp_path, "base", base_tensors())
    store.ingest([write_adapter(tmp_path / "adapter", factors(Q, 32, 32), CONFIG)], ref="adapter")
    low = read_adapter(store, store.snapshot("adapter"), store.snapshot("base").tensors).deltas[f"{Q}.weight"]
    path = object_path(store, low.b.blocks[0])
    data = path.read_bytes()
    flip_bit(path, path.stat().st_size - 1)
    deltas = AdapterReader(store.reader)
    for _ in range(2):
        with pytest.raises(DamagedError):
            deltas.delta_into(low, 0, np.empty(9, np.float32))
    path.unlink()
    path.write_bytes(data)
    deltas.delta_into(low, 0, np.empty(9, np.float32))


# ---- names


@pytest.mark.parametrize("name", ["", "default", "my-adapter"])
def test_the_adapters_own_name_may_stand_in_the_keys(read: AdapterFiles, name: str) -> None:
    saved = f"{PREFIX}{HEAD}.modules_to_save.{name}.weight" if name else f"{PREFIX}{HEAD}.weight"
    tensors = {**factors(Q, 32, 32, name=name), **embedding(name=name), saved: random(128, 32)}
    adapter = read(tensors, modules_to_save=["lm_head"])
    assert set(adapter.deltas) == {f"{Q}.weight", f"{EMBED}.weight"}
    assert set(adapter.replaced) == {f"{HEAD}.weight"}
    assert adapter.deltas[f"{Q}.weight"].scale == 2.0


def test_the_models_prefix_may_be_there_or_not(read: AdapterFiles) -> None:
    without = {name.removeprefix("model."): array for name, array in base_tensors().items()}
    assert set(read(factors(Q, 32, 32), base=without).deltas) == {f"{Q}.weight".removeprefix("model.")}
    assert set(read(factors(Q.removeprefix("model."), 32, 32), base=base_tensors()).deltas) == {f"{Q}.weight"}
    bare = {name.removeprefix(PREFIX): array for name, array in factors(Q, 32, 32).items()}
    assert set(read(bare).deltas) == {f"{Q}.weight"}


def test_a_name_that_may_be_two_tensors_is_refused(read: AdapterFiles) -> None:
    weight = random(32, 32)
    with pytest.raises(BadInputError, match=r"may be the base's model\.model\.q\.weight or q\.weight"):
        read(factors("model.q", 32, 32), base={"model.model.q.weight": weight, "q.weight": weight})
    exact = {"model.q.weight": weight, "q.weight": weight}
    assert set(read(factors("model.q", 32, 32), base=exact).deltas) == {"model.q.weight"}


@pytest.mark.parametrize(
    ("shapes", "flag", "transposed"),
    [
        ({Q: (32, 32), UP: (80, 32)}, False, {Q: False, UP: False}),
        ({Q: (32, 32)}, True, {Q: True}),
        ({UP: (80, 32)}, True, {UP: False}),  # the shape says so: PEFT takes it from the kind of layer
        ({UP: (32, 80)}, False, {UP: True}),
        ({"model.conv": (24, 32, 1, 1), Q: (32, 32)}, True, {"model.conv": False, Q: True}),
        ({Q: (32, 32), UP: (80, 32)}, True, None),
    ],
)
def test_orientation(
    store: Store, read: AdapterFiles, shapes: dict[str, tuple[int, ...]], flag: bool, transposed: dict[str, bool] | None
) -> None:
    tensors: Arrays = {}
    for module, (rows, columns, *ones) in shapes.items():
        for key, array in factors(module, rows, columns).items():
            tensors[key] = array.reshape(*array.shape, *ones)
    if transposed is None:
        with pytest.raises(BadInputError, match=r"not known how model\.layers\.0\.q_proj\.weight is stored"):
            read(tensors, fan_in_fan_out=flag)
        return
    adapter = read(tensors, fan_in_fan_out=flag)
    assert {name.removesuffix(".weight"): low.transposed for name, low in adapter.deltas.items()} == transposed
    for module, (rows, columns, *_) in shapes.items():
        a, b = factors(module, rows, columns).values()
        product = in_order(b, a, 2.0)
        expected = product.T if transposed[module] else product
        np.testing.assert_array_equal(
            delta(store, adapter.deltas[f"{module}.weight"]).reshape(expected.shape), expected
        )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float16])
def test_a_copy_of_a_targeted_embedding_is_no_replacement(read: AdapterFiles, dtype: Any) -> None:
    copied = base_tensors()[f"{EMBED}.weight"].astype(dtype)
    key = f"{PREFIX}{EMBED}.base_layer.weight"
    adapter = read({**embedding(), key: copied})
    assert set(adapter.deltas) == {f"{EMBED}.weight"}
    assert not adapter.replaced
    copied[5, 5] += 1
    with pytest.raises(BadInputError, match="replaces a tensor that the adapter has a delta for"):
        read({**embedding(), key: copied})
