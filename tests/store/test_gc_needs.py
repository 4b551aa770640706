"""What a collection keeps, one reason at a time, to the second; and what it says of what is only too young to go."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge import Expert, execute, plan_merge
from mergepipe.store import Digest, Store
from mergepipe.store import gc as gc_module
from mergepipe.store.check import verify
from mergepipe.store.errors import DamagedError, EnvironmentalError, NotFoundError
from mergepipe.store.frame import Kind
from mergepipe.store.gc import Collection, collect
from mergepipe.store.heal import find_broken
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.recover import recover
from mergepipe.store.replace import bases_of_deltas
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.staging import Staging
from support.collecting import CALM, NEAR, age, nothing, put_block, remove, set_times_of_moves, touch
from support.merges import ingest_model, weights_of
from support.stores import assert_clean, object_files, object_path
from support.virtual import UP, Q, adapted, base_model, exact, factors, ingest_adapter

GRACE = 1000
NOISE = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """The clock stands still. The first second that is not older than ``GRACE``."""
    now = int(time.time())
    monkeypatch.setattr(time, "time", lambda: float(now))
    return now - GRACE + 1


@pytest.fixture(params=["UTC", "WEST+9", "EAST-9"])
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    """The time zone of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield request.param
    time.tzset()


def collected(store: Store) -> Collection:
    return collect(store, apply=True, grace_seconds=GRACE)


def has_commit(store: Store, commit: Digest) -> bool:
    with store.catalog.reading() as view:
        return view.get("commits", commit) is not None


@pytest.fixture
def onto(store: Store, tmp_path: Path) -> tuple[Store, Digest]:
    """A merge of an adapter that goes onto another model, the only one with a ref; and that model's commit."""
    ingest_model(store, tmp_path, "base", base_model())
    ingest_adapter(store, tmp_path, "lora", factors(10, Q))
    other = ingest_model(store, tmp_path, "other", adapted(base_model(), factors(70, UP)), base="base")
    execute(store, plan_merge(store, "base", [Expert("lora", onto="other")], "task_arithmetic"), "merged")
    assert other not in [parent.commit for parent in store.snapshot("merged").commit.parents]
    remove(store, "base", "lora", "other")
    age(store)
    return store, other


def test_a_merge_keeps_the_model_that_an_adapter_went_onto(onto: tuple[Store, Digest]) -> None:
    store, other = onto
    before = object_files(store)
    assert nothing(collect(store, apply=True, grace_seconds=0))
    assert object_files(store) == before
    publish(store.catalog, None, Changes(refs=[RefUpdate("other", None, other)]))
    weights = adapted(base_model(), factors(70, UP))
    assert all(np.array_equal(found, weights[name]) for name, found in weights_of(store, "other").items())
    assert_clean(store)
    remove(store, "merged", "other")
    assert collect(store, apply=True, grace_seconds=0).commits == 4
    assert not object_files(store)


def test_a_model_that_an_adapter_went_onto_and_that_is_no_longer_there(onto: tuple[Store, Digest]) -> None:
    store, other = onto
    store.catalog.write(lambda view: view.delete("commits", other))
    assert not collect(store, apply=True, grace_seconds=0).commits
    assert weights_of(store, "merged")


def test_a_commit_that_is_young_stays_with_all_that_it_needs(store: Store, tmp_path: Path, limit: int) -> None:
    base = ingest_model(store, tmp_path, "base", base_model())
    commit = ingest_model(store, tmp_path, "tuned", adapted(base_model(), factors(70, UP)), base="base")
    remove(store, "base", "tuned")
    age(store)
    touch(store, limit, commit)
    assert nothing(collected(store))
    assert_clean(store)
    assert store.snapshot_of(commit).tensors.keys() == base_model().keys()
    assert has_commit(store, base)
    touch(store, limit - 1, commit)
    assert collected(store).commits == 2
    assert not object_files(store)


def test_where_a_ref_was_within_the_grace_period_counts(store: Store, tmp_path: Path, limit: int, zone: str) -> None:
    """To the second, in the time zone of the log, whatever this machine's is."""
    assert zone
    ingest_model(store, tmp_path, "base", base_model())
    remove(store, "base")
    age(store)
    moved = datetime.fromtimestamp(limit, UTC)
    set_times_of_moves(store, f"{moved:%Y-%m-%dT%H:%M:%S.%fZ}")
    assert nothing(collected(store))
    set_times_of_moves(store, f"{moved - timedelta(microseconds=1):%Y-%m-%dT%H:%M:%S.%fZ}")
    assert collected(store).commits == 1
    assert not object_files(store)


def test_a_time_of_a_move_that_cannot_be_read_counts_as_now(store: Store, tmp_path: Path) -> None:
    ingest_model(store, tmp_path, "base", base_model())
    remove(store, "base")
    age(store)
    set_times_of_moves(store, "last week")
    assert nothing(collect(store, apply=True, grace_seconds=60))
    assert collect(store, apply=True, grace_seconds=0).commits == 1


