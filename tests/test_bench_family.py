"""The family of the benches and the demo is what it says: seeded, well-formed, different where it should."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

FAMILY = Path(__file__).resolve().parent.parent / "bench" / "family.py"
SHAPE = ("--hidden", "64", "--layers", "3", "--head-dim", "16", "--intermediate", "96", "--vocab", "512")


def make(out: Path, *options: str) -> Path:
    command = [sys.executable, str(FAMILY), str(out), "--experts", "2", *SHAPE, *options]
    subprocess.run(command, check=True, capture_output=True)
    return out


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def bits(folder: Path) -> dict[str, np.ndarray]:
    """Tensor name -> its bf16 bits, through the safetensors library."""
    import torch

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name).view(torch.int16).numpy().view(np.uint16)
    return found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("family"), "--max-shard-size", "96KiB", "--touched-layers", "0,2")


def test_same_seed_same_bytes(family: Path, tmp_path: Path) -> None:
    options = ("--max-shard-size", "96KiB", "--touched-layers", "0,2")
    assert digests(make(tmp_path / "again", *options)) == digests(family)
    other = digests(make(tmp_path / "other", *options, "--seed", "1"))
    assert other.keys() == digests(family).keys()
    assert other != digests(family)


def test_experts_differ_in_touched_weights_only(family: Path) -> None:
    base, experts = bits(family / "base"), [bits(family / f"expert-{i}") for i in range(2)]
    for expert in experts:
        assert expert.keys() == base.keys()
        for name, values in expert.items():
            touched = "proj" in name and not name.startswith("model.layers.1.")
            assert np.array_equal(values, base[name]) != touched, name
    assert not np.array_equal(*(e["model.layers.0.mlp.up_proj.weight"] for e in experts))


def test_deltas_have_the_size_asked_for(family: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base, expert = (
        (bits(family / member)[name].astype(np.uint32) << 16).view(np.float32) for member in ("base", "expert-0")
    )
    assert np.std(base) == pytest.approx(0.02, rel=0.05)
    assert np.std(expert - base) == pytest.approx(2.4e-4, rel=0.05)


def test_index_agrees_with_shards(family: Path) -> None:
    for member in ("base", "expert-0", "expert-1"):
        folder = family / member
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(files) > 2
        assert sorted(set(index["weight_map"].values())) == files
        total = 0
        for path in folder.glob("*.safetensors"):
            header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
            assert header_bytes % 8 == 0
            with safe_open(path, framework="np") as file:
                assert {n for n, shard in index["weight_map"].items() if shard == path.name} == set(file.keys())
            total += path.stat().st_size - 8 - header_bytes
        assert index["metadata"]["total_size"] == total


def test_one_shard_is_one_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "family", "--max-shard-size", "1GiB") / "base"
    assert [path.name for path in folder.glob("*safetensors*")] == ["model.safetensors"]


def test_refuses_to_overwrite(family: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        make(family)
    assert b"is there already" in caught.value.stderr


def test_transformers_reads_config_and_tokenizer(family: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(family / "expert-0")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen3", 64, 3)
    assert AutoTokenizer.from_pretrained(family / "expert-0")("w5 w6")["input_ids"] == [5, 6]
