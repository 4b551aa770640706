"""Other encodings, the same content: smaller, never wrong, and a delta's base is never a delta, whenever it dies."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb
import numpy as np
import pytest

from mergepipe.store import Digest, Store, codecs, filesystem
from mergepipe.store import repack as repack_module
from mergepipe.store import replace as replace_module
from mergepipe.store.catalog import ObjectRow, unix_time
from mergepipe.store.check import verify
from mergepipe.store.digest import hash_bytes
from mergepipe.store.errors import BadInputError, ConflictError, EnvironmentalError, UsageError
from mergepipe.store.frame import Encoding, Header, Kind, pack_header, unpack_header
from mergepipe.store.publish import Changes, publish
from mergepipe.store.repack import Repacked, measure, models_to_repack, repack
from mergepipe.store.replace import (
    Replacement,
    bases_of_deltas,
    refuse_other_writers,
    replace_objects,
    settle,
    unsettled,
)
from mergepipe.store.staging import Staging
from mergepipe.store.suggest import suggest_stored_base
from support.checkpoints import folder_bytes, raw, write_checkpoint
from support.family import base_weights, fine_tune, write_family, write_model
from support.processes import run_python
from support.stores import assert_clean, catalog_rows, flip_bit, object_path, rewrite, state_of, writers_left

LAYER = "model.layers.1.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Family:
    """A store whose experts came in without their base."""

    store: Store
    base: Path
    experts: list[Path]

    def check(self, folder: Path) -> None:
        """Everything comes out as it came in, and deltas are to blocks that are none."""
        for path in [self.base, *self.experts]:
            target = folder / path.name
            shutil.rmtree(target, ignore_errors=True)
            self.store.snapshot(path.name).export(target)
            assert folder_bytes(target) == folder_bytes(path)
        check_bases(self.store)


@pytest.fixture
def family(store: Store, tmp_path: Path) -> Family:
    base, experts = write_family(tmp_path)
    store.ingest([base])
    for expert in experts:
        store.ingest([expert])
    return Family(store, base, experts)


def check_bases(store: Store) -> None:
    """By files and by rows: a file that is a delta has a row that says so, and a base that is none."""
    with store.catalog.reading() as view:
        for key, _ in view.items("objects"):
            row, header = view.object_row(Digest(key)), header_of(store, Digest(key))
            assert row is not None
            if header.base is not None:
                assert row.encoding is Encoding.DELTA
                assert header_of(store, header.base).encoding is not Encoding.DELTA
                base = view.object_row(header.base)
                assert base is not None
                assert base.encoding is not Encoding.DELTA


def header_of(store: Store, digest: Digest) -> Header:
    return unpack_header(object_path(store, digest).read_bytes()[:96])


def row_of(store: Store, digest: Digest) -> ObjectRow:
    with store.catalog.reading() as view:
        row = view.object_row(digest)
    assert row is not None
    return row


def encodings(store: Store, ref: str) -> set[Encoding]:
    """Those of the blocks that differ from the base's."""
    known = {block for entry in store.snapshot("base").tensors.values() for block in entry.blocks}
    blocks = {block for entry in store.snapshot(ref).tensors.values() for block in entry.blocks}
    return {row_of(store, block).encoding for block in blocks - known}


def run(store: Store, *refs: str, base: str | None = None) -> list[Repacked]:
    return repack(store, models_to_repack(store, refs, base))


def stored_bytes(store: Store) -> int:
    return sum(int.from_bytes(row[16:24], "little") for row in catalog_rows(store, "objects")["objects"].values())


