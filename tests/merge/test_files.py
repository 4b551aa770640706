"""What a result has beside weights: the donor's files, with its configuration changed where the merge changes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from mergepipe.merge import Plan, execute
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError
from support.checkpoints import raw, write_checkpoint
from support.family import Weights, base_weights, fine_tune
from support.merges import make_plan
from support.stores import catalog_rows, state_of

BASE = base_weights()


def ingest(store: Store, folder: Path, name: str, weights: Weights, files: dict[str, bytes], **options: Any) -> None:
    tensors = {tensor: raw(array) for tensor, array in weights.items()}
    store.ingest([write_checkpoint(folder / name, tensors, files=files)], ref=name, **options)


def family_with(store: Store, folder: Path, config: Any) -> Store:
    """``base`` with a configuration, given as a value or as bytes (None: without), and an expert with another."""
    files = {"tokenizer.json": b"{}\n", "sub/config.json": b'{"torch_dtype": "float64"}'}
    if config is not None:
        files["config.json"] = config if isinstance(config, bytes) else json.dumps(config).encode()
    ingest(store, folder, "base", BASE, files)
    theirs = {"config.json": b'{"torch_dtype": "float64", "mine": 1}', "extra.txt": b"of math"}
    ingest(store, folder, "math", fine_tune(BASE, 1), theirs, base="base")
    return store


def config_of(store: Store, ref: str) -> Any:
    return json.loads(store.snapshot(ref).read_file("config.json"))


def merged(store: Store, plan: Plan) -> None:
    execute(store, plan, "merged")


@pytest.mark.parametrize(
    ("dtype", "name"), [("bfloat16", "bfloat16"), ("F32", "float32"), ("float16", "float16"), ("F64", "float64")]
)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_configuration_names_the_results_type(
    store: Store, tmp_path: Path, key: str, dtype: str, name: str
) -> None:
    """Under the key that it has for it: newer ones write ``dtype``. All else stays, in its order."""
    config = {"model_type": "toy", key: "int8", "nested": {"torch_dtype": "int8"}, "é": [1, 2.5, None]}
    family_with(store, tmp_path, config)
    merged(store, make_plan(store, "linear", {"math": 1.0}, dtype=dtype))
    assert config_of(store, "merged") == {**config, key: name}
    assert list(config_of(store, "merged")) == list(config)
    ours, bases = store.snapshot("merged").files, store.snapshot("base").files
    assert ours.keys() == bases.keys()
    assert {path for path in ours if ours[path] != bases[path]} == {"config.json"}


def test_both_keys_and_none(store: Store, tmp_path: Path) -> None:
    family_with(store, tmp_path, {"torch_dtype": "int8", "dtype": "mine"})
    plan = make_plan(store, "linear", {"math": 1.0}, dtype="F32")
    assert plan.config == {"torch_dtype": "float32"}
    merged(store, plan)
    assert config_of(store, "merged") == {"torch_dtype": "float32", "dtype": "mine"}


def test_a_configuration_that_names_no_type_does_then(store: Store, tmp_path: Path) -> None:
    family_with(store, tmp_path, {"model_type": "toy"})
    merged(store, make_plan(store, "linear", {"math": 1.0}, dtype="F32"))
    assert config_of(store, "merged") == {"model_type": "toy", "torch_dtype": "float32"}


@pytest.mark.parametrize("config", [{"torch_dtype": "float32"}, b'{ "torch_dtype":"float32"}', None])
@pytest.mark.parametrize("dtype", ["F32", None])
def test_what_needs_no_change_is_the_donors_file_itself(
    store: Store, tmp_path: Path, config: Any, dtype: str | None
) -> None:
    """To the byte, however it is written; where there is none, none is made up."""
    family_with(store, tmp_path, config)
    merged(store, make_plan(store, "linear", {"math": 1.0}, dtype=dtype))
    assert store.snapshot("merged").files == store.snapshot("base").files


@pytest.mark.parametrize("config", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_configuration_that_is_none_is_named(store: Store, tmp_path: Path, config: bytes) -> None:
    """It stands in the way only where it would have to be changed."""
    family_with(store, tmp_path, config)
    merged(store, make_plan(store, "linear", {"math": 1.0}))
    assert store.snapshot("merged").read_file("config.json") == config
    plan = make_plan(store, "linear", {"math": 1.0}, dtype="F32")
    before = catalog_rows(store, "refs", "commits")
    with pytest.raises(BadInputError, match=r"the config\.json of 'base' is no JSON"):
        execute(store, plan, "other")
    assert catalog_rows(store, "refs", "commits") == before


def test_another_model_may_give_the_files(store: Store, tmp_path: Path) -> None:
    family_with(store, tmp_path, {"torch_dtype": "int8"})
    plan = make_plan(store, "linear", {"math": 1.0}, dtype="F32")
    merged(store, replace(plan, files=1, config={"torch_dtype": "float32"}))
    assert config_of(store, "merged") == {"torch_dtype": "float32", "mine": 1}
    assert store.snapshot("merged").files["extra.txt"] == store.snapshot("math").files["extra.txt"]
    assert "tokenizer.json" not in store.snapshot("merged").files


def test_a_result_of_another_type_can_be_exported_and_loaded(store: Store, tmp_path: Path) -> None:
    """Files that say one thing, all of them."""
    family_with(store, tmp_path, {"torch_dtype": "bfloat16"})
    merged(store, make_plan(store, "linear", {"math": 1.0}, dtype="F32"))
    store.snapshot("merged").export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float32"}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype.name for array in found.values()} == {"float32"}
    before = state_of(store)
    assert execute(store, make_plan(store, "linear", {"math": 1.0}, dtype="F32"), "merged").unchanged
    assert state_of(store) == before
