"""Collection: what something needs stays, whoever writes or reads at the time, and what nothing needs goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from mergepipe.merge import Expert, execute, parse_budget, plan_merge
from mergepipe.store import Digest, Store
from mergepipe.store import gc as gc_module
from mergepipe.store.catalog import Writing
from mergepipe.store.commits import timestamp_now
from mergepipe.store.errors import ConflictError, DamagedError
from mergepipe.store.frame import Encoding, Kind
from mergepipe.store.gc import collect
from mergepipe.store.leases import reading
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.staging import Staging
from support.checkpoints import folder_bytes
from support.collecting import age, nothing, remove, set_times_of_moves
from support.family import base_weights, fine_tune, write_family, write_model
from support.processes import run_python
from support.stores import assert_clean, catalog_rows, object_files, objects_of, state_of

STEPS = ("mark", "rows", "files")


@pytest.fixture
def full(tmp_path: Path) -> Store:
    """A base, two experts with previews, and a merge of both."""
    store = Store.create(tmp_path / "full" / ".mp", block_bytes=16384)
    base, experts = write_family(tmp_path / "family")
    store.ingest([base], ref="base")
    store.ingest(experts, base="base", previews=True)
    execute(store, plan_merge(store, "base", [Expert("expert0"), Expert("expert1")], "task_arithmetic"), "merged")
    return store


def content(store: Store, ref: str, folder: Path) -> dict[str, bytes]:
    store.snapshot(ref).export(folder)
    return folder_bytes(folder)


def test_all_that_is_needed_stays(full: Store, tmp_path: Path) -> None:
    before = state_of(full)
    age(full)
    assert nothing(collect(full, apply=True, grace_seconds=0))
    assert state_of(full)["files"] == before["files"]
    assert_clean(full)
    assert content(full, "expert0", tmp_path / "out")


def test_what_a_removed_merge_had_for_itself_goes(full: Store, tmp_path: Path) -> None:
    kept = {name: content(full, name, tmp_path / name) for name in ("base", "expert0", "expert1")}
    alone = {Digest.parse(name) for name in object_files(full)}
    remove(full, "merged")
    assert nothing(collect(full, apply=True))  # within the grace period nothing goes
    planned = collect(full, grace_seconds=0)
    assert planned.commits == 1
    assert planned.objects["block"] > 0
    assert planned.objects["plan"] == planned.objects["commit"] == 1
    files = object_files(full)
    assert collect(full, apply=True, grace_seconds=0) == planned
    assert planned.freed_bytes == sum(files.values()) - sum(object_files(full).values())
    assert len(files) - len(object_files(full)) == sum(planned.objects.values())
    assert_clean(full)
    assert alone > {Digest.parse(name) for name in object_files(full)}
    for name, data in kept.items():
        assert content(full, name, tmp_path / f"{name}-after") == data
    again = plan_merge(full, "base", [Expert("expert0"), Expert("expert1")], "task_arithmetic")
    result = execute(full, again, "merged")  # the cache of results names nothing that is gone
    assert result.computed_blocks > 0
    assert result.cached_blocks == 0
    assert_clean(full)


def test_a_merge_keeps_what_it_was_made_from(full: Store) -> None:
    remove(full, "base", "expert0", "expert1")
    age(full)
    assert nothing(collect(full, apply=True, grace_seconds=0))
    assert_clean(full)


def test_everything_goes_with_the_last_ref(full: Store) -> None:
    remove(full, "merged", "base", "expert0", "expert1")
    found = collect(full, apply=True, grace_seconds=0)
    assert found.commits == 4
    assert not object_files(full)
    rows = catalog_rows(full)
    assert not any(rows[name] for name in ("objects", "commits", "children", "results", "deltas", "previews", "refs"))
    assert len(rows["reflog"]) == 8


def test_the_base_of_a_delta_stays(tmp_path: Path) -> None:
    """The expert is a tree of its own; its deltas need blocks that only the base's tree names."""
    store = Store.create(tmp_path / ".mp", block_bytes=16384)
    base, (expert,) = write_family(tmp_path / "family", 1)
    store.ingest([base], ref="base")
    store.ingest([expert], base="base")
    snapshot = store.snapshot("expert0")
    orphan = replace(snapshot.commit, parents=())
    with Staging(store.layout, store.catalog) as staging:
        digest = staging.add_record(Kind.COMMIT, orphan.encode())
        publish(store.catalog, staging, Changes(commits=[orphan], refs=[RefUpdate("orphan", None, digest)]))
    before = content(store, "expert0", tmp_path / "before")
    remove(store, "base", "expert0")
    found = collect(store, apply=True, grace_seconds=0)
    assert found.commits == 2
    assert found.kept_young == 0
    assert objects_of(store, Kind.BLOCK, Encoding.DELTA)
    assert_clean(store)
    assert content(store, "orphan", tmp_path / "after") == before


