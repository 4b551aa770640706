"""A stranger's store: its objects are whole, its ids are right, and its manifests say anything at all.

Nothing is written outside of the target folder, nothing wrong is written into it, and every error is one of ours.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mergepipe.store import Store
from mergepipe.store.check import verify
from mergepipe.store.errors import BadInputError, DamagedError, MergePipeError
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import FileEntry, Node, Shard, TensorEntry
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.staging import Staging
from support.checkpoints import RawTensor, random_tensor, write_checkpoint
from support.family import base_weights, write_model


@pytest.fixture(autouse=True)
def model(store: Store, tmp_path: Path) -> None:
    """A checkpoint that was ingested as ``m``, to begin with."""
    store.ingest([write_model(tmp_path / "m", base_weights())])


def publish_commit(store: Store, **root: object) -> None:
    snapshot = store.snapshot("m")
    changed = {"nodes": snapshot.root.nodes, "tensors": snapshot.root.tensors, "files": snapshot.root.files}
    with Staging(store.layout, store.catalog) as staging:
        node = Node(**{**changed, "shards": snapshot.root.shards, **root})  # type: ignore[arg-type]
        tree = staging.add_record(Kind.NODE, node.encode())
        commit = replace(snapshot.commit, tree=tree)
        digest = staging.add_record(Kind.COMMIT, commit.encode())
        update = RefUpdate("evil", None, digest)
        publish(store.catalog, staging, Changes(commits=[commit], refs=[update]))


@pytest.mark.parametrize("name", ["../out-of-the-folder", "/tmp/absolute", "a/../../b", "a\\b", "", "."])
def test_names_that_lead_out_of_the_folder(store: Store, tmp_path: Path, name: str) -> None:
    snapshot = store.snapshot("m")
    for root in (
        {"files": {name: snapshot.files["config.json"]}},
        {"shards": (Shard(name, snapshot.shards[0].header),)},
    ):
        publish_commit(store, **root)
        with pytest.raises(BadInputError, match="leave the folder"):
            store.snapshot("evil").export(tmp_path / "top" / "out")
        store.catalog.write(lambda view: view.delete("refs", b"evil"))
    assert not (tmp_path / "out-of-the-folder").exists()
    assert not (tmp_path / "top").exists() or list((tmp_path / "top").iterdir()) == []


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_header_that_is_none(store: Store, tmp_path: Path, file: str) -> None:
    publish_commit(store, shards=(Shard("model.safetensors", store.snapshot("m").files[file]),))
    for options in ({}, {"dtype": "F32"}):
        with pytest.raises(DamagedError, match="header"):
            store.snapshot("evil").export(tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_a_header_of_other_tensors(store: Store, tmp_path: Path) -> None:
    other = {"lm_head.weight": RawTensor("F32", (3,), bytes(12))}
    store.ingest([write_checkpoint(tmp_path / "other", other)])
    publish_commit(store, shards=store.snapshot("other").shards)
    with pytest.raises(MergePipeError, match=r"lm_head\.weight"):
        store.snapshot("evil").export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_longer_than_its_pieces(store: Store, tmp_path: Path) -> None:
    entry = store.snapshot("m").files["config.json"]
    for size in (entry.size + 1, entry.size - 1, 1 << 60):
        publish_commit(store, files={"config.json": FileEntry(size, entry.blocks)})
        with pytest.raises(DamagedError, match="piece"):
            store.snapshot("evil").export(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        store.catalog.write(lambda view: view.delete("refs", b"evil"))


def test_a_tensor_that_is_in_no_file(store: Store, tmp_path: Path) -> None:
    """It would be left out in silence."""
    extra = {**store.snapshot("m").root.tensors, "extra": store.snapshot("m").entry("lm_head.weight")}
    publish_commit(store, tensors=extra)
    with pytest.raises(DamagedError, match="'extra'"):
        store.snapshot("evil").export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_larger_than_its_blocks(hurt_store: Store, tmp_path: Path) -> None:
    hurt_store.ingest([write_checkpoint(tmp_path / "w", {"w": random_tensor("U8", (100,))})], ref="m")
    entry = hurt_store.snapshot("m").entry("w")
    for shape in ((99,), (101,), (1 << 40,)):
        publish_commit(hurt_store, tensors={"w": TensorEntry("U8", shape, shape, entry.blocks)}, shards=(), nodes={})
        snapshot = hurt_store.snapshot("evil")
        with pytest.raises((MergePipeError, MemoryError)):
            snapshot.read_tensor("w")
        assert "commit" in [item.kind for item in verify(hurt_store).damaged]
        hurt_store.catalog.write(lambda view: view.delete("refs", b"evil"))


def test_a_tree_that_goes_down_for_ever(store: Store) -> None:
    with Staging(store.layout, store.catalog) as staging:
        digest = staging.add_record(Kind.NODE, Node().encode())
        for _ in range(3000):
            digest = staging.add_record(Kind.NODE, Node(nodes={"a": digest}).encode())
        publish(store.catalog, staging, Changes())
    publish_commit(store, nodes={"a": digest})
    with pytest.raises(MergePipeError, match="deeper than any"):
        _ = store.snapshot("evil").tensors
    (found,) = verify(store).damaged
    assert (found.id, found.kind) == (store.resolve("evil"), "commit")
    store.catalog.write(lambda view: [view.delete("refs", b"evil"), view.delete("commits", found.id)])