def test_what_nothing_needs_stays_while_it_is_young(store: Store, limit: int) -> None:
    young, old = put_block(store, NOISE), put_block(store, CALM)
    touch(store, limit, young)
    touch(store, limit - 1, old)
    size, gone = (object_path(store, digest).stat().st_size for digest in (young, old))
    planned = collect(store, grace_seconds=GRACE)
    assert planned == Collection(
        commits=0, objects={"block": 1}, bytes={"block": gone}, rows=0, stray_files=0, stray_bytes=0, kept_young=1,
        kept_young_bytes=size,
    )  # fmt: skip
    assert len(object_files(store)) == 2
    assert collected(store) == planned
    assert object_files(store) == {young.hex(): size}
    touch(store, limit - 1, young)
    assert collected(store).freed_bytes == size
    assert not object_files(store)


def test_a_young_delta_that_nothing_needs_keeps_its_base(store: Store, limit: int) -> None:
    base, delta = put_block(store, CALM), put_block(store, NEAR, base=CALM)
    age(store)
    touch(store, limit, delta)
    sizes = object_files(store)
    found = collected(store)
    assert nothing(found)
    assert (found.kept_young, found.kept_young_bytes) == (2, sum(sizes.values()))
    assert sizes.keys() == object_files(store).keys() == {base.hex(), delta.hex()}
    touch(store, limit - 1, delta)
    assert collected(store).objects == {"block": 2}


def test_a_delta_that_a_writer_relies_on_keeps_its_base(store: Store) -> None:
    base, delta = put_block(store, CALM), put_block(store, NEAR, base=CALM)
    age(store)
    with Staging(store.layout, store.catalog) as staging:
        assert not staging.claim(delta)
        assert nothing(collect(store, apply=True, grace_seconds=0))
        assert object_files(store).keys() == {base.hex(), delta.hex()}
        publish(store.catalog, staging, Changes())
    assert_clean(store)


def test_writers_at_work_keep_what_each_of_them_relies_on(store: Store) -> None:
    blocks = [put_block(store, data) for data in (NOISE, CALM)]
    age(store)
    with Staging(store.layout, store.catalog) as one, Staging(store.layout, store.catalog) as other:
        for staging, digest in zip((one, other), blocks, strict=True):
            assert not staging.claim(digest)
        assert nothing(collect(store, apply=True, grace_seconds=0))
        assert len(object_files(store)) == 2
    assert collect(store, apply=True, grace_seconds=0).objects == {"block": 2}


def test_a_writer_that_begins_while_it_marks_keeps_what_it_relies_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = put_block(store, NOISE)
    original = gc_module._relied_on
    with Staging(store.layout, store.catalog) as staging:

        def late(store: Store) -> set[Digest]:
            found = original(store)
            staging.claim(block)
            return found

        monkeypatch.setattr(gc_module, "_relied_on", late)
        assert nothing(collect(store, apply=True, grace_seconds=0))
        publish(store.catalog, staging, Changes())
    assert object_files(store).keys() == {block.hex()}