def test_previews_go_with_their_blocks(full: Store) -> None:
    previews = objects_of(full, Kind.PREVIEW)
    assert previews
    remove(full, "merged", "expert0", "expert1")
    assert collect(full, apply=True, grace_seconds=0).objects["preview"] == len(previews)
    assert not catalog_rows(full, "previews")["previews"]
    assert not catalog_rows(full, "deltas")["deltas"]
    assert_clean(full)


def test_refs_that_were_moved_lately_count(full: Store) -> None:
    remove(full, "merged")
    age(full)
    set_times_of_moves(full, timestamp_now(), "merged")
    assert nothing(collect(full, apply=True, grace_seconds=86400))
    assert collect(full, apply=True, grace_seconds=0).commits == 1


def test_a_reader_keeps_its_commit(full: Store) -> None:
    commit = full.resolve("merged")
    remove(full, "merged")
    with reading(full.layout.temporary, [commit]):
        assert nothing(collect(full, apply=True, grace_seconds=0))
    assert collect(full, apply=True, grace_seconds=0).commits == 1


def test_a_writer_keeps_what_it_found(full: Store, tmp_path: Path) -> None:
    """An ingest that meets the blocks of a model that nobody needs any more, while a collection runs."""
    weights = fine_tune(base_weights(), 0)
    remove(full, "merged", "expert0", "expert1")
    age(full)
    with Staging(full.layout, full.catalog) as staging:
        relied = objects_of(full, Kind.BLOCK)
        assert not any(staging.claim(digest) for digest in relied)
        collect(full, apply=True, grace_seconds=0)
        assert set(relied) <= {Digest.parse(name) for name in object_files(full)}
        publish(full.catalog, staging, Changes())
    assert_clean(full)
    full.ingest([write_model(tmp_path / "again", weights)], base="base")
    assert_clean(full)


