"""Healing: whoever has the bytes, and whatever else they have; nothing wrong comes in, nothing there is touched."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergepipe.store import Digest, Store
from mergepipe.store import heal as heal_module
from mergepipe.store.check import verify
from mergepipe.store.digest import hash_bytes
from mergepipe.store.errors import BadInputError, NotFoundError, UsageError
from mergepipe.store.frame import Encoding, Header, Kind, pack_header, unpack_header
from mergepipe.store.heal import HealReport, find_broken, heal
from mergepipe.store.heal_sources import Found
from mergepipe.store.refs import find_ref
from support.checkpoints import folder_bytes
from support.family import write_family
from support.stores import (
    assert_clean,
    catalog_rows,
    flip_bit,
    object_path,
    objects_of,
    rewrite,
    state_of,
    writers_left,
)

LAYER = "model.layers.1.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Pair:
    """A store to be harmed, a whole copy of it, and the checkpoints."""

    store: Store
    copy: Path
    base: Path
    expert: Path
    before: object

    def ids(self) -> dict[str, Digest]:
        """One object of each sort."""
        base, expert = self.store.snapshot("base"), self.store.snapshot("expert0")
        nodes = expert.node(expert.node(expert.root.nodes["model"]).nodes["layers"]).nodes
        return {
            "planes": base.entry("lm_head.weight").blocks[1],
            "base of a delta": base.entry(LAYER).blocks[0],
            "delta": expert.entry(LAYER).blocks[0],
            "file": expert.files["tokenizer.json"].blocks[0],
            "header of a shard": expert.shards[0].header.blocks[0],
            "node": nodes["1"],
            "root": expert.commit.tree,
            "commit": expert.commit_id,
        }

    def heal(self, source: Path | None = None, **options: bool) -> HealReport:
        return heal(self.store, source or self.copy, **options)


SORTS = ["planes", "base of a delta", "delta", "file", "header of a shard", "node", "root", "commit"]


@pytest.fixture
def pair(hurt_store: Store, tmp_path: Path) -> Pair:
    base, (expert, _) = write_family(tmp_path)
    hurt_store.ingest([base])
    hurt_store.ingest([expert], base="base")
    copy = tmp_path / "copy"
    shutil.copytree(hurt_store.layout.root, copy)
    return Pair(hurt_store, copy, base, expert, state_of(hurt_store))


def files_of(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class TestFromAStore:
    @pytest.mark.parametrize("sort", SORTS)
    @pytest.mark.parametrize("harm", ["delete", "cut", "flip"])
    def test_every_sort_of_object(self, pair: Pair, tmp_path: Path, sort: str, harm: str) -> None:
        digest, delta = pair.ids()[sort], pair.ids()["delta"]
        path = object_path(pair.store, digest)
        if harm == "delete":
            path.unlink()
        elif harm == "cut":
            rewrite(path, path.read_bytes()[:-1])
        else:
            flip_bit(path, path.stat().st_size - 1, 3)
        there = files_of(pair.copy)
        report = pair.heal(verify_first=harm == "flip")
        healed = {each.id for each in report.healed}  # verify marks a delta whose base is damaged
        assert digest in healed <= {digest, delta}
        assert not report.missing
        assert not report.refused
        assert files_of(pair.copy) == there
        assert state_of(pair.store) == pair.before
        assert_clean(pair.store)
        pair.store.snapshot("expert0").export(tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == folder_bytes(pair.expert)
        assert writers_left(pair.store) == []

    def test_everything_at_once(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        """All object files gone, in batches of 5: bases come back before their deltas."""
        monkeypatch.setattr(heal_module, "_BATCH_OBJECTS", 5)
        for path in pair.store.layout.objects.glob("*/*"):
            path.unlink()
        report = pair.heal()
        assert len(report.healed) == len(catalog_rows(pair.store, "objects")["objects"])
        assert not report.missing
        assert state_of(pair.store) == pair.before
        assert_clean(pair.store)

    def test_a_whole_store_needs_nothing(self, pair: Pair) -> None:
        assert pair.heal(verify_first=True) == HealReport("store", (), (), ())
        assert state_of(pair.store) == pair.before

    def test_what_is_not_known_is_not_looked_for(self, pair: Pair) -> None:
        flip_bit(object_path(pair.store, pair.ids()["delta"]), -1)
        assert not pair.heal().healed
        assert verify(pair.store).damaged
        assert len(pair.heal().healed) == 1
        assert not catalog_rows(pair.store, "damaged")["damaged"]

    def test_an_object_without_a_row(self, pair: Pair) -> None:
        digest = pair.ids()["planes"]
        pair.store.catalog.write(lambda view: view.delete("objects", digest))
        report = pair.heal(verify_first=True)
        assert [each.id for each in report.healed] == [digest]
        assert state_of(pair.store) == pair.before

    def test_a_base_without_a_row_does_not_become_a_delta(self, pair: Pair) -> None:
        digest = pair.ids()["base of a delta"]
        pair.store.catalog.write(lambda view: view.delete("objects", digest))
        verify(pair.store)
        pair.heal()
        assert digest in objects_of(pair.store, Kind.BLOCK, Encoding.PLANES)
        assert_clean(pair.store)

    def test_a_delta_whose_base_is_lost_everywhere_comes_back_whole(self, pair: Pair) -> None:
        """The other store has it by itself; here its base is gone."""
        ids = pair.ids()
        shutil.rmtree(pair.copy)
        with Store.create(pair.copy, block_bytes=4096) as other:
            other.ingest([pair.expert])
        for sort in ("delta", "base of a delta"):
            object_path(pair.store, ids[sort]).unlink()
        report = pair.heal()
        assert {each.id for each in report.healed} == {ids["delta"]}
        assert {each.id for each in report.missing} == {ids["base of a delta"]}
        assert ids["delta"] in objects_of(pair.store, Kind.BLOCK, Encoding.PLANES)
        report = pair.heal(pair.base)
        assert not report.missing
        assert_clean(pair.store)

    @pytest.mark.parametrize("harm", ["no row", "flip"])
    def test_a_delta_whose_base_cannot_be_used_comes_back_whole(self, pair: Pair, harm: str) -> None:
        """Of the base nothing is known yet, when the delta is looked for."""
        ids = pair.ids()
        base, delta = ids["base of a delta"], ids["delta"]
        object_path(pair.store, delta).unlink()
        if harm == "flip":
            flip_bit(object_path(pair.store, base), -1)
        else:
            pair.store.catalog.write(lambda view: view.delete("objects", base))
        assert [each.id for each in pair.heal().healed] == [delta]
        assert delta in objects_of(pair.store, Kind.BLOCK, Encoding.PLANES)
        assert [each.id for each in pair.heal(verify_first=True).healed] == [base]
        assert_clean(pair.store)

    def test_what_somebody_else_brought_meanwhile_is_left_as_it_is(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = pair.ids()["planes"]
        object_path(pair.store, digest).unlink()
        original = heal_module.StoreSource.find

        def late(*arguments: Any) -> Iterator[Found]:
            pair.store.ingest([pair.base])
            assert object_path(pair.store, digest).exists()
            return original(*arguments)

        monkeypatch.setattr(heal_module.StoreSource, "find", late)
        assert not pair.heal().healed
        assert find_broken(pair.store) == []
        assert_clean(pair.store)

    def test_what_the_disk_spoils_again_counts_as_missing(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        digest = pair.ids()["planes"]
        object_path(pair.store, digest).unlink()
        original = heal_module.publish

        def spoil(*arguments: Any) -> None:
            original(*arguments)
            flip_bit(object_path(pair.store, digest), -1)

        with monkeypatch.context() as patched:
            patched.setattr(heal_module, "publish", spoil)
            report = pair.heal()
        assert not report.healed
        assert [each.id for each in report.missing] == [digest]
        assert [each.id for each in pair.heal(verify_first=True).healed] == [digest]

    def test_a_preview(self, make_store: Callable[..., Store], tmp_path: Path) -> None:
        base, (expert, _) = write_family(tmp_path)
        store = make_store(block_bytes=8192)
        store.ingest([base])
        store.ingest([expert], base="base", previews=True)
        shutil.copytree(store.layout.root, tmp_path / "copy")
        before = state_of(store)
        digest = objects_of(store, Kind.PREVIEW)[0]
        object_path(store, digest).unlink()
        (healed,) = heal(store, tmp_path / "copy").healed
        assert (healed.id, healed.kind) == (digest, Kind.PREVIEW)
        assert state_of(store) == before

    def test_a_store_in_other_encodings_does(self, pair: Pair, tmp_path: Path) -> None:
        with Store.create(tmp_path / "other", block_bytes=4096) as other:
            other.ingest([pair.expert])
            other.ingest([pair.base], base="expert0")
        for sort in ("delta", "base of a delta", "file"):
            object_path(pair.store, pair.ids()[sort]).unlink()
        assert not pair.heal(tmp_path / "other").missing
        assert state_of(pair.store) == pair.before
        assert_clean(pair.store)

    def test_its_catalog_is_not_needed(self, pair: Pair) -> None:
        shutil.rmtree(pair.copy / "catalog")
        object_path(pair.store, pair.ids()["delta"]).unlink()
        assert len(pair.heal().healed) == 1

    def test_the_folder_that_holds_it_will_do(self, pair: Pair, tmp_path: Path) -> None:
        (tmp_path / "around").mkdir()
        pair.copy.rename(tmp_path / "around" / ".mp")
        object_path(pair.store, pair.ids()["node"]).unlink()
        assert len(pair.heal(tmp_path / "around").healed) == 1

    def test_a_read_only_disk(self, pair: Pair, mounted_disk: Callable[..., Path]) -> None:
        disk = mounted_disk("8m")
        shutil.copytree(pair.copy, disk / "copy")
        object_path(pair.store, pair.ids()["planes"]).unlink()
        if os.system(f"mount -o remount,ro {disk}"):
            pytest.skip("cannot be made read-only")
        assert len(pair.heal(disk / "copy").healed) == 1
        assert state_of(pair.store) == pair.before

    def test_not_itself_and_not_nothing(self, pair: Pair, tmp_path: Path) -> None:
        with pytest.raises(UsageError):
            pair.heal(pair.store.layout.root)
        with pytest.raises(NotFoundError):
            pair.heal(tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(BadInputError):
            pair.heal(tmp_path / "empty")


class TestCommits:
    def test_the_catalogs_copy_comes_from_the_object(self, pair: Pair) -> None:
        digest = pair.ids()["commit"]
        pair.store.catalog.write(lambda view: view.put("commits", digest, b"{}"))
        report = pair.heal(pair.base)
        assert [each.id for each in report.healed] == [digest]
        assert state_of(pair.store) == pair.before

    def test_and_the_object_from_the_catalog(self, pair: Pair) -> None:
        object_path(pair.store, pair.ids()["commit"]).unlink()
        assert not pair.heal(pair.base).missing
        assert state_of(pair.store) == pair.before

    def test_both_from_elsewhere(self, pair: Pair) -> None:
        digest = pair.ids()["commit"]
        object_path(pair.store, digest).unlink()
        pair.store.catalog.write(lambda view: view.delete("commits", digest))
        with pair.store.catalog.reading() as view:
            ref = find_ref(view, "expert0")
        assert ref is not None
        assert not pair.heal().missing
        assert state_of(pair.store) == pair.before

    def test_a_parent_to_which_no_ref_leads(self, pair: Pair) -> None:
        parent = pair.store.snapshot("base").commit_id
        with pair.store.catalog.reading() as view:
            ref = view.get("refs", b"base")
        assert ref is not None
        pair.store.catalog.write(lambda view: [view.delete("commits", parent), view.delete("refs", b"base")])
        object_path(pair.store, parent).unlink()
        assert {each.id for each in find_broken(pair.store)} == {parent}
        assert not pair.heal().missing
        pair.store.catalog.write(lambda view: view.put("refs", b"base", ref))
        assert state_of(pair.store) == pair.before

    def test_one_whose_parent_is_nowhere_is_not_put(self, pair: Pair) -> None:
        child, parent = pair.ids()["commit"], pair.store.snapshot("base").commit_id
        pair.store.catalog.write(lambda view: [view.delete("commits", each) for each in (child, parent)])
        pair.store.catalog.write(lambda view: view.delete("refs", b"base"))
        for digest in (child, parent):
            object_path(pair.store, digest).unlink()
        object_path_of(pair.copy, parent).unlink()
        assert {each.id for each in pair.heal().missing} == {child, parent}


def object_path_of(root: Path, digest: Digest) -> Path:
    return root / "objects" / digest.hex()[:2] / digest.hex()[2:]


def delta_to(base: Digest) -> bytes:
    payload = bytes(100)
    return pack_header(Header(Kind.BLOCK, Encoding.DELTA, 2, 4096, len(payload), base), [payload]) + payload


def framed(kind: Kind, data: bytes) -> bytes:
    header = Header(kind, Encoding.RAW, 1, len(data), len(data), None)
    return pack_header(header, [data]) + data


class TestHostileStores:
    """Their files say anything; the ids say what is true."""

    def refused(self, pair: Pair, content: bytes, sort: str = "planes") -> str:
        digest = pair.ids()[sort]
        object_path(pair.store, digest).unlink()
        rewrite(object_path_of(pair.copy, digest), content)
        report = pair.heal()
        assert not report.healed
        assert [each.id for each in report.missing] == [each.id for each in report.refused] == [digest]
        assert not object_path(pair.store, digest).exists()
        return report.refused[0].reason

    def test_other_content_of_the_same_size(self, pair: Pair) -> None:
        assert "does not have the content" in self.refused(pair, framed(Kind.BLOCK, bytes(4096)))

    def test_another_size(self, pair: Pair) -> None:
        assert "bytes there" in self.refused(pair, framed(Kind.BLOCK, bytes(5000)))

    def test_no_object_at_all(self, pair: Pair) -> None:
        assert "cannot be read" in self.refused(pair, b"nonsense" * 100)

    def test_another_record(self, pair: Pair) -> None:
        digest = pair.ids()["node"]
        size = unpack_header(object_path(pair.store, digest).read_bytes()).raw_bytes
        self.refused(pair, framed(Kind.NODE, b"{}".ljust(size)), "node")

    def test_a_bomb(self, pair: Pair) -> None:
        payload = zlib.compress(bytes(50 << 20))
        digest = pair.ids()["node"]
        size = unpack_header(object_path(pair.store, digest).read_bytes()).raw_bytes
        header = Header(Kind.NODE, Encoding.DEFLATE, 1, size, len(payload), None)
        self.refused(pair, pack_header(header, [payload]) + payload, "node")

    @pytest.mark.parametrize("sort", ["node", "planes"])
    def test_a_size_that_nothing_has_of_what_is_not_known_here(self, pair: Pair, sort: str) -> None:
        digest = pair.ids()[sort]
        pair.store.catalog.write(lambda view: view.delete("objects", digest))
        verify(pair.store)
        object_path(pair.store, digest).unlink()
        header = Header(Kind.NODE if sort == "node" else Kind.BLOCK, Encoding.RAW, 1, 1 << 40, 2, None)
        rewrite(object_path_of(pair.copy, digest), pack_header(header, [b"{}"]) + b"{}")
        report = pair.heal()
        assert "claims 1099511627776 bytes" in next(each.reason for each in report.refused if each.id == digest)
        assert digest in {each.id for each in report.missing}

    def test_a_file_in_the_place_of_its_folder(self, pair: Pair) -> None:
        digest = pair.ids()["planes"]
        object_path(pair.store, digest).unlink()
        folder = object_path_of(pair.copy, digest).parent
        shutil.rmtree(folder)
        folder.write_bytes(b"")
        report = pair.heal()
        assert [each.id for each in report.missing] == [digest]
        assert "cannot be read there" in report.refused[0].reason

    def test_a_delta_to_a_huge_base(self, pair: Pair) -> None:
        data = np.random.default_rng(0).bytes(9000)
        rewrite(object_path_of(pair.copy, hash_bytes(data)), framed(Kind.BLOCK, data))
        assert "more than it can need" in self.refused(pair, delta_to(hash_bytes(data)))

    def test_a_delta_to_nothing(self, pair: Pair) -> None:
        assert "base is missing" in self.refused(pair, delta_to(hash_bytes(b"none")))

    def test_a_delta_to_itself(self, pair: Pair) -> None:
        self.refused(pair, delta_to(pair.ids()["planes"]))

    @pytest.mark.parametrize("what", ["link", "pipe", "folder"])
    def test_what_is_no_plain_file(self, pair: Pair, tmp_path: Path, what: str) -> None:
        digest = pair.ids()["planes"]
        mine, theirs = object_path(pair.store, digest), object_path_of(pair.copy, digest)
        (tmp_path / "aside").write_bytes(mine.read_bytes())
        mine.unlink()
        theirs.unlink()
        if what == "link":
            theirs.symlink_to(tmp_path / "aside")
        elif what == "pipe":
            os.mkfifo(theirs)
        else:
            theirs.mkdir()
        report = pair.heal()
        assert "no plain file" in report.refused[0].reason
        assert report.missing

    def test_a_base_that_is_a_pipe(self, pair: Pair) -> None:
        digest = pair.ids()["delta"]
        base = unpack_header(object_path(pair.store, digest).read_bytes()).base
        assert base is not None
        object_path(pair.store, digest).unlink()
        object_path_of(pair.copy, base).unlink()
        os.mkfifo(object_path_of(pair.copy, base))
        assert "no plain file" in pair.heal().refused[0].reason


class TestFromACheckpoint:
    @pytest.mark.parametrize(
        "sort", ["planes", "base of a delta", "delta", "file", "header of a shard", "node", "root"]
    )
    def test_every_sort_that_it_can_have(self, pair: Pair, sort: str) -> None:
        digest = pair.ids()[sort]
        object_path(pair.store, digest).unlink()
        report = pair.heal(pair.expert if sort in ("delta", "node", "root") else pair.base)
        assert report.source == "checkpoint"
        assert [each.id for each in report.healed] == [digest]
        assert state_of(pair.store) == pair.before
        assert_clean(pair.store)

    def test_everything_at_once(self, pair: Pair) -> None:
        """Of the objects of both, only the commits' copies in the catalog are left."""
        for path in pair.store.layout.objects.glob("*/*"):
            path.unlink()
        first = pair.heal(pair.base)
        assert first.missing
        second = pair.heal(pair.expert)
        assert not second.missing
        assert state_of(pair.store) == pair.before
        assert_clean(pair.store)

    def test_a_single_file_of_weights(self, pair: Pair) -> None:
        object_path(pair.store, pair.ids()["delta"]).unlink()
        assert len(pair.heal(pair.expert / "model.safetensors").healed) == 1
        assert state_of(pair.store) == pair.before

    def test_what_it_does_not_have_is_said(self, pair: Pair) -> None:
        digest = pair.ids()["delta"]
        object_path(pair.store, digest).unlink()
        (missing,) = pair.heal(pair.base).missing
        assert (missing.id, missing.kind, missing.reason) == (digest, Kind.BLOCK, "its file is missing")
        assert find_broken(pair.store) == [missing]

    def test_chunks_that_are_cut_otherwise(self, make_store: Callable[..., Store], tmp_path: Path) -> None:
        """Blocks that follow the base's chunks, in a store whose own would be others."""
        base, (expert, _) = write_family(tmp_path)
        with in_larger_blocks(make_store(damaged=True), base) as again:
            again.ingest([expert], base="base")
            digest = again.snapshot("expert0").entry(LAYER).blocks[0]
            object_path(again, digest).unlink()
            assert [each.id for each in heal(again, expert).healed] == [digest]
            assert_clean(again)

    def test_chunks_of_two_models_that_are_cut_differently(
        self, make_store: Callable[..., Store], tmp_path: Path
    ) -> None:
        """The same tensor, lost in both."""
        base, (expert, _) = write_family(tmp_path)
        with in_larger_blocks(make_store(damaged=True), base) as again:
            again.ingest([expert])
            earlier, later = (again.snapshot(ref).entry(LAYER).blocks[0] for ref in ("base", "expert0"))
            for digest in (earlier, later):
                object_path(again, digest).unlink()
            assert [each.id for each in heal(again, expert).healed] == [later]
            assert [each.id for each in heal(again, base).healed] == [earlier]
            assert_clean(again)


def in_larger_blocks(store: Store, base: Path) -> Store:
    """The store, opened again with blocks of 8 KiB, and with a model in it that is cut into 4 KiB."""
    from mergepipe.store import layout as layout_module

    store.ingest([base])
    settings = store.layout.root / layout_module._SETTINGS
    settings.write_text(settings.read_text().replace("4096", "8192"))
    return Store.open(store.layout.root)
