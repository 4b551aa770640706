"""What an adapter may ask for: ranks and scales as PEFT finds them, and an error for all that is not understood."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergepipe.merge import adapter_config
from mergepipe.merge.adapter_config import AdapterConfig
from mergepipe.merge.adapters import read_adapter
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError
from support.adapters import (
    CONFIG,
    EMBED,
    HEAD,
    PREFIX,
    RANK,
    UP,
    AdapterFiles,
    Arrays,
    Q,
    base_tensors,
    embedding,
    factors,
    random,
)
from support.merges import ingest_model


@pytest.fixture
def read(store: Store, tmp_path: Path) -> AdapterFiles:
    return AdapterFiles(store, tmp_path)


MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head", "q_proj", "model.xq_proj"]


@pytest.mark.parametrize(
    "patterns",
    [["q_proj"], ["^q_proj"], ["proj"], [".*proj"], ["layers.0"], [r"layers\.\d+\.mlp\..*", "up_proj"], ["lm_head|x"],
     ["1.mlp.up_proj", "up_proj"], ["up_proj", "1.mlp.up_proj"], ["self_attn.q_proj$"], ["^model.*"], [""]],
)  # fmt: skip
def test_patterns_match_as_in_peft(patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    ranks = {pattern: number for number, pattern in enumerate(patterns, 1)}
    config = AdapterConfig(99, 1.0, ranks, ranks, use_rslora=False, fan_in_fan_out=False, bias="", modules_to_save=())
    for module in MODULES:
        expected = ranks.get(get_pattern_key(list(ranks), module), 99)
        assert config.rank_of(module) == expected
        assert config.scale_of(module, 4) == (expected if expected != 99 else 1) / 4


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "DoRA"),
    ({"use_qalora": True}, "use_qalora is a variant"),
    ({"lora_bias": True}, "biases of its own"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers"),
    ({"target_parameters": ["experts.down"]}, "no linear layer"),
    ({"trainable_token_indices": [1]}, "single rows"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base before"),
    ({"init_lora_weights": "olora"}, "changes the base before"),
    ({"r": 4}, f"A of rank {RANK} and B of rank {RANK}, where adapter_config.json says 4"),
    ({"rank_pattern": {"q_proj": 5}}, "says 5"),
    ({"r": 0}, "r is 0, not a rank"),
    ({"r": None}, "has no r"),
    ({"r": True}, "r is True"),
    ({"r": 3.0}, "r is 3.0"),
    ({"lora_alpha": None}, "has no lora_alpha"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": 1e300}, "lora_alpha is 1e\\+300"),
    ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern of 'q_proj' is True"),
    ({"alpha_pattern": {"q_(": 1}}, "which is no pattern"),
    ({"rank_pattern": [1]}, "rank_pattern is \\[1\\]"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1"),
    ({"bias": "some"}, "bias is 'some'"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
]


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_hardly_ever_ends(read: AdapterFiles, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(adapter_config, "_PATIENCE_SECONDS", 0.2)
    endless = "((((.{1,100}){1,100}){1,100}){1,100})[a-i]"
    with pytest.raises(BadInputError, match="takes too long to match"):
        read(factors(Q, 32, 32), **{name: {endless: RANK}})


def test_patience_is_for_all_patterns_together() -> None:
    patience = adapter_config._Patience()
    before = patience.seconds
    for _ in range(100):
        assert patience.matches("layers.[0-9]+.q_proj", "model.layers.11.q_proj")
    assert 0 < patience.seconds < before


def test_configurations_that_cannot_be_honoured(read: AdapterFiles) -> None:
    for changes, message in CONFIGS:
        with pytest.raises(BadInputError, match=message) as error:
            read(factors(Q, 32, 32), **changes)
        assert error.value.hint, changes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "no JSON object"),
        (b'{"r": 1, "r": 2}', "stands twice"),
        (json.dumps({**CONFIG, "lora_alpha": math.nan}).encode(), "NaN is not JSON"),
        (json.dumps(CONFIG).replace("6", "1e999").encode(), "1e999 is more than a number can be"),
        (b" " * (11 << 20), "more than 10 MiB"),
    ],
)
def test_files_that_are_no_configuration(read: AdapterFiles, config: bytes, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        read(factors(Q, 32, 32), config=config)


A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
TENSORS: list[tuple[Arrays, dict[str, Any], str]] = [
    ({A: random(RANK, 32)}, {}, "has lora_A, which is not a pair"),
    ({B: random(32, RANK)}, {}, "has lora_B, which is not a pair"),
    ({A: random(RANK, 32), B: random(32, 4)}, {}, "A of rank 3 and B of rank 4"),
    (factors(Q, 32, 33), {}, r"is \[32, 33\], where the base's .* is \[32, 32\]"),
    (factors(UP, 81, 32), {}, r"is \[81, 32\], where the base's .* is \[80, 32\]"),
    (embedding() | {f"{PREFIX}{EMBED}.lora_embedding_B": random(33, RANK)}, {}, r"is \[33, 128\]"),
    ({A: np.zeros((RANK, 32), np.int8), B: random(32, RANK)}, {}, "lora_A.weight is I8"),
    ({A: random(RANK * 32), B: random(32, RANK)}, {}, r"A is \[96\]"),
    (factors("model.conv3", 24, 32), {}, "convolutions larger than 1 x 1"),
    (factors("model.packed", 32, 16), {}, "which the base has as U8"),
    (factors(Q, 32, 32) | {f"{PREFIX}{Q}.lora_magnitude_vector": random(32)}, {}, "DoRA"),
    (factors(Q, 32, 32) | {f"{PREFIX}{Q}.lora_B.bias": random(32)}, {}, "biases of its own"),
    (factors(Q, 32, 32) | {f"{PREFIX}{Q}.lora_A.scales": random(32)}, {}, "no tensor that a LoRA adapter has"),
    (factors(Q, 32, 32) | {f"{PREFIX}{Q}.bias": random(32)}, {"bias": "all"}, "a trained bias"),
    (factors(Q, 32, 32) | factors(Q, 32, 32, name="two"), {}, "more than one lora_A"),
    (factors(Q, 32, 32) | factors(Q.removeprefix("model."), 32, 32), {}, "has two entries for the base's"),
    (factors(Q, 32, 32) | {f"{PREFIX}{HEAD}.weight": random(130, 32)}, {}, r"is \[130, 32\], where"),
    (
        factors(Q, 32, 32) | {f"{PREFIX}score.weight": random(2, 32)},
        {},
        "score.weight, which the base does not",
    ),
    (
        factors(Q, 32, 32) | {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": random(2)},
        {},
        "does not have",
    ),
]


def test_tensors_that_do_not_fit(read: AdapterFiles) -> None:
    for tensors, changes, message in TENSORS:
        with pytest.raises(BadInputError, match=message):
            read(tensors, **changes)


def test_biases_of_saved_modules_come_with_them(read: AdapterFiles) -> None:
    tensors = {**factors(UP, 80, 32), f"{PREFIX}{Q}.bias": random(32), f"{PREFIX}{Q}.weight": random(32, 32)}
    assert set(read(tensors, bias="all", modules_to_save=["proj"]).replaced) == {f"{Q}.bias", f"{Q}.weight"}


def test_what_the_base_lacks_is_named_beside_what_is_near(read: AdapterFiles) -> None:
    tensors: Arrays = {}
    for number in range(5):
        tensors |= factors(f"model.layers.{number + 4}.q_proj", 32, 32)
    with pytest.raises(
        BadInputError, match=r"changes model\.layers\.4\..*6\.q_proj\.weight and 2 more, which"
    ) as error:
        read(tensors)
    assert f"'{Q}.weight'" in str(error.value.hint)


def test_a_model_is_no_adapter(store: Store, tmp_path: Path) -> None:
    ingest_model(store, tmp_path, "base", base_tensors())
    with pytest.raises(BadInputError, match=r"has no adapter_config\.json"):
        read_adapter(store, store.snapshot("base"), {})