def test_a_commit_that_comes_while_it_marks(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removed ref comes back between marking and removing: it is marked again, and nothing of it goes."""
    commit = full.resolve("merged")
    remove(full, "merged")
    original = gc_module._relied_on
    moved = []

    def late(store: Store) -> set[Digest]:
        if not moved:
            moved.append(True)
            publish(store.catalog, None, Changes(refs=[RefUpdate("back", None, commit)]))
        return original(store)

    monkeypatch.setattr(gc_module, "_relied_on", late)
    assert nothing(collect(full, apply=True, grace_seconds=0))
    assert full.resolve("back") == commit
    assert_clean(full)


def test_a_tree_that_cannot_be_read(full: Store) -> None:
    """Nobody knows what it needs, so nothing goes."""
    path = Path(full.layout.object_path(full.snapshot("expert0").commit.tree))
    remove(full, "merged")
    path.unlink()
    before = object_files(full)
    with pytest.raises(DamagedError):
        collect(full, apply=True, grace_seconds=0)
    assert object_files(full) == before


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step(full: Store, step: str, tmp_path: Path) -> None:
    before = {name: content(full, name, tmp_path / name) for name in ("base", "expert0", "expert1")}
    remove(full, "merged")
    root = full.layout.root
    full.close()
    run_python(
        """
        import os, sys
        from mergepipe.store import Store, gc
        step = sys.argv[2]
        if step == "mark":
            gc._state = lambda view: os._exit(9)
        elif step == "rows":
            gc.remove_files = lambda *_: os._exit(9)
        else:
            from pathlib import Path
            unlink, count = Path.unlink, [0]
            def third(self, missing_ok=False):
                count[0] += 1
                if count[0] == 3:
                    os._exit(9)
                unlink(self, missing_ok)
            Path.unlink = third
        gc.collect(Store.open(sys.argv[1]), apply=True, grace_seconds=0)
        """,
        root, step, expect=9,
    )  # fmt: skip
    with Store.open(root) as store:
        assert_clean(store)
        left = set(object_files(store)) - {key.hex() for key in catalog_rows(store, "objects")["objects"]}
        assert bool(left) == (step != "mark")
        found = collect(store, apply=True, grace_seconds=-10)
        assert found.stray_files == len(left)
        assert set(object_files(store)) == {key.hex() for key in catalog_rows(store, "objects")["objects"]}
        assert_clean(store)
        for name, data in before.items():
            assert content(store, name, tmp_path / f"{name}-after") == data


def test_writers_and_collections_at_once(tmp_path: Path) -> None:
    """Processes that ingest, merge, remove and collect for a while: nothing that was acknowledged is lost."""
    root = tmp_path / "busy" / ".mp"
    base, experts = write_family(tmp_path / "family", 3)
    with Store.create(root, block_bytes=16384) as store:
        store.ingest([base], ref="base")
    from support.processes import start_python

    work = """
        import random, sys
        from pathlib import Path
        from mergepipe.merge import Expert, execute, plan_merge
        from mergepipe.store import Store
        from mergepipe.store.errors import ConflictError, NotFoundError, DamagedError
        from mergepipe.store.gc import collect
        from mergepipe.store.publish import Changes, RefUpdate, publish
        root, number, *experts = sys.argv[1:]
        choose = random.Random(int(number))
        acknowledged = {}
        with Store.open(root) as store:
            for turn in range(25):
                name = f"w{number}"
                try:
                    action = choose.choice(["ingest", "merge", "remove", "collect"])
                    if action == "ingest":
                        done = store.ingest([Path(choose.choice(experts))], base="base", ref=name, previews=True)
                        acknowledged[name] = done[0].commit
                    elif action == "merge" and name in acknowledged:
                        plan = plan_merge(store, "base", [Expert(name)], "task_arithmetic")
                        acknowledged[f"{name}-m"] = execute(store, plan, f"{name}-m").commit
                    elif action == "remove" and acknowledged:
                        gone = choose.choice(sorted(acknowledged))
                        publish(store.catalog, None, Changes(refs=[RefUpdate(gone, acknowledged[gone], None)]))
                        del acknowledged[gone]
                    else:
                        collect(store, apply=True, grace_seconds=0)
                except ConflictError as error:
                    assert "went away" in error.message, error
        for name, commit in sorted(acknowledged.items()):
            print(name, commit)
    """
    running = [start_python(work, root, number, *experts) for number in range(3)]
    outputs = [process.communicate(timeout=240) for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors
    with Store.open(root) as store:
        assert_clean(store)
        for line in "".join(output for output, _ in outputs).splitlines():
            name, commit = line.split()
            assert store.resolve(name).hex() == commit
            store.snapshot(name).export(tmp_path / "out" / name)
        collect(store, apply=True, grace_seconds=0)
        assert_clean(store)


def test_a_budget_still_holds_after(full: Store) -> None:
    remove(full, "merged")
    collect(full, apply=True, grace_seconds=0)
    plan = plan_merge(full, "base", [Expert("expert0"), Expert("expert1")], "linear", budget=parse_budget("30%"))
    result = execute(full, plan, "small")
    assert result.expert_bytes_read == plan.costs.expert_bytes > 0
    assert any(tensor.previews for tensor in plan.tensors.values())


def test_a_collection_ends_though_others_commit_all_the_time(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some tries it marks while all writers wait."""
    commit = full.resolve("expert0")
    remove(full, "merged")
    original = gc_module._relied_on
    tries = []

    def busy(store: Store) -> set[Digest]:
        if not in_transaction:
            tries.append(True)
            publish(store.catalog, None, Changes(refs=[RefUpdate(f"new/{len(tries)}", None, commit)]))
        return original(store)

    in_transaction: list[bool] = []
    write = full.catalog.write

    def noted(change: Callable[[Writing], object]) -> object:
        in_transaction.append(True)
        try:
            return write(change)
        finally:
            in_transaction.pop()

    monkeypatch.setattr(gc_module, "_relied_on", busy)
    monkeypatch.setattr(full.catalog, "write", noted)
    assert collect(full, apply=True, grace_seconds=0).commits == 1
    assert len(tries) == gc_module._PATIENT_TRIES
    monkeypatch.undo()
    assert_clean(full)


def test_a_reader_that_begins_while_it_marks(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = full.resolve("merged")
    remove(full, "merged")
    original = gc_module._relied_on
    with ExitStack() as held:

        def late(store: Store) -> set[Digest]:
            held.enter_context(reading(store.layout.temporary, [commit]))
            monkeypatch.setattr(gc_module, "_relied_on", original)
            return original(store)

        monkeypatch.setattr(gc_module, "_relied_on", late)
        assert nothing(collect(full, apply=True, grace_seconds=0))
        assert full.commit(commit)
    assert collect(full, apply=True, grace_seconds=0).commits == 1


def test_an_export_of_what_was_collected_meanwhile(full: Store, tmp_path: Path) -> None:
    snapshot = full.snapshot("merged")
    assert snapshot.tensors
    remove(full, "merged")
    collect(full, apply=True, grace_seconds=0)
    with pytest.raises(ConflictError, match="went away while it was being read") as caught:
        snapshot.export(tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
