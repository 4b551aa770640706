"""What people download, fuzzed: checkpoints in both forms, their indices and configurations, plans and recipes."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mergepipe.merge.adapter_config import read_config
from mergepipe.merge.plan_file import decode_plan
from mergepipe.merge.recipe import parse_recipe
from mergepipe.merge.tokenizer import read_tokenizer, usable
from mergepipe.merge.validate import check_plan
from mergepipe.store import Store
from mergepipe.store.canonical import load_strict
from mergepipe.store.checkpoint import Checkpoint, open_checkpoint
from mergepipe.store.manifest import FileEntry
from mergepipe.store.snapshot import Snapshot
from support.checkpoints import HeaderStyle, RawTensor, folder_bytes, random_tensor, safetensors_bytes, write_checkpoint
from support.fuzz import Target, mutate_bytes, mutate_json, mutate_text

_EXAMPLES = Path(__file__).resolve().parent.parent / "merge" / "recipe" / "examples"


def _tensors(seed: int = 0) -> dict[str, RawTensor]:
    return {
        "model.layers.0.w": random_tensor("BF16", (4, 6), seed),
        "model.layers.1.w": random_tensor("BF16", (4, 6), seed + 1),
        "model.embed.weight": random_tensor("F32", (3, 2), seed + 2),
        "flags": random_tensor("U8", (5,), seed + 3),
        "scalar": random_tensor("F64", (), seed + 4),
        "none": random_tensor("I32", (0, 3), seed + 5),
    }


def _contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every tensor's bytes, read in pieces of odd sizes as well."""
    found = {}
    for name, source in checkpoint.tensors.items():
        size = int(np.prod(source.shape, dtype=object)) * source.dtype.bits // 8
        out = np.empty(size, np.uint8)
        source.read_into(0, out)
        if size > 3:
            part = np.empty(size - 3, np.uint8)
            source.read_into(3, part)
            assert part.tobytes() == out.tobytes()[3:], "a piece that is not where it should be"
        found[name] = out.tobytes()
    return found


class Safetensors:
    """A file that is other bytes: refused, or its tensors are where its header says, and it comes out as it came in."""

    rounds = 25  # one accepted file of so many goes through a store

    def __init__(self, _zoo: Path, work: Path) -> None:
        self.path, self.work = work / "model.safetensors", work
        styles = [HeaderStyle(), HeaderStyle(metadata={"format": "pt"}, indent=1), HeaderStyle(padding=" " * 9)]
        self.corpus = [safetensors_bytes(_tensors(seed), style) for seed, style in enumerate(styles)]
        self.accepted = 0

    def mutate(self, dice: random.Random) -> bytes:
        good = dice.choice(self.corpus)
        if dice.random() < 0.3:
            return mutate_bytes(dice, [good, *self.corpus])
        end = 8 + int.from_bytes(good[:8], "little")
        head = mutate_json(dice, json.loads(good[8:end]))
        return len(head).to_bytes(8, "little") + head + good[end:]

    def check(self, data: bytes) -> str | None:
        self.path.write_bytes(data)
        with open_checkpoint(self.path) as checkpoint:
            found = _contents(checkpoint)
        end = 8 + int.from_bytes(data[:8], "little")
        header = {name: entry for name, entry in json.loads(data[8:end]).items() if name != "__metadata__"}
        assert found.keys() == header.keys()
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            assert found[name] == data[end + first : end + last], "wrong bytes"
        self.accepted += 1
        if self.accepted % self.rounds == 1:
            self._round_trip(data)
        return None

    def _round_trip(self, data: bytes) -> None:
        folder = self.work / "store"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.work / "out", ignore_errors=True)
        with Store.create(folder, block_bytes=4096) as store:
            store.ingest([self.path], ref="m")
            store.snapshot("m").export(self.work / "out")
        assert folder_bytes(self.work / "out") == {"model.safetensors": data}, "not the file that came in"