def put_as(store: Store, digest: Digest, encoding: Encoding, base: Digest | None = None) -> None:
    """Store a block as an older release, or one with another choice, might have."""
    row = row_of(store, digest)
    data = np.frombuffer(store.reader.read_piece(digest, row.raw_bytes), np.uint8)
    if encoding is Encoding.DELTA:
        assert base is not None
        other = np.frombuffer(store.reader.read_piece(base, row.raw_bytes), np.uint8)
        payload = codecs.encode_delta(data, other, row.width)
    else:
        payload = [data.data] if encoding is Encoding.RAW else codecs.encode_planes(data, row.width)
    size = codecs.payload_size(payload)
    header = Header(row.kind, encoding, row.width, row.raw_bytes, size, base)
    rewrite(object_path(store, digest), b"".join(map(bytes, [pack_header(header, payload), *payload])))
    new = ObjectRow(row.kind, encoding, row.width, row.raw_bytes, header.stored_bytes, row.touched, base)
    store.catalog.write(lambda view: view.put("objects", digest, new.pack()))


def staged_delta(store: Store, staging: Staging, own: str, other: str) -> Replacement:
    """One model's block, staged as a difference to the other's."""
    digest, base = (store.snapshot(ref).entry(LAYER).blocks[0] for ref in (own, other))
    data, root = (np.frombuffer(store.reader.read_piece(each, 4096), np.uint8) for each in (digest, base))
    parts = codecs.encode_delta(data, root, 2)
    header = Header(Kind.BLOCK, Encoding.DELTA, 2, 4096, codecs.payload_size(parts), base)
    return Replacement(digest, row_of(store, digest), staging.put_encoded(digest, header, parts))


class TestWithoutABase:
    def test_what_came_in_without_its_base_becomes_differences(self, family: Family, tmp_path: Path) -> None:
        store = family.store
        before, size = state_of(store)["rows"], stored_bytes(store)
        assert encodings(store, "expert0") == {Encoding.PLANES}
        results = run(store)
        assert encodings(store, "expert0") == encodings(store, "expert1") == {Encoding.DELTA}
        saved = sum(result.saved_bytes for result in results)
        assert saved == size - stored_bytes(store) > 0.1 * size
        after = state_of(store)["rows"]
        assert isinstance(before, dict)
        assert isinstance(after, dict)
        assert before["objects"].keys() == after["objects"].keys()
        assert {name: rows for name, rows in before.items() if name != "objects"} == {
            name: rows for name, rows in after.items() if name != "objects"
        }
        family.check(tmp_path / "out")
        assert writers_left(store) == []

    def test_it_is_as_small_as_if_the_base_had_been_named(
        self, family: Family, make_store: Callable[..., Store]
    ) -> None:
        run(family.store)
        other = make_store()
        other.ingest([family.base])
        other.ingest(family.experts, base="base")
        ours, theirs = (
            {
                block: row_of(store, block).stored_bytes
                for ref in ("expert0", "expert1")
                for block in blocks_of(store, ref)
            }
            for store in (family.store, other)
        )
        assert ours == theirs

    def test_again_there_is_nothing_to_gain(self, family: Family) -> None:
        run(family.store)
        state = state_of(family.store)
        assert [result.replaced for result in run(family.store)] == [0, 0, 0]
        assert state_of(family.store) == state

    def test_the_base_is_found(self, family: Family) -> None:
        models = {model.ref: model for model in models_to_repack(family.store)}
        assert {name: model.base_name for name, model in models.items()} == {
            "base": "", "expert0": "base", "expert1": "base",
        }  # fmt: skip
        assert "of the blocks sampled" in models["expert0"].why
        assert suggest_stored_base(family.store, family.store.snapshot("base")) is None

    def test_or_named_or_known(self, family: Family) -> None:
        (model,) = models_to_repack(family.store, ["expert1"], "expert0")
        assert (model.base_name, model.why) == ("expert0", "it was named")
        family.store.ingest([family.experts[1]], base="base")
        (model,) = models_to_repack(family.store, ["expert1"])
        assert (model.base_name, model.why) == ("base", "its commit says so")
        with pytest.raises(UsageError):
            models_to_repack(family.store, base="base")

    def test_a_named_base_that_has_none_of_its_tensors(self, family: Family, tmp_path: Path) -> None:
        weights = {"alone": raw(base_weights()["lm_head.weight"])}
        family.store.ingest([write_checkpoint(tmp_path / "stranger", weights)])
        with pytest.raises(BadInputError, match="none of the 1 tensors of 'stranger'"):
            models_to_repack(family.store, ["stranger"], "base")

    def test_an_adapter_is_no_difference_to_a_base(self, family: Family, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "adapter", base_weights())
        (folder / "adapter_config.json").write_text("{}")
        family.store.ingest([folder])
        (model,) = models_to_repack(family.store, ["adapter"], "base")
        assert model.base is None

    def test_a_model_that_resembles_nothing_stays(self, family: Family, tmp_path: Path) -> None:
        family.store.ingest([write_model(tmp_path / "alone", base_weights(seed=9))])
        (model,) = models_to_repack(family.store, ["alone"])
        assert model.base is None
        assert run(family.store, "alone")[0].replaced == 0


