"""A merge that is interrupted, by an error or by the kernel, and the next one, which computes only the rest."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge import checkpoints, execute, executor
from mergepipe.merge.checkpoints import Finished
from mergepipe.store import Store
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.errors import DamagedError
from mergepipe.store.frame import Kind
from mergepipe.store.staging import Staging
from support.merges import assert_as_planned, blocks_of, make_plan, merge, tree_of
from support.processes import start_python
from support.stores import assert_clean, catalog_rows, object_files, objects_of, state_of, writers_left

WEIGHTS = {"math": 0.75, "code": 0.5}
VISIBLE = ("refs", "reflog", "commits", "children")


def stage(staging: Staging, number: int) -> Digest:
    data = np.full(5000, number, np.uint8)
    digest = hash_bytes(data.data)
    assert staging.claim(digest)
    staging.add_block(Kind.BLOCK, digest, data, 1)
    return digest


def recipe(number: int) -> Digest:
    return hash_bytes(f"recipe {number}".encode())


def test_what_is_published_is_there_and_leaves_the_rest(store: Store) -> None:
    with Staging(store.layout, store.catalog) as staging:
        finished = Finished(store, staging)
        first = stage(staging, 1)
        finished.add_block(recipe(1), first, recipe(0), b"statistics")
        finished.add_statistics({b"key": b"row"})
        finished.publish()
        assert objects_of(store, Kind.BLOCK) == [first]
        rows = catalog_rows(store, "results", "deltas", "tensors")
        assert rows == {
            "results": {recipe(1): first}, "deltas": {recipe(0) + first: b"statistics"}, "tensors": {b"key": b"row"}
        }  # fmt: skip
        assert staging.rows == {}
        second = stage(staging, 2)
        finished.add_block(recipe(2), second, second, None)
        finished.rely_on(first)
        assert objects_of(store, Kind.BLOCK) == [first]
        assert staging.written_bytes == sum(len(staging.file_of(second).read_bytes()) + size
                                            for size in object_files(store).values())  # fmt: skip
        changes = finished.take()
        assert changes.results == {recipe(2): second}
        assert set(changes.relied_on) == {first, second}
        assert changes.deltas == changes.tensors == {}
        assert finished.published_blocks == 1
        assert finished.take().results == {}
    assert objects_of(store, Kind.BLOCK) == [first]
    assert writers_left(store) == []


def test_nothing_new_publishes_nothing(store: Store) -> None:
    before = state_of(store)
    with Staging(store.layout, store.catalog) as staging:
        finished = Finished(store, staging)
        finished.publish()
        assert finished.published_blocks == 0
    assert state_of(store) == before


def soon(holds: Callable[[], bool]) -> bool:
    """Whether something comes true within some seconds."""
    return any(holds() or time.sleep(0.01) for _ in range(2000))


def test_it_is_published_while_the_work_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_POLL_SECONDS", 0.001)
    with Staging(store.layout, store.catalog) as staging:
        finished = Finished(store, staging, interval_seconds=0)
        finished.begin()
        for number in range(3):
            digest = stage(staging, number)
            finished.add_block(recipe(number), digest, digest, None)
            assert soon(lambda number=number: finished.published_blocks == number + 1)
        finished.end()
        left = stage(staging, 9)
        finished.add_block(recipe(9), left, left, None)
        time.sleep(0.05)
        assert left not in objects_of(store, Kind.BLOCK)
    assert len(objects_of(store, Kind.BLOCK)) == 3


def test_a_short_merge_is_published_once(family: Store) -> None:
    """Before some seconds have passed there is nothing that is worth a flush of the disk."""
    assert checkpoints.INTERVAL_SECONDS >= 1
    with Staging(family.layout, family.catalog) as staging:
        finished = Finished(family, staging)
        finished.begin()
        digest = stage(staging, 1)
        finished.add_block(recipe(1), digest, digest, None)
        time.sleep(0.3)
        finished.end()
        assert finished.published_blocks == 0


def test_an_error_in_the_background_is_raised_in_the_work(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(*_: object) -> None:
        raise DamagedError("the disk is gone")

    monkeypatch.setattr(checkpoints, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(checkpoints, "publish", publish)
    with Staging(store.layout, store.catalog) as staging:
        finished = Finished(store, staging, interval_seconds=0)
        finished.begin()
        digest = stage(staging, 1)
        finished.add_block(recipe(1), digest, digest, None)

        def raised() -> bool:
            try:
                finished.check()
            except DamagedError:
                return True
            return False

        assert soon(raised)
        with pytest.raises(DamagedError, match="the disk is gone"):
            finished.add_block(recipe(2), digest, digest, None)
        finished.end()


class StoppedError(Exception):
    """What a callback raises in these tests."""


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock"])
def test_an_interrupted_merge_goes_on(family: Store, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """What was published is found again; the rest is computed; the result is the same."""
    monkeypatch.setattr(checkpoints, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(executor, "Finished", partial(Finished, interval_seconds=0))
    merge(family, method, WEIGHTS, "wanted")
    wanted, blocks = tree_of(family, "wanted"), set(objects_of(family, Kind.BLOCK))
    family.catalog.write(lambda view: [view.delete("results", key) for key, _ in list(view.items("results"))])
    plan = make_plan(family, method, WEIGHTS)
    known = [0]

    def progress(_stage: str, done: int, total: int) -> None:
        time.sleep(0.002)
        if done >= total * 0.6:
            raise StoppedError

    before = catalog_rows(family, *VISIBLE)
    for _ in range(2):
        with pytest.raises(StoppedError):
            execute(family, plan, "merged", progress=progress)
        assert catalog_rows(family, *VISIBLE) == before
        assert writers_left(family) == []
        known.append(len(catalog_rows(family, "results")["results"]))
    assert 0 < known[1] <= known[2]
    result = execute(family, plan, "merged")
    assert result.cached_blocks == known[2]
    assert result.computed_blocks == plan.costs.computed_blocks - known[2]
    assert tree_of(family, "merged") == wanted
    assert set(objects_of(family, Kind.BLOCK)) == blocks


KILLED = """
    import os, signal, sys, time
    from functools import partial
    from pathlib import Path
    from mergepipe.merge import checkpoints, execute, executor, read_plan
    from mergepipe.store import Store

    executor.Finished = partial(checkpoints.Finished, interval_seconds=float(sys.argv[4]))
    checkpoints._POLL_SECONDS = 0.001

    def progress(stage, done, total):
        time.sleep(0.005)
        if done >= total * float(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    with Store.open(sys.argv[1]) as store:
        execute(store, read_plan(Path(sys.argv[2])), "merged", progress=progress)
"""


def kill_at(store: Store, plan: Path, share: float, interval_seconds: float) -> None:
    process = start_python(KILLED, store.layout.root, plan, share, interval_seconds)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock"])
def test_a_merge_that_was_killed_goes_on(family: Store, tmp_path: Path, method: str, deep: bool) -> None:
    """At any point, and more than once: what is left is sound, adds up with what is done again, and is the result."""
    merge(family, "linear", {"math": 1.0})
    plan = make_plan(family, method, WEIGHTS)
    plan.write(tmp_path / "p.json")
    generator = random.Random(method)
    others, published = len(catalog_rows(family, "results")["results"]), 0
    before = catalog_rows(family, *VISIBLE)
    shares = sorted(generator.random() for _ in range(20 if deep else 3))
    for share in (0.01, *shares, 1.0):
        kill_at(family, tmp_path / "p.json", share, 0)
        assert catalog_rows(family, *VISIBLE) == before
        assert_clean(family)
        known = len(catalog_rows(family, "results")["results"]) - others
        assert known >= published
        published = known
    assert published > 0
    result = execute(family, plan, "merged")
    assert result.computed_blocks + result.cached_blocks == plan.costs.computed_blocks
    assert result.cached_blocks == published
    assert family.commit(result.commit).parents[0].role == "previous"
    assert writers_left(family) == [], "what the killed processes left is gone"
    tree, blocks = tree_of(family, "merged"), blocks_of(family, "merged")
    again = execute(family, plan, "whole", use_cache=False)
    assert_as_planned(plan, again)
    assert tree_of(family, "whole") == tree
    assert blocks_of(family, "whole") == blocks


@pytest.mark.parametrize("share", [0.01, 0.6, 1.0])
def test_a_merge_that_was_killed_early_leaves_the_store_as_it_was(family: Store, tmp_path: Path, share: float) -> None:
    """Before anything was published there is nothing to find."""
    merge(family, "linear", {"math": 1.0})
    plan = make_plan(family, "ties", WEIGHTS)
    plan.write(tmp_path / "p.json")
    before = state_of(family)
    kill_at(family, tmp_path / "p.json", share, 1000)
    assert state_of(family) == before
    assert_clean(family)
    result = execute(family, plan, "merged")
    assert result.computed_blocks == plan.costs.computed_blocks
    assert writers_left(family) == []