class Indices:
    """The index of a model's shards: refused, or the shards' tensors, no other files' and none left out."""

    def __init__(self, _zoo: Path, work: Path) -> None:
        self.work = work
        (work / "secret.safetensors").write_bytes(safetensors_bytes({"secret": random_tensor("U8", (9,))}))
        self.folder = write_checkpoint(work / "model", _tensors(), shards=3)
        self.index = self.folder / "model.safetensors.index.json"
        self.good = self.index.read_bytes()
        self.expected = {name: tensor.data for name, tensor in _tensors().items()}

    def mutate(self, dice: random.Random) -> bytes:
        if dice.random() < 0.3:
            return mutate_bytes(dice, [self.good])
        return mutate_json(dice, json.loads(self.good))

    def check(self, data: bytes) -> str | None:
        self.index.write_bytes(data)
        with open_checkpoint(self.folder) as checkpoint:
            found = _contents(checkpoint)
            assert len(checkpoint.tensors) + len(checkpoint.files) > 1
        assert found.items() <= self.expected.items(), "a tensor of wrong bytes, or from elsewhere"
        return None if found == self.expected else "fewer shards"


class TorchFiles:
    """PyTorch files, of both forms: nothing runs, and what is read is what torch itself reads."""

    def __init__(self, _zoo: Path, work: Path) -> None:
        import torch

        self.path, self.marker = work / "model.bin", work / "marker"
        numbers = torch.arange(24, dtype=torch.float32)
        values: list[Any] = [
            {"a.w": numbers.reshape(4, 6), "b": {"c": numbers[:2].bfloat16(), "d": [numbers[3:5], 7]}},
            OrderedDict(embed=numbers.reshape(6, 4).t(), head=numbers[::2], step=3),
            {"w": numbers.reshape(2, 12), "x": _RunsCode(self.marker)},
        ]
        self.corpus = []
        for value in values:
            for modern in (True, False):
                torch.save(value, self.path, _use_new_zipfile_serialization=modern)
                self.corpus.append(self.path.read_bytes())

    def mutate(self, dice: random.Random) -> bytes:
        good = dice.choice(self.corpus)
        if dice.random() < 0.5:
            # The pickle is a small part of the file: what is in front of the storages.
            start = max(good.find(b"\x80\x02"), 0)
            part = mutate_bytes(dice, [good[start : start + 500]])
            return good[:start] + part + good[start + 500 :]
        return mutate_bytes(dice, [good, good, good, *self.corpus])

    def check(self, data: bytes) -> str | None:
        import torch

        self.path.write_bytes(data)
        try:
            with open_checkpoint(self.path) as checkpoint:
                found = _contents(checkpoint)
        finally:
            assert not self.marker.exists(), "code of the file was run"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # without mapping it, torch looks at more of the zip file
            return "read, and not by torch unmapped"
        for name, tensor in _flat(value, ""):
            assert found[name] == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), "wrong bytes"
        return None


class _RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def _flat(value: Any, prefix: str) -> list[tuple[str, Any]]:
    import torch

    if isinstance(value, torch.Tensor):
        return [(prefix, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else []
    return [found for key, item in items for found in _flat(item, f"{prefix}.{key}" if prefix else str(key))]


class _Files(Snapshot):
    """A commit that has files alone, from memory."""

    def __init__(self, content: Mapping[str, bytes]) -> None:
        self.content = content

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return {name: FileEntry(len(data), ()) for name, data in self.content.items()}

    def read_file(self, path: str) -> bytes:
        return self.content[path]


_LORA: dict[str, Any] = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "use_dora": False, "use_rslora": True,
    "fan_in_fan_out": False, "rank_pattern": {"q_proj": 4, r"layers\.[0-3]\.up": 2}, "alpha_pattern": {"q_proj": 32.5},
    "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base", "init_lora_weights": True, "layer_replication": None,
}  # fmt: skip
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 3, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "linear", "factor": 2.0}, "layer_types": ["full", "full", "sliding"], "vocab_size": 128,
    "_name_or_path": "org/base", "tie_word_embeddings": False,
}  # fmt: skip


class Adapters:
    """An adapter's configuration: refused, or ranks and scales that are numbers one can count with."""

    def __init__(self, _zoo: Path, work: Path) -> None:
        self.folder = work

    def mutate(self, dice: random.Random) -> bytes:
        return mutate_json(dice, _LORA)

    def check(self, data: bytes) -> str | None:
        config = read_config(_Files({"adapter_config.json": data}), "lora")
        for module in ("model.layers.0.q_proj", "x" * 300, "", "a\nb", "lm_head"):
            rank = config.rank_of(module)
            assert type(rank) is int and rank >= 1
            assert np.isfinite(config.scale_of(module, rank))
            assert config.saves(module) in (True, False)
        return None