def blocks_of(store: Store, ref: str) -> set[Digest]:
    return {block for entry in store.snapshot(ref).tensors.values() for block in entry.blocks}


class TestDryRuns:
    def test_nothing_is_written(self, family: Family) -> None:
        before = state_of(family.store)
        measured = measure(family.store, models_to_repack(family.store), full=True)
        assert state_of(family.store) == before
        assert writers_left(family.store) == []
        assert not any(result.is_estimate for result in measured)
        done = run(family.store)
        assert [(m.blocks, m.replaced, m.saved_bytes) for m in measured] == [
            (d.blocks, d.replaced, d.saved_bytes) for d in done
        ]

    def test_a_sample_is_near(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(repack_module, "_SAMPLE_BLOCKS", 5)
        (sampled,) = measure(family.store, models_to_repack(family.store, ["expert0"]))
        assert sampled.is_estimate
        assert sampled.measured == 5
        (done,) = run(family.store, "expert0")
        assert sampled.saved_bytes == pytest.approx(done.saved_bytes, rel=0.2)


class TestBases:
    def test_a_block_that_is_one_stays_what_it_is(self, family: Family, tmp_path: Path) -> None:
        third = write_model(tmp_path / "third", fine_tune(fine_tune(base_weights(), 0), 7))
        family.store.ingest([third], base="expert0")
        needed = {block for block in blocks_of(family.store, "expert0") if block in bases(family.store)}
        assert needed
        run(family.store, "expert0", base="base")
        assert all(row_of(family.store, block).encoding is Encoding.PLANES for block in needed)
        family.check(tmp_path / "out")

    def test_of_a_base_that_is_a_delta_itself_that_ones_base_is_taken(self, family: Family, tmp_path: Path) -> None:
        run(family.store, "expert0", base="base")
        run(family.store, "expert1", base="expert0")
        block = family.store.snapshot("expert1").entry(LAYER).blocks[0]
        assert row_of(family.store, block).base == family.store.snapshot("base").entry(LAYER).blocks[0]
        family.check(tmp_path / "out")

    def test_models_that_would_be_each_others_base(self, family: Family, tmp_path: Path) -> None:
        """Both directions in one batch: one of the two stays."""
        store = family.store
        with Staging(store.layout, store.catalog) as staging:
            pairs = [("expert0", "expert1"), ("expert1", "expert0")]
            wanted = [staged_delta(store, staging, own, other) for own, other in pairs]
            done = replace_objects(store.catalog, staging.take_batch(), wanted)
        assert done == wanted[:1]
        family.check(tmp_path / "out")

    def test_one_that_is_old_is_made_young(self, family: Family) -> None:
        """Nobody collects it, who has looked at it before and found that nothing needs it."""
        store = family.store
        block = store.snapshot("base").entry(LAYER).blocks[0]
        old = replace(row_of(store, block), touched=1)
        store.catalog.write(lambda view: view.put("objects", block, old.pack()))
        before = unix_time()
        run(store, "expert0")
        assert row_of(store, block).touched >= before

    def test_rows_that_the_base_does_not_have_stay(self, store: Store, tmp_path: Path) -> None:
        weight = base_weights()["lm_head.weight"]
        tuned = weight + np.full_like(weight, 1e-3)
        longer = np.concatenate([tuned, tuned[:64] + tuned[64:]])
        store.ingest([write_checkpoint(tmp_path / "base", {"w": raw(weight)})])
        other = write_checkpoint(tmp_path / "other", {"w": raw(longer)})
        store.ingest([other])
        run(store, "other", base="base")
        known, blocks = store.snapshot("base").entry("w").blocks, store.snapshot("other").entry("w").blocks
        rows = [row_of(store, block) for block in blocks]
        assert [row.base for row in rows] == [*known, *[None] * (len(blocks) - len(known))]
        assert len(blocks) > len(known)
        store.snapshot("other").export(tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == folder_bytes(other)

    def test_of_another_type_none_is_taken(self, store: Store, tmp_path: Path) -> None:
        weights = {"w": base_weights()["lm_head.weight"]}
        store.ingest([write_checkpoint(tmp_path / "base", {"w": raw(weights["w"])})])
        store.ingest([write_checkpoint(tmp_path / "other", {"w": raw(weights["w"].view(np.float16))})], ref="other")
        assert run(store, "other", base="base")[0].blocks == 0


def bases(store: Store) -> set[bytes]:
    with store.catalog.reading() as view:
        return bases_of_deltas(view)


class TestOtherGains:
    def test_raw_blocks_that_shrink(self, family: Family, tmp_path: Path) -> None:
        store = family.store
        blocks = sorted(blocks_of(store, "base"))
        rows = {each: row_of(store, each) for each in blocks}
        shrinkable = [each for each in blocks if rows[each].encoding is Encoding.PLANES and rows[each].raw_bytes > 256]
        sizes = {each: row_of(store, each).stored_bytes for each in shrinkable}
        for each in shrinkable:
            put_as(store, each, Encoding.RAW)
        (result,) = run(store, "base")
        assert result.replaced == len(shrinkable)
        assert {each: row_of(store, each).stored_bytes for each in shrinkable} == sizes
        family.check(tmp_path / "out")

    def test_a_raw_block_that_is_smallest_as_a_difference(self, family: Family, tmp_path: Path) -> None:
        block = family.store.snapshot("expert0").entry(LAYER).blocks[0]
        put_as(family.store, block, Encoding.RAW)
        run(family.store, "expert0", base="base")
        assert row_of(family.store, block).base == family.store.snapshot("base").entry(LAYER).blocks[0]
        family.check(tmp_path / "out")

    def test_files_too(self, family: Family, tmp_path: Path) -> None:
        (piece,) = family.store.snapshot("base").files["tokenizer.json"].blocks
        size = row_of(family.store, piece).stored_bytes
        put_as(family.store, piece, Encoding.RAW)
        run(family.store, "base")
        assert row_of(family.store, piece).stored_bytes <= size
        family.check(tmp_path / "out")

    def test_a_base_may_shrink(self, family: Family, tmp_path: Path) -> None:
        run(family.store)
        block = family.store.snapshot("base").entry(LAYER).blocks[0]
        assert block in bases(family.store)
        put_as(family.store, block, Encoding.RAW)
        run(family.store, "base")
        assert row_of(family.store, block).encoding is Encoding.PLANES
        family.check(tmp_path / "out")

    def test_differences_that_are_larger_than_the_block(self, family: Family, tmp_path: Path) -> None:
        """A difference to noise: the block by itself is all zeros."""
        store = family.store
        zeros = {name: np.zeros_like(weight) for name, weight in base_weights().items()}
        store.ingest([write_model(tmp_path / "zeros", zeros)])
        block = store.snapshot("zeros").entry(LAYER).blocks[0]
        base = store.snapshot("base").entry(LAYER).blocks[0]
        put_as(store, block, Encoding.DELTA, base)
        run(store, "zeros", base="base")
        assert row_of(store, block).encoding is Encoding.PLANES
        family.check(tmp_path / "out")


class TestOthersAtWork:
    def test_nobody_else_may_be(self, family: Family) -> None:
        before = state_of(family.store)
        with Staging(family.store.layout, family.store.catalog), pytest.raises(ConflictError, match="at work"):
            run(family.store)
        assert state_of(family.store) == before

    def test_one_that_comes_between_the_two_transactions(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = family.store
        before = state_of(store)
        original = replace_module.refuse_other_writers
        other = Staging(store.layout, store.catalog)

        def late(*arguments: object) -> None:
            other.__enter__()
            original(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(replace_module, "refuse_other_writers", late)
        with pytest.raises(ConflictError):
            run(store)
        other.__exit__(None, None, None)
        assert state_of(store) == before
        family.check(tmp_path / "out")

    def test_who_chose_it_as_a_base_meanwhile_has_to_try_again(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody chose it by its old row, and was done before anybody looked for writers: its row is a delta's."""
        store = family.store
        block = store.snapshot("expert0").entry(LAYER).blocks[0]
        base = np.frombuffer(store.reader.read_piece(block, 4096), np.uint8)
        data = base.copy()
        data[::64] ^= 1
        digest = hash_bytes(data.tobytes())

        def meanwhile(*_: object) -> None:
            with Staging(store.layout, store.catalog) as other:
                if other.claim(digest):
                    assert other.add_block(Kind.BLOCK, digest, data, 2, (block, base)).base == block
                    with pytest.raises(ConflictError, match=block.short):
                        publish(store.catalog, other, Changes())

        monkeypatch.setattr(replace_module, "refuse_other_writers", meanwhile)
        (result,) = run(store, "expert0")
        assert result.left == 0
        assert result.replaced > 10
        assert row_of(store, block).encoding is Encoding.DELTA
        assert not object_path(store, digest).exists()
        family.check(tmp_path / "out")

    def test_one_who_settles_between_stops_it(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, before = family.store, state_of(family.store)
        monkeypatch.setattr(
            replace_module, "refuse_other_writers", lambda *_: settle(store.catalog, store.layout) and None
        )
        (result,) = run(store, "expert0")
        assert (result.replaced, result.left) == (0, result.blocks)
        assert state_of(store) == before
        family.check(tmp_path / "out")

    @pytest.mark.parametrize("what", ["is gone", "is another", "is damaged", "is being replaced"])
    def test_what_changed_since_it_was_staged_is_left_alone(self, hurt_store: Store, tmp_path: Path, what: str) -> None:
        base, experts = write_family(tmp_path)
        hurt_store.ingest([base, *experts])
        with Staging(hurt_store.layout, hurt_store.catalog) as staging:
            wanted = staged_delta(hurt_store, staging, "expert0", "base")
            changes = {
                "is gone": ("objects", wanted.digest, None),
                "is another": ("objects", wanted.digest, replace(wanted.old, stored_bytes=1).pack()),
                "is damaged": ("damaged", wanted.digest, b"?"),
                "is being replaced": ("meta", b"repack\0" + wanted.digest, wanted.old.pack()),
            }
            database, key, value = changes[what]
            hurt_store.catalog.write(
                lambda view: view.delete(database, key) if value is None else view.put(database, key, value)
            )
            before = state_of(hurt_store)
            assert replace_objects(hurt_store.catalog, staging.take_batch(), [wanted]) == []
        assert state_of(hurt_store) == before
        assert header_of(hurt_store, wanted.digest).encoding is Encoding.PLANES

    def test_a_base_that_is_found_damaged_between_the_two_transactions(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = family.store
        base, block = (store.snapshot(ref).entry(LAYER).blocks[0] for ref in ("base", "expert0"))
        monkeypatch.setattr(
            replace_module,
            "refuse_other_writers",
            lambda *_: store.catalog.write(lambda view: view.put("damaged", base, b"?")),
        )
        (result,) = run(store, "expert0")
        assert result.left == 1
        assert result.replaced > 10
        assert row_of(store, block).encoding is header_of(store, block).encoding is Encoding.PLANES
        assert not notes(store)
        store.catalog.write(lambda view: view.delete("damaged", base))
        family.check(tmp_path / "out")

    def test_a_folder_of_writers_that_cannot_be_listed(self, family: Family) -> None:
        temporary = family.store.layout.temporary
        shutil.rmtree(temporary)
        with pytest.raises(EnvironmentalError, match="looking for other writers"):
            refuse_other_writers(family.store.layout, temporary / "own")
        temporary.mkdir()

    def test_a_file_that_somebody_has_open_is_read_to_its_end(self, family: Family) -> None:
        block = family.store.snapshot("expert0").entry(LAYER).blocks[0]
        path = object_path(family.store, block)
        content = path.read_bytes()
        with path.open("rb") as file:
            assert file.read(100) == content[:100]
            run(family.store)
            assert content[:100] + file.read() == content
        assert path.read_bytes() != content


class TestWhatGoesWrong:
    def test_what_does_not_read_back_replaces_nothing(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        before = state_of(family.store)
        original = codecs.encode_delta

        def wrong(data: codecs.Bytes, base: codecs.Bytes, width: int) -> object:
            changed = data.copy()
            changed[5] ^= 1
            return original(changed, base, width)

        monkeypatch.setattr(codecs, "encode_delta", wrong)
        with pytest.raises(EnvironmentalError, match="did not read back"):
            run(family.store)
        assert state_of(family.store) == before
        assert writers_left(family.store) == []

    @pytest.mark.parametrize("of", ["base", "expert0"])
    def test_what_is_damaged_is_left_alone(self, hurt_store: Store, tmp_path: Path, of: str) -> None:
        base, experts = write_family(tmp_path)
        hurt_store.ingest([base, *experts])
        block = hurt_store.snapshot(of).entry(LAYER).blocks[0]
        flip_bit(object_path(hurt_store, block), -1)
        row = row_of(hurt_store, block)
        (result,) = run(hurt_store, "expert0", base="base")
        assert result.unreadable == 1
        assert result.replaced > 10
        assert row_of(hurt_store, block) == row

    def test_the_disk_is_full_before_anything_is_declared(
        self, family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: Path) -> bool:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = state_of(family.store)
        monkeypatch.setattr(replace_module, "flush_filesystem", fail)
        with pytest.raises(EnvironmentalError, match="disk is full while flushing"):
            run(family.store)
        assert state_of(family.store) == before
        assert writers_left(family.store) == []

    def test_without_a_flush_of_all_each_file_and_folder_is_flushed(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed: set[str] = set()
        original = os.fsync

        def note(descriptor: int) -> None:
            flushed.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            original(descriptor)

        before = blocks_of(family.store, "expert0")
        with monkeypatch.context() as patched:
            patched.setattr(filesystem, "_libc", object)
            patched.setattr(os, "fsync", note)
            run(family.store, "expert0")
        replaced = {each for each in before if row_of(family.store, each).encoding is Encoding.DELTA}
        assert replaced
        assert {each.hex() for each in replaced} <= {Path(path).name for path in flushed}
        assert {str(object_path(family.store, each).parent.resolve()) for each in replaced} <= flushed
        family.check(tmp_path / "out")

    @pytest.mark.parametrize("number", [1, 2, 5])
    def test_the_system_refuses_a_rename(self, family: Family, tmp_path: Path, number: int) -> None:
        calls = 0
        original = os.replace

        def fail(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(28, "No space left on device")
            original(*arguments)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(replace_module.os, "replace", fail)
            with pytest.raises(EnvironmentalError, match="disk is full"):
                run(family.store)
        assert not notes(family.store)
        assert_clean(family.store)
        family.check(tmp_path / "out")
        run(family.store)
        assert encodings(family.store, "expert0") == {Encoding.DELTA}
        family.check(tmp_path / "out")

    def test_the_system_refuses_to_remove_what_was_left(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is done by then; what stays goes with the writer's folder."""

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", fail)
            assert any(each.replaced for each in run(family.store))
        family.check(tmp_path / "out")

    def test_a_map_that_grows_in_the_middle(
        self, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second transaction runs again from its start, when files are in their places already."""
        store, runs = family.store, 0
        original = replace_module._replace

        def again(*arguments: object) -> list[Replacement]:
            nonlocal runs
            runs += 1
            done = original(*arguments)  # type: ignore[arg-type]
            if runs == 1:
                raise lmdb.MapFullError
            return done

        monkeypatch.setattr(replace_module, "_replace", again)
        results = run(store)
        assert runs == len([result for result in results if result.blocks]) + 1
        assert encodings(store, "expert0") == {Encoding.DELTA}
        assert not notes(store)
        family.check(tmp_path / "out")


def notes(store: Store) -> set[Digest]:
    with store.catalog.reading() as view:
        return unsettled(view)


# Where the process dies: what is called, and whether before ("<"), after (">") or which call of it.
STEPS = {
    "while staging": ("staging.Staging.put_encoded", "<", 5),
    "before the flush": ("replace.flush_filesystem", "<", 1),
    "in the first transaction": ("replace._declare", ">", 1),
    "between the two": ("replace.refuse_other_writers", "<", 1),
    "before the first rename": ("replace.os.replace", "<", 1),
    "after some renames": ("replace.os.replace", ">", 7),
    "after all renames": ("replace.flush_filesystem", "<", 2),
    "before the second transaction ends": ("replace._replace", ">", 1),
    "between batches": ("repack.replace_objects", ">", 1),
    "in the second batch": ("replace.os.replace", ">", 14),
}
REPACKERS = """
    import json, os, sys
    from mergepipe.store import Store
    from support.processes import die_at
    import mergepipe.store.repack as repack
    repack._BATCH_BLOCKS = 12

    warm, *roots = sys.argv[2:]
    with Store.open(warm) as store:
        repack.repack(store, repack.models_to_repack(store))
    for root, step in zip(roots, json.loads(sys.argv[1]), strict=True):
        if os.fork() == 0:
            die_at(*step)
            store = Store.open(root)
            repack.repack(store, repack.models_to_repack(store))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 77, step
"""


@dataclass(frozen=True)
class Crashed:
    """Stores in which a repack died, by step; and one in which it did not."""

    folder: Path
    base: Path
    experts: list[Path]
    roots: dict[str, Path]


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Crashed:
    top = tmp_path_factory.mktemp("crashes")
    base, experts = write_family(top)
    with Store.create(top / "first", block_bytes=4096) as store:
        store.ingest([base, *experts])
    roots = {step: top / step for step in (*STEPS, "whole")}
    for root in roots.values():
        shutil.copytree(top / "first", root)
    run_python(REPACKERS, json.dumps(list(STEPS.values())), roots["whole"], *(roots[step] for step in STEPS))
    return Crashed(top, base, experts, roots)


class TestCrashes:
    @pytest.mark.parametrize("step", list(STEPS))
    def test_nothing_is_lost_and_it_goes_on(self, crashed: Crashed, tmp_path: Path, step: str) -> None:
        root = tmp_path / "store"
        shutil.copytree(crashed.roots[step], root)
        with Store.open(crashed.roots["whole"]) as whole:
            wanted = catalog_rows(whole, "objects")["objects"]
        with Store.open(root) as store:
            family = Family(store, crashed.base, crashed.experts)
            family.check(tmp_path / "before")  # readers go by the files' own headers
            run(store)
            assert not notes(store)
            assert catalog_rows(store, "objects")["objects"] == wanted
            assert_clean(store)
            family.check(tmp_path / "after")
            assert writers_left(store) == []

    @pytest.mark.parametrize("step", list(STEPS))
    def test_settled_it_is_clean(self, crashed: Crashed, tmp_path: Path, step: str) -> None:
        root = tmp_path / "store"
        shutil.copytree(crashed.roots[step], root)
        with Store.open(root) as store:
            settle(store.catalog, store.layout)
            assert not notes(store)
            assert_clean(store)
            Family(store, crashed.base, crashed.experts).check(tmp_path / "out")

    @pytest.mark.parametrize("step", list(STEPS))
    def test_what_is_stored_before_anybody_settles_it_is_good(
        self, crashed: Crashed, tmp_path: Path, step: str
    ) -> None:
        """A model against a half-repacked one: no delta is taken to what is a delta, or may be."""
        root = tmp_path / "store"
        shutil.copytree(crashed.roots[step], root)
        third = write_model(tmp_path / "third", fine_tune(fine_tune(base_weights(), 0), 7))
        with Store.open(root) as store:
            store.ingest([third], base="expert0")
            store.ingest([crashed.experts[0]])
            family = Family(store, crashed.base, [*crashed.experts, third])
            family.check(tmp_path / "before")
            settle(store.catalog, store.layout)
            assert_clean(store)
            run(store)
            assert_clean(store)
            family.check(tmp_path / "after")

    def test_a_note_of_what_is_lost_goes_and_its_row_stays(self, crashed: Crashed, tmp_path: Path) -> None:
        shutil.copytree(crashed.roots["between the two"], tmp_path / "store")
        with Store.open(tmp_path / "store") as store:
            lost, cut, *others = sorted(notes(store))
            object_path(store, lost).unlink()
            rewrite(object_path(store, cut), object_path(store, cut).read_bytes()[:-1])
            declared = {each: row_of(store, each) for each in (lost, cut)}
            assert settle(store.catalog, store.layout) == len(others) + 2
            assert not notes(store)
            assert {each: row_of(store, each) for each in (lost, cut)} == declared
            assert {row_of(store, each).encoding for each in others} == {Encoding.PLANES}
            assert {each.id for each in verify(store).damaged} == {lost, cut}

    def test_where_nothing_can_be_written_nothing_is_settled(
        self, crashed: Crashed, tmp_path: Path, mounted_disk: Callable[..., Path]
    ) -> None:
        disk = mounted_disk("16m")
        shutil.copytree(crashed.roots["between the two"], disk / "store")
        if os.system(f"mount -o remount,ro {disk}"):
            pytest.skip("cannot be made read-only")
        with Store.open(disk / "store") as store:
            assert settle(store.catalog, store.layout) == 0
            assert notes(store)
            Family(store, crashed.base, crashed.experts).check(tmp_path / "out")


def test_stopped_again_and_again_it_ends(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done stays done: each time it gets one batch further."""
    monkeypatch.setattr(repack_module, "_BATCH_BLOCKS", 8)
    original = repack_module.replace_objects
    stopped = 0

    def once(*arguments: object) -> list[Replacement]:
        done = original(*arguments)  # type: ignore[arg-type]
        if done:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(repack_module, "replace_objects", once)
    while stopped < 20:
        try:
            run(family.store)
            break
        except KeyboardInterrupt:
            stopped += 1
    assert stopped == 6  # 18 blocks of each, 8 at a time
    assert encodings(family.store, "expert1") == {Encoding.DELTA}
    family.check(tmp_path / "out")


class TestNotesThatAreNone:
    """In ``meta``, as a stranger's store may have them."""

    def test_one_with_a_short_key_goes(self, store: Store) -> None:
        key = replace_module._NOTE + b"short"
        store.catalog.write(lambda view: view.put("meta", key, b""))
        with store.catalog.reading() as view:
            assert unsettled(view) == set()
        assert settle(store.catalog, store.layout) == 1
        assert key not in catalog_rows(store, "meta")["meta"]

    def test_a_pipe_in_the_place_of_its_object(self, store: Store) -> None:
        digest = hash_bytes(b"nobody")
        path = object_path(store, digest)
        os.mkfifo(path)
        store.catalog.write(lambda view: view.put("meta", replace_module._NOTE + digest, b""))
        assert settle(store.catalog, store.layout) == 1
        path.unlink()