def test_a_ref_that_moves_to_another_commit_while_it_marks(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name comes or goes, and no commit; yet what was needed no longer is, and the other way round."""
    before = ingest_model(store, tmp_path, "model", base_model())
    after = ingest_model(store, tmp_path, "other", {UP: exact((96, 64), 5)})
    remove(store, "other")
    original = gc_module._relied_on

    def late(store: Store) -> set[Digest]:
        if store.resolve("model") == before:
            publish(store.catalog, None, Changes(refs=[RefUpdate("model", before, after)]))
        return original(store)

    monkeypatch.setattr(gc_module, "_relied_on", late)
    assert collect(store, apply=True, grace_seconds=0).commits == 1
    assert store.snapshot("model").commit_id == after
    assert not has_commit(store, before)
    assert_clean(store)


@pytest.mark.parametrize("apply", [False, True])
def test_another_collection_that_takes_a_commit_while_this_one_marks(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apply: bool
) -> None:
    """It is needed here, for its ref moved lately, but not there."""
    ingest_model(store, tmp_path, "base", base_model())
    gone = ingest_model(store, tmp_path, "tuned", adapted(base_model(), factors(70, UP)), base="base")
    remove(store, "tuned")
    original = gc_module.object_ids
    others: list[bool] = []

    def late(snapshot: Snapshot) -> set[Digest]:
        if not others:
            others.append(True)
            assert collect(store, apply=True, grace_seconds=0).commits == 1
        return original(snapshot)

    monkeypatch.setattr(gc_module, "object_ids", late)
    assert nothing(collect(store, apply=apply))
    assert others
    with pytest.raises(NotFoundError):
        store.commit(gone)


def test_a_dry_run_beside_an_ingest_names_nothing_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest_model(store, tmp_path, "base", base_model())
    original, new = gc_module._mark, {UP: exact((96, 64), 5)}
    ingested: list[Digest] = []

    def late(store: Store, limit: int) -> gc_module._Marked:
        found = original(store, limit)
        if not ingested:
            ingested.append(ingest_model(store, tmp_path, "new", new))
        return found

    monkeypatch.setattr(gc_module, "_mark", late)
    assert nothing(collect(store))


def test_a_needed_block_that_lost_its_row_stops_nothing(hurt_store: Store, tmp_path: Path) -> None:
    commit = ingest_model(hurt_store, tmp_path, "base", base_model())
    block = hurt_store.snapshot_of(commit).tensors[UP].blocks[0]
    hurt_store.catalog.write(lambda view: view.delete("objects", block))
    garbage = put_block(hurt_store, NOISE)
    assert collect(hurt_store, apply=True).kept_young == 1
    assert collect(hurt_store, grace_seconds=0).objects == {"block": 1}
    assert object_path(hurt_store, block).exists()
    assert object_path(hurt_store, garbage).exists()


def test_a_needed_plan_that_cannot_be_read(hurt_store: Store, tmp_path: Path) -> None:
    """Nobody knows whether it names other models than the parents, as one with adapters does."""
    ingest_model(hurt_store, tmp_path, "base", base_model())
    ingest_model(hurt_store, tmp_path, "tuned", adapted(base_model(), factors(70, UP)), base="base")
    execute(hurt_store, plan_merge(hurt_store, "base", [Expert("tuned")], "linear"), "merged")
    plan = hurt_store.snapshot("merged").commit.plan
    assert plan is not None
    object_path(hurt_store, plan).unlink()
    remove(hurt_store, "base", "tuned")
    before = object_files(hurt_store)
    with pytest.raises(DamagedError, match=plan.short):
        collect(hurt_store, apply=True, grace_seconds=0)
    assert object_files(hurt_store) == before
    remove(hurt_store, "merged")
    assert collect(hurt_store, apply=True, grace_seconds=0).commits == 3


def test_a_plan_that_is_none(hurt_store: Store, tmp_path: Path) -> None:
    ingest_model(hurt_store, tmp_path, "base", base_model())
    with Staging(hurt_store.layout, hurt_store.catalog) as staging:
        plan = staging.add_record(Kind.PLAN, b'{"base":1}')
        commit = replace(hurt_store.snapshot("base").commit, plan=plan, message="odd")
        staging.add_record(Kind.COMMIT, commit.encode())
        moved = RefUpdate("odd", None, commit.id)
        publish(hurt_store.catalog, staging, Changes(commits=[commit], refs=[moved]))
    with pytest.raises(DamagedError, match=f"plan {plan.short} cannot be read"):
        collect(hurt_store, apply=True, grace_seconds=0)


def test_a_parent_that_is_not_there(hurt_store: Store, tmp_path: Path) -> None:
    """What it needs is not known. After a recovery, which says that it is lost, only what is left counts."""
    base = ingest_model(hurt_store, tmp_path, "base", base_model())
    other = {**base_model(), UP: exact((96, 64), 5)}
    ingest_model(hurt_store, tmp_path, "tuned", other, base="base")
    remove(hurt_store, "base")
    garbage = hurt_store.snapshot_of(base).tensors[UP].blocks[0]
    object_path(hurt_store, base).unlink()
    hurt_store.catalog.write(lambda view: [view.delete("commits", base), view.delete("objects", base)])
    before = object_files(hurt_store)
    with pytest.raises(DamagedError, match=f"commit {base.short} is not there"):
        collect(hurt_store, apply=True, grace_seconds=0)
    reasons = {item.id: item.reason for item in verify(hurt_store).damaged}
    assert reasons[base].endswith("was made from it, and it is not there")
    assert [broken.id for broken in find_broken(hurt_store)] == [base]
    assert object_files(hurt_store) == before
    layout = hurt_store.layout
    hurt_store.close()
    assert recover(layout, apply=True).lost == [base]
    with Store.open(layout.root) as store:
        assert verify(store).damaged == ()
        assert [broken.id for broken in find_broken(store)] == [base]
        collect(store, apply=True, grace_seconds=0)
        assert store.snapshot("tuned").read_tensor(UP).tobytes() == other[UP].tobytes()
        assert object_path(store, garbage).exists() == (garbage in bases_of(store))
        assert verify(store).damaged == ()


def bases_of(store: Store) -> set[bytes]:
    with store.catalog.reading() as view:
        return bases_of_deltas(view)


@pytest.mark.parametrize("name", ["pins", "relied-on"])
def test_a_lease_that_cannot_be_read(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It may name anything; one that went meanwhile names nothing."""
    original = Path.read_bytes

    def fails(self: Path) -> bytes:
        if self.name == name:
            raise OSError(errno.EIO, "broken")
        return original(self)

    garbage = put_block(store, NOISE)
    with Staging(store.layout, store.catalog) as staging:
        for file in ("pins", "relied-on"):
            (staging.path / file).write_bytes(bytes(32))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", fails)
            with pytest.raises(EnvironmentalError, match="looking for what nothing needs"):
                collect(store, apply=True, grace_seconds=0)
        assert object_path(store, garbage).exists()
    assert collect(store, apply=True, grace_seconds=0).objects == {"block": 1}


def test_a_store_without_a_folder_for_writers(store: Store) -> None:
    put_block(store, NOISE)
    store.layout.temporary.rmdir()
    assert collect(store, apply=True, grace_seconds=0).objects == {"block": 1}