class Configurations:
    """``config.json``: nothing of it is needed, so nothing of it may be an error when a model is looked at."""

    def __init__(self, _zoo: Path, work: Path) -> None:
        self.folder = write_checkpoint(work / "model", _tensors())

    def mutate(self, dice: random.Random) -> bytes:
        good = json.dumps(_CONFIG).encode()
        return mutate_json(dice, _CONFIG) if dice.random() < 0.7 else mutate_bytes(dice, [good])

    def check(self, data: bytes) -> str | None:
        (self.folder / "config.json").write_bytes(data)
        with open_checkpoint(self.folder) as checkpoint:
            assert isinstance(checkpoint.base_hint(), str)
        config = _Files({"config.json": data}).config()
        assert isinstance(config, dict)
        return None if config else "as if there were none"


_BPE: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 5, "content": "<pad>", "special": True}, {"id": 6, "content": "<x>", "lstrip": False}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}, "merges": ["a b", ["b", "c"]]},
}
_UNIGRAM: dict[str, Any] = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.5]]}, "added_tokens": []}
_SETTINGS: dict[str, Any] = {
    "added_tokens_decoder": {"5": {"content": "<pad>"}, "6": {"content": "<x>"}},
    "pad_token": "<pad>", "eos_token": {"content": "</s>", "special": True}, "extra_special_tokens": ["<y>"],
}  # fmt: skip


class Tokenizers:
    """``tokenizer.json`` and the settings beside it: refused, or ids that are each some token's."""

    def __init__(self, _zoo: Path, work: Path) -> None:
        self.folder = work

    def mutate(self, dice: random.Random) -> bytes:
        tokenizer = dice.choice([_BPE, _UNIGRAM])
        return mutate_json(dice, {"tokenizer": tokenizer, "settings": _SETTINGS})

    def check(self, data: bytes) -> str | None:
        value = load_strict(data, "tokenizer.json")
        both = value if isinstance(value, dict) else {}
        settings = both.get("settings")
        found = read_tokenizer(both.get("tokenizer"), settings if isinstance(settings, dict) else {}, "tokenizer.json")
        assert all(type(row) is int and row >= 0 for row in found.ids.values())
        assert usable(found, 3).items() <= found.ids.items()
        return None


class Plans:
    """A plan: refused when it is read or when it is checked against the store, or one that says the same again."""

    def __init__(self, zoo: Path, work: Path) -> None:
        self.plan = (zoo / "plan.json").read_bytes()
        shutil.rmtree(work / "store", ignore_errors=True)
        shutil.copytree(zoo / "store", work / "store")
        self.store = Store.open(work / "store")

    def mutate(self, dice: random.Random) -> bytes:
        return mutate_bytes(dice, [self.plan]) if dice.random() < 0.2 else mutate_json(dice, json.loads(self.plan))

    def check(self, data: bytes) -> str | None:
        plan = decode_plan(data, "p.json")
        again = decode_plan(plan.encode(), "again")
        assert again == plan and again.id == plan.id
        check_plan(self.store, plan)
        return None


class Recipes:
    """A recipe: refused with its line, or read."""

    def __init__(self, _zoo: Path, work: Path) -> None:
        self.folder = work
        self.corpus = [path.read_text(encoding="utf-8") for path in sorted(_EXAMPLES.glob("*.yml"))]

    def mutate(self, dice: random.Random) -> bytes:
        text = mutate_text(dice, self.corpus)
        data = text.encode("utf-8", "surrogatepass")
        return mutate_bytes(dice, [data]) if dice.random() < 0.1 else data

    def check(self, data: bytes) -> str | None:
        recipe = parse_recipe(data.decode("utf-8", "replace"), "r.yml")
        for document in recipe.documents:
            assert document.method and list(document.references())
        return None


TARGETS: dict[str, Callable[[Path, Path], Target]] = {
    "safetensors": Safetensors,
    "shard indices": Indices,
    "PyTorch files": TorchFiles,
    "adapter configs": Adapters,
    "config.json": Configurations,
    "tokenizers": Tokenizers,
    "plans": Plans,
    "recipes": Recipes,
}
