"""Differences between commits: found where they are, with norms where they are known, and without reading the rest."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mergepipe.store import Store
from mergepipe.store.diff import TensorChange, TreeDiff, diff
from support.checkpoints import raw, write_checkpoint
from support.family import LAYERS, Weights, base_weights, fine_tune

QUERY = "model.layers.1.self_attn.q_proj.weight"


def compare(
    store: Store, folder: Path, after: Weights, *, based: bool = True, shards: int = 1, **files: bytes
) -> TreeDiff:
    """The difference between the family's base and a model made from it."""
    kept = {"config.json": b"{}"}
    for name, weights, count, extra in (("base", base_weights(), 1, {}), ("after", after, shards, files)):
        tensors = {key: raw(value) for key, value in weights.items()}
        write_checkpoint(folder / name, tensors, shards=count, index=False, files={**kept, **extra})
    store.ingest([folder / "base"])
    store.ingest([folder / "after"], base="base" if based else None)
    return diff(store, store.snapshot("base"), store.snapshot("after"))


def only(found: TreeDiff) -> TensorChange:
    (change,) = found.tensors
    return change


def test_nothing(store: Store, tmp_path: Path) -> None:
    found = compare(store, tmp_path, base_weights())
    assert found == TreeDiff((), (), 0)


def test_one_block_of_one_tensor(store: Store, tmp_path: Path) -> None:
    after = base_weights()
    changed = after[QUERY].astype(np.float32)
    changed[40, 3] += 0.5
    after[QUERY] = changed.astype(ml_dtypes.bfloat16)
    found = compare(store, tmp_path, after)
    change = only(found)
    assert (change.name, change.change) == (QUERY, "changed")
    assert (change.changed_blocks, change.blocks) == (1, 2)
    step = float(after[QUERY].astype(np.float64)[40, 3] - base_weights()[QUERY].astype(np.float64)[40, 3])
    assert change.norms is not None
    assert (change.norms.changed, change.norms.elements) == (1, 32 * 64)
    assert change.norms.l2 == pytest.approx(step)
    assert change.norms.largest == pytest.approx(step)
    # The root, `model`, `model.layers` and one layer, on both sides; the other layers are not looked at.
    assert found.nodes_read == 8
    assert LAYERS > 2


def test_norms_add_up_over_blocks_and_work_both_ways(store: Store, tmp_path: Path) -> None:
    before, after = base_weights(), fine_tune(base_weights(), 0)
    found = compare(store, tmp_path, after)
    assert len(found.tensors) == 2 * LAYERS
    for change in found.tensors:
        delta = after[change.name].astype(np.float64) - before[change.name].astype(np.float64)
        assert change.norms is not None
        assert change.norms.l2 == pytest.approx(float(np.linalg.norm(delta)), rel=1e-6)
        assert change.norms.largest == pytest.approx(float(np.abs(delta).max()))
    back = diff(store, store.snapshot("after"), store.snapshot("base"))
    assert [change.norms for change in back.tensors] == [change.norms for change in found.tensors]


def test_norms_that_nobody_measured(store: Store, tmp_path: Path) -> None:
    found = compare(store, tmp_path, fine_tune(base_weights(), 0), based=False)
    assert found.tensors
    assert all(change.norms is None and change.changed_blocks == change.blocks for change in found.tensors)


def test_added_and_removed(store: Store, tmp_path: Path) -> None:
    after = base_weights()
    del after["lm_head.weight"]
    after["model.layers.7.mlp.up_proj.weight"] = after[QUERY]
    after["other.weight"] = after[QUERY]
    found = compare(store, tmp_path, after)
    assert [(change.name, change.change) for change in found.tensors] == [
        ("lm_head.weight", "removed"),
        ("other.weight", "added"),
        ("model.layers.7.mlp.up_proj.weight", "added"),
    ]
    assert found.tensors[0].after is None
    assert found.tensors[1].before is None


def test_reshaped(store: Store, tmp_path: Path) -> None:
    after = base_weights()
    after["lm_head.weight"] = np.concatenate([after["lm_head.weight"], after["lm_head.weight"][:1]])
    change = only(compare(store, tmp_path, after))
    assert change.change == "reshaped"
    assert (change.changed_blocks, change.blocks) == (1, 5), "rows appended leave the blocks before them shared"


def test_another_type(store: Store, tmp_path: Path) -> None:
    after = base_weights()
    after["model.norm.weight"] = after["model.norm.weight"].astype(np.float32)
    change = only(compare(store, tmp_path, after))
    assert change.change == "reshaped"
    assert change.norms is None


def test_files(store: Store, tmp_path: Path) -> None:
    found = compare(store, tmp_path, base_weights(), **{"config.json": b'{"a": 1}', "new.txt": b"hello"})
    assert [(change.path, change.change, change.before_bytes, change.after_bytes) for change in found.files] == [
        ("config.json", "changed", 2, 8),
        ("new.txt", "added", None, 5),
    ]
    assert not found.tensors
    assert not found.layout_changed
    back = diff(store, store.snapshot("after"), store.snapshot("base"))
    assert [change.change for change in back.files] == ["changed", "removed"]


def test_other_shards(store: Store, tmp_path: Path) -> None:
    found = compare(store, tmp_path, base_weights(), shards=3)
    assert found.layout_changed
    assert not found.tensors
