"""``mp verify``: what it looks at, what it says, and what it remembers. The damage itself is in ``test_damage``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from mergepipe.store import Digest, Store
from mergepipe.store import check as check_module
from mergepipe.store import check_records as check_records_module
from mergepipe.store.catalog import ObjectRow
from mergepipe.store.check import verify
from mergepipe.store.errors import NotFoundError, UsageError
from mergepipe.store.frame import Kind
from mergepipe.store.gc import collect
from mergepipe.store.manifest import build_tree
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.staging import Staging
from support.family import write_family
from support.stores import catalog_rows, flip_bit, object_files, object_path, objects_of


@pytest.fixture
def family(hurt_store: Store, tmp_path: Path) -> Store:
    base, experts = write_family(tmp_path)
    hurt_store.ingest([base])
    hurt_store.ingest(experts, base="base")
    return hurt_store


def marks(store: Store) -> set[bytes]:
    return set(catalog_rows(store, "damaged")["damaged"])


class TestWhatIsRead:
    def test_every_object_whole(self, family: Store) -> None:
        seen: list[tuple[str, int, int]] = []
        report = verify(family, progress=lambda *step: seen.append(step))
        sizes = object_files(family)
        assert (report.objects, report.checked_bytes, report.damaged) == (len(sizes), sum(sizes.values()), ())
        assert max(seen) == ("verify", report.checked_bytes, report.checked_bytes)

    def test_only_what_one_ref_needs(self, family: Store) -> None:
        everything = verify(family).objects
        assert verify(family, "base").objects < everything
        other = family.snapshot("expert1").entry("model.layers.0.mlp.up_proj.weight").blocks[0]
        shared = family.snapshot("base").entry("model.layers.0.mlp.up_proj.weight").blocks[0]
        flip_bit(object_path(family, other), 200)
        assert verify(family, "base").damaged == verify(family, "expert0").damaged == ()
        assert [item.id for item in verify(family, "expert1").damaged] == [other]
        flip_bit(object_path(family, shared), 200)
        assert shared in {item.id for item in verify(family, "expert0").damaged}, "a delta needs its base"

    def test_a_ref_that_is_not_there(self, family: Store) -> None:
        with pytest.raises(NotFoundError):
            verify(family, "expert9")

    def test_a_ref_whose_tree_is_damaged_is_reported_too(self, family: Store) -> None:
        tree = family.snapshot("expert0").commit.tree
        flip_bit(object_path(family, tree), 100)
        assert tree in {item.id for item in verify(family, "expert0").damaged}

    def test_an_empty_store(self, store: Store) -> None:
        report = verify(store)
        assert (report.objects, report.checked_bytes, report.damaged) == (0, 0, ())


class TestFast:
    def test_sizes_and_headers_alone(self, family: Store) -> None:
        blocks = family.snapshot("base").entry("lm_head.weight").blocks
        flip_bit(object_path(family, blocks[0]), 500)
        assert verify(family, fast=True).damaged == ()
        path = object_path(family, blocks[1])
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-1])
        assert [item.id for item in verify(family, fast=True).damaged] == [blocks[1]]

    def test_it_proves_nothing_well(self, family: Store) -> None:
        block = family.snapshot("base").entry("lm_head.weight").blocks[0]
        flip_bit(object_path(family, block), 500)
        verify(family)
        assert marks(family) == {block}
        verify(family, fast=True)
        assert marks(family) == {block}
        flip_bit(object_path(family, block), 500)
        verify(family, fast=True)
        assert marks(family) == {block}
        verify(family)
        assert marks(family) == set()


class TestReports:
    def test_the_refs_and_tensors_that_need_a_block(self, family: Store) -> None:
        block = family.snapshot("base").entry("model.layers.2.self_attn.q_proj.weight").blocks[1]
        flip_bit(object_path(family, block), 300)
        found = {item.id: item for item in verify(family).damaged}
        assert found[block].kind == "block"
        assert found[block].reason
        name = "model.layers.2.self_attn.q_proj.weight"
        assert set(found[block].used_by) == {f"base:{name}", f"expert0:{name}", f"expert1:{name}"}

    def test_the_files_that_need_a_piece(self, family: Store) -> None:
        (piece,) = family.snapshot("base").files["tokenizer.json"].blocks
        flip_bit(object_path(family, piece), 100)
        (found,) = verify(family).damaged
        assert found.kind == "file"
        assert set(found.used_by) == {f"{ref}:tokenizer.json" for ref in ("base", "expert0", "expert1")}

    def test_a_ref_to_a_commit_that_is_not_there(self, family: Store) -> None:
        commit = family.resolve("expert0")
        publish(family.catalog, None, Changes(refs=[RefUpdate("other", None, commit)]))
        family.catalog.write(lambda view: view.delete("commits", commit))
        found = {item.id: item for item in verify(family).damaged}
        assert "'" in found[commit].reason
        assert "not there" in found[commit].reason

    def test_an_object_that_has_no_row(self, family: Store) -> None:
        block = family.snapshot("expert0").entry("model.layers.0.self_attn.q_proj.weight").blocks[0]
        family.catalog.write(lambda view: view.delete("objects", block))
        (found,) = verify(family, "expert0").damaged
        assert (found.id, found.kind) == (block, "unknown")
        assert found.reason == f"object {block.short} is not in the catalog"
        assert found.used_by == ("expert0:model.layers.0.self_attn.q_proj.weight",)

    @pytest.mark.parametrize("ref", [None, "expert1"])
    def test_a_node_that_has_neither_row_nor_file(self, family: Store, ref: str | None) -> None:
        for lost in (
            next(iter(family.snapshot("expert1").root.nodes.values())),
            family.snapshot("expert1").commit.tree,
        ):
            family.catalog.write(lambda view, lost=lost: view.delete("objects", lost))  # type: ignore[misc]
            object_path(family, lost).unlink()
            found = {item.id: item for item in verify(family, ref).damaged}
            assert "needs it, and it is not there" in found[lost].reason
            assert "expert1" in found[lost].used_by

    def test_of_very_many_that_need_it_some_are_named(self, family: Store) -> None:
        commit = family.resolve("base")
        names = [f"same{number:02}" for number in range(30)]
        publish(family.catalog, None, Changes(refs=[RefUpdate(name, None, commit) for name in names]))
        (piece,) = family.snapshot("base").files["tokenizer.json"].blocks
        flip_bit(object_path(family, piece), 100)
        (found,) = verify(family).damaged
        assert len(set(found.used_by)) == len(found.used_by) == 20

    def test_a_tree_that_cannot_be_read_needs_records_alone(self, family: Store) -> None:
        """Its ref may need a damaged node or commit, and nobody knows; a block has others that name it."""
        node = family.snapshot("expert1").commit.tree
        block = family.snapshot("expert0").entry("model.layers.0.self_attn.q_proj.weight").blocks[0]
        for digest in (node, block):
            flip_bit(object_path(family, digest), 100)
        found = {item.id: item for item in verify(family).damaged}
        assert found[node].used_by == ("expert1",)
        assert found[block].used_by == ("expert0:model.layers.0.self_attn.q_proj.weight",)

    def test_a_commit_whose_row_is_another(self, family: Store) -> None:
        one, other = family.resolve("expert0"), family.resolve("expert1")
        row = catalog_rows(family, "commits")["commits"][other]
        family.catalog.write(lambda view: view.put("commits", one, row))
        found = {item.id: item for item in verify(family).damaged}
        assert "is not that commit" in found[one].reason

    def test_old_versions_are_looked_at_as_well(self, family: Store, tmp_path: Path) -> None:
        old = family.snapshot("expert0").entry("model.layers.0.self_attn.q_proj.weight").blocks[0]
        family.ingest([tmp_path / "expert1"], ref="expert0", base="base")
        object_path(family, old).unlink()
        found = {item.id: item for item in verify(family).damaged}
        assert "is missing" in found[old].reason
        assert found[old].used_by == ()


class TestInterrupted:
    def test_it_goes_on_where_it_was(self, family: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(check_module, "_BATCH", 10)
        everything = verify(family)
        assert (everything.skipped, everything.damaged) == (0, ())
        looked: list[Digest] = []
        original = check_module._check_object

        def until(store: Store, digest: Digest, row: ObjectRow, *, fast: bool) -> None:
            looked.append(digest)
            if len(looked) > 25:
                raise KeyboardInterrupt
            original(store, digest, row, fast=fast)

        monkeypatch.setattr(check_module, "_check_object", until)
        with pytest.raises(KeyboardInterrupt):
            verify(family)
        looked.clear()
        monkeypatch.setattr(check_module, "_check_object", original)
        with monkeypatch.context() as patch:  # one that is not to go on looks at all of it
            patch.setattr(check_module, "_note_progress", lambda *_: None)
            assert verify(family) == replace(everything, elapsed_seconds=ANY)
        rest = verify(family, resume=True)
        assert rest.skipped == 20
        assert rest.objects == everything.objects - 20
        assert verify(family, resume=True).skipped == 0  # that one came to its end

    def test_what_was_found_before_is_not_forgotten(self, family: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(check_module, "_BATCH", 10)
        first = min(Digest(key) for key in catalog_rows(family, "objects")["objects"])
        flip_bit(object_path(family, first), -1)
        original = check_module._note_progress

        def stop(store: Store, last: Digest | None) -> None:
            original(store, last)
            raise KeyboardInterrupt

        monkeypatch.setattr(check_module, "_note_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            verify(family)
        monkeypatch.setattr(check_module, "_note_progress", original)
        report = verify(family, resume=True)
        assert report.skipped == 9
        assert [damage.id for damage in report.damaged] == [first]

    def test_only_a_full_check_can(self, family: Store) -> None:
        for options in ({"fast": True}, {"ref": "base"}):
            with pytest.raises(UsageError, match="only a full check of the whole store can be resumed") as caught:
                verify(family, resume=True, **options)  # type: ignore[arg-type]
            assert caught.value.hint == "mp verify --resume"


def test_what_is_relied_on_meanwhile_is_damage_all_the_same(family: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = objects_of(family, Kind.BLOCK)[0]
    flip_bit(object_path(family, victim), 200)
    original = check_module._check_object

    def touched(store: Store, digest: Digest, row: ObjectRow, *, fast: bool) -> None:
        newer = replace(row, touched=row.touched + 1).pack()
        store.catalog.write(lambda view: view.put("objects", digest, newer))
        original(store, digest, row, fast=fast)

    monkeypatch.setattr(check_module, "_check_object", touched)
    assert [damage.id for damage in verify(family).damaged] == [victim]


def test_a_tensor_whose_block_has_another_size(family: Store) -> None:
    """Its node is what its id says, and so is the block: nobody else would see it."""
    snapshot = family.snapshot("base")
    name = "model.layers.0.self_attn.q_proj.weight"
    (piece,) = snapshot.files["tokenizer.json"].blocks
    entry = snapshot.entry(name)
    odd = replace(entry, blocks=(piece, *entry.blocks[1:]))
    with Staging(family.layout, family.catalog) as staging:
        tree = build_tree({**snapshot.tensors, name: odd}, {}, (), lambda data: staging.add_record(Kind.NODE, data))
        commit = replace(snapshot.commit, tree=tree)
        staging.add_record(Kind.COMMIT, commit.encode())
        publish(family.catalog, staging, Changes(commits=[commit], refs=[RefUpdate("odd", None, commit.id)]))
    (found,) = verify(family).damaged
    assert (found.id, found.kind, found.used_by) == (commit.id, "commit", ("odd",))
    assert re.fullmatch(f"tensor '{name}' needs 4096 bytes as block 0, and {piece.short} has [0-9]+", found.reason)


def test_what_is_collected_meanwhile_is_no_damage(family: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = objects_of(family, Kind.BLOCK)[0]
    original = check_module._check_object

    def collected(store: Store, digest: Digest, row: ObjectRow, *, fast: bool) -> None:
        if digest == victim and object_path(store, victim).exists():
            store.catalog.write(lambda view: view.delete("objects", victim))
            object_path(store, victim).unlink()
        original(store, digest, row, fast=fast)

    monkeypatch.setattr(check_module, "_check_object", collected)
    assert victim not in [damage.id for damage in verify(family).damaged]


def test_a_commit_that_is_collected_meanwhile_is_no_damage(family: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed first, and looked at when it is gone."""
    commit = family.resolve("expert1")
    original = check_records_module._of_commit

    def late(store: Store, digest: Digest, *rest: Any) -> dict[Digest, tuple[str, str]]:
        if digest == commit:
            publish(store.catalog, None, Changes(refs=[RefUpdate("expert1", commit, None)]))
            assert collect(store, apply=True, grace_seconds=0).commits == 1
        return original(store, digest, *rest)

    monkeypatch.setattr(check_records_module, "_of_commit", late)
    assert verify(family).damaged == ()
