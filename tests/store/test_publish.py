"""Publishing: all or nothing, whoever else writes and whenever the process dies."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from mergepipe.store import Digest, Store
from mergepipe.store import catalog as catalog_module
from mergepipe.store import publish as publish_module
from mergepipe.store.canonical import load_strict
from mergepipe.store.catalog import Writing
from mergepipe.store.commits import Commit, Parent
from mergepipe.store.digest import hash_bytes
from mergepipe.store.errors import ConflictError, EnvironmentalError
from mergepipe.store.frame import Kind
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import find_ref
from mergepipe.store.staging import Staging
from support.checkpoints import folder_bytes
from support.family import write_family
from support.processes import run_python, start_python
from support.stores import assert_clean, catalog_rows, object_files, object_path, state_of, writers_left


@pytest.fixture
def treeless(hurt_store: Store) -> Store:
    """A store for commits without trees, which is no whole one in the end."""
    return hurt_store


NOISE = np.random.default_rng(0).integers(0, 256, (8, 4096), np.uint8)


def commit_of(message: str) -> Commit:
    return Commit(Digest(b"\1" * 32), (), "ingest", message, "me", "2026-01-01T00:00:00.000000Z", "test")


def stage(staging: Staging, count: int = 1) -> list[Digest]:
    ids = []
    for data in NOISE[:count]:
        digest = hash_bytes(data.tobytes())
        if staging.claim(digest):
            staging.add_block(Kind.BLOCK, digest, data, 1)
        ids.append(digest)
    return ids


def ref_of(store: Store, name: str) -> Digest | None:
    with store.catalog.reading() as view:
        ref = find_ref(view, name)
    return ref.commit if ref else None


def move(store: Store, name: str, expected: Digest | None, new: Digest | None) -> None:
    publish(store.catalog, None, Changes(refs=[RefUpdate(name, expected, new, reason="test", author="me")]))


class TestRefs:
    def test_they_move_only_from_where_the_writer_saw_them(self, treeless: Store) -> None:
        one, other, third = (commit_of(text) for text in "abc")
        publish(treeless.catalog, None, Changes(commits=[one, other, third], refs=[RefUpdate("m", None, one.id)]))
        move(treeless, "m", one.id, other.id)
        with pytest.raises(ConflictError) as caught:
            move(treeless, "m", one.id, third.id)
        assert one.id.short in caught.value.message
        assert other.id.short in caught.value.message
        assert "'m'" in caught.value.message
        assert caught.value.hint == "Look at it with `mp log`, then run the command again."
        assert ref_of(treeless, "m") == other.id
        move(treeless, "m", other.id, None)

    def test_a_ref_that_should_not_exist_and_does(self, treeless: Store) -> None:
        one, other = commit_of("a"), commit_of("b")
        publish(treeless.catalog, None, Changes(commits=[one, other], refs=[RefUpdate("m", None, one.id)]))
        with pytest.raises(ConflictError, match=f"absent and is now {one.id.short}"):
            move(treeless, "m", None, other.id)
        move(treeless, "m", one.id, None)
        with pytest.raises(ConflictError, match=f"was {one.id.short} and is now gone"):
            move(treeless, "m", one.id, other.id)

    def test_two_moves_happen_both_or_not_at_all(self, store: Store) -> None:
        one = commit_of("a")
        updates = [RefUpdate("new", None, one.id), RefUpdate("m", one.id, one.id)]
        with pytest.raises(ConflictError):
            publish(store.catalog, None, Changes(commits=[one], refs=updates))
        assert not any(catalog_rows(store).values())

    def test_every_move_is_logged(self, treeless: Store) -> None:
        one, other = commit_of("a").id, commit_of("b").id
        publish(treeless.catalog, None, Changes(commits=[commit_of("a"), commit_of("b")]))
        for expected, new in ((None, one), (one, other), (other, None), (None, one)):
            move(treeless, "m", expected, new)
        rows = catalog_rows(treeless, "reflog")["reflog"]
        assert list(rows) == [b"m\0" + number.to_bytes(8, "big") for number in range(4)]
        entries = [load_strict(row, "x") for row in rows.values()]
        assert [(entry["old"], entry["new"]) for entry in entries] == [
            (None, one.hex()), (one.hex(), other.hex()), (other.hex(), None), (None, one.hex()),
        ]  # fmt: skip
        assert all((entry["reason"], entry["author"]) == ("test", "me") for entry in entries)
        move(treeless, "m", one, None)


def test_what_was_collected_meanwhile_is_not_relied_on(store: Store) -> None:
    """A parent, a ref's commit, a base block, and an object that was there when it was claimed."""
    one = commit_of("a")
    gone = replace(commit_of("b"), parents=(Parent(one.id, "previous"),))
    for changes in (Changes(commits=[gone]), Changes(refs=[RefUpdate("m", None, one.id)])):
        with pytest.raises(ConflictError, match=f"commit {one.id.short} went away") as caught:
            publish(store.catalog, None, changes)
        assert caught.value.hint == "Run the command again."
    old, new = NOISE[0], NOISE[0] ^ 1
    with Staging(store.layout, store.catalog) as staging:
        stage(staging)
        publish(store.catalog, staging, Changes())
    with Staging(store.layout, store.catalog) as delta, Staging(store.layout, store.catalog) as again:
        digest = hash_bytes(new.tobytes())
        assert delta.claim(digest)
        base = hash_bytes(old.tobytes())
        assert delta.add_block(Kind.BLOCK, digest, new, 1, (base, old)).base == base
        assert not again.claim(base)
        store.catalog.write(lambda view: view.delete("objects", base))
        for staging in (delta, again):
            with pytest.raises(ConflictError, match=f"{base.short}.* went away"):
                publish(store.catalog, staging, Changes())
    assert not any(catalog_rows(store, "objects", "commits", "refs").values())
    object_path(store, base).unlink()  # as a collection does


class TestObjects:
    def test_nothing_is_visible_before(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """A reader that looks at the last moment sees what was there before."""
        seen: list[object] = []
        original = publish_module._move_ref

        def look(view: object, update: object) -> None:
            with store.catalog.reading() as reader:
                seen.append((reader.count("objects"), reader.count("refs"), reader.count("commits")))
            original(view, update)  # type: ignore[arg-type]

        monkeypatch.setattr(publish_module, "_move_ref", look)
        with Staging(store.layout, store.catalog) as staging:
            commit = commit_of("a")
            publish_ids = stage(staging, 3)
            publish(store.catalog, staging, Changes(commits=[commit], refs=[RefUpdate("m", None, commit.id)]))
        assert seen == [(0, 0, 0)]
        assert len(object_files(store)) == 3
        assert set(catalog_rows(store)["objects"]) == set(publish_ids)
        move(store, "m", commit.id, None)
        store.catalog.write(lambda view: view.delete("commits", commit.id))

    def test_a_conflict_moves_no_object(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            stage(staging)
            with pytest.raises(ConflictError):
                publish(store.catalog, staging, Changes(refs=[RefUpdate("m", Digest(bytes(32)), None)]))
        assert object_files(store) == {}
        assert not any(catalog_rows(store).values())

    def test_objects_are_read_only_files(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            (digest,) = stage(staging)
            publish(store.catalog, staging, Changes())
        assert object_path(store, digest).stat().st_mode & 0o222 == 0

    def test_what_another_writer_published_meanwhile_stays(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as one, Staging(store.layout, store.catalog) as other:
            (digest,) = stage(one)
            stage(other)
            publish(store.catalog, one, Changes())
            first = object_path(store, digest).stat()
            publish(store.catalog, other, Changes())
            assert object_path(store, digest).stat().st_ino == first.st_ino

    def test_and_what_it_did_not_comes(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as one, Staging(store.layout, store.catalog) as other:
            stage(one, 2)
            ids = stage(other, 4)
            publish(store.catalog, one, Changes())
            publish(store.catalog, other, Changes())
        assert set(catalog_rows(store, "objects")["objects"]) == set(ids)
        assert_clean(store)

    def test_a_store_that_is_taken_away_meanwhile(self, store: Store, tmp_path: Path) -> None:
        settings = store.layout.root / "store.json"
        with Staging(store.layout, store.catalog) as staging:
            stage(staging)
            settings.rename(tmp_path / "away")
            with pytest.raises(ConflictError, match=f"the store {store.layout.root} was taken away") as caught:
                publish(store.catalog, staging, Changes())
            assert caught.value.hint == "Run the command again."
            (tmp_path / "away").rename(settings)
        assert not any(catalog_rows(store).values())

    def test_a_file_without_a_row_is_replaced(self, store: Store) -> None:
        digest = hash_bytes(NOISE[0].tobytes())
        object_path(store, digest).write_bytes(b"left by a crash")
        with Staging(store.layout, store.catalog) as staging:
            stage(staging)
            publish(store.catalog, staging, Changes())

    def test_what_is_relied_on_must_be_there(self, store: Store) -> None:
        gone = hash_bytes(b"gone")
        with pytest.raises(ConflictError, match=gone.short):
            publish(store.catalog, None, Changes(relied_on=[gone], results={b"r": gone}))
        assert not any(catalog_rows(store).values())

    def test_what_is_relied_on_is_renewed(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Once a minute at most: that is no reason to write."""
        with Staging(store.layout, store.catalog) as staging:
            (digest,) = stage(staging)
            publish(store.catalog, staging, Changes())

        def touched() -> int:
            with store.catalog.reading() as view:
                row = view.object_row(digest)
            assert row is not None
            return row.touched

        def age(seconds: int) -> None:
            def change(view: Writing) -> None:
                row = view.object_row(digest)
                assert row is not None
                view.put("objects", digest, replace(row, touched=now - seconds).pack())

            store.catalog.write(change)

        now = touched()
        monkeypatch.setattr(publish_module, "unix_time", lambda: now)
        for seconds, renewed in ((100_000, True), (61, True), (60, False), (1, False), (-30, False)):
            age(seconds)
            publish(store.catalog, None, Changes(relied_on=[digest]))
            assert touched() == (now if renewed else now - seconds)

    def test_a_map_that_grows_in_the_middle_changes_nothing(
        self, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(catalog_module, "_MAP_BYTES", 256 << 10)
        store = make_store()
        base, (expert, _) = write_family(tmp_path)
        runs = []
        original = publish_module._put_rows

        def count(*arguments: object) -> None:
            runs.append(1)
            original(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(publish_module, "_put_rows", count)
        changes = Changes(results={number.to_bytes(32, "big"): Digest(bytes(32)) for number in range(9000)})
        with Staging(store.layout, store.catalog) as staging:
            ids = stage(staging, 8)
            publish(store.catalog, staging, changes)
        assert len(runs) > 1, "the map was large enough, and the test proves nothing"
        assert set(catalog_rows(store)["objects"]) == set(ids)
        assert catalog_rows(store, "results")["results"] == changes.results
        store.ingest([base])
        store.ingest([expert], base="base")

    def test_without_one_flush_for_all_each_file_is_flushed(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flushed: list[str] = []
        original = os.fsync

        def note(descriptor: int) -> None:
            flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            original(descriptor)

        monkeypatch.setattr(publish_module, "flush_filesystem", lambda _: False)
        monkeypatch.setattr(os, "fsync", note)
        with Staging(store.layout, store.catalog) as staging:
            ids = stage(staging, 3)
            publish(store.catalog, staging, Changes())
            for digest in ids:
                assert str(staging.file_of(digest)) in flushed
                assert str(object_path(store, digest).parent) in flushed

    @pytest.mark.parametrize("call", ["flush_filesystem", "replace"])
    def test_an_error_of_the_system_changes_nothing(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        commit = commit_of("a")
        with Staging(store.layout, store.catalog) as staging:
            stage(staging, 2)
            with monkeypatch.context() as patched:
                patched.setattr(publish_module if call == "flush_filesystem" else publish_module.os, call, fail)
                doing = "moving new objects into place" if call == "replace" else "flushing new objects to disk"
                with pytest.raises(EnvironmentalError, match=doing):
                    publish(store.catalog, staging, Changes(commits=[commit], refs=[RefUpdate("m", None, commit.id)]))
            assert not any(catalog_rows(store).values())
            publish(store.catalog, staging, Changes())


# Where the process dies: what is called, and whether before ("<"), after (">") or which call of it.
STEPS = {
    "while staging": ("staging.Staging.add_block", "<", 5),
    "before the flush": ("publish.flush_filesystem", "<", 1),
    "after the flush": ("publish.flush_filesystem", ">", 1),
    "before the first rename": ("publish.os.replace", "<", 1),
    "after some renames": ("publish.os.replace", ">", 7),
    "after all renames": ("publish.flush_filesystem", "<", 2),
    "before the rows": ("publish._put_rows", "<", 1),
    "before the ref": ("publish._move_ref", "<", 1),
    "before the transaction ends": ("publish._move_ref", ">", 1),
}
AFTER = ("publish.Catalog.write", ">", 1)
# One process with everything loaded, that forks a writer for each step and lets it die there.
WRITERS = """
    import json, os, sys
    from mergepipe.store import Store
    from support.processes import die_at
    import mergepipe.store.ingest

    expert, warm, *roots = sys.argv[2:]
    with Store.open(warm) as store:
        store.ingest([expert], base="base")
    for root, step in zip(roots, json.loads(sys.argv[1]), strict=True):
        if os.fork() == 0:
            die_at(*step)
            Store.open(root).ingest([expert], base="base")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 77, step
"""


@dataclass(frozen=True)
class Crashed:
    """Stores whose writers died, by step, and what was in them before."""

    expert: Path
    roots: dict[str, Path]
    before: object


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Crashed:
    top = tmp_path_factory.mktemp("crashes")
    base, (expert, _) = write_family(top)
    with Store.create(top / "first", block_bytes=4096) as store:
        store.ingest([base])
        before = state_of(store)
    roots = {step: top / step for step in (*STEPS, "after", "warm")}
    for root in roots.values():
        shutil.copytree(top / "first", root)
    steps = json.dumps([*STEPS.values(), AFTER])
    run_python(WRITERS, steps, expert, roots["warm"], *(roots[step] for step in (*STEPS, "after")))
    return Crashed(expert, roots, before)


class TestCrashes:
    @pytest.mark.parametrize("step", list(STEPS))
    def test_a_writer_that_dies_leaves_the_store_as_it_was(self, crashed: Crashed, tmp_path: Path, step: str) -> None:
        with Store.open(crashed.roots[step]) as store:
            assert state_of(store) == crashed.before
            assert_clean(store)
            assert ref_of(store, "expert0") is None
            (result,) = store.ingest([crashed.expert], base="base")
            assert ref_of(store, "expert0") == result.commit
            assert writers_left(store) == []
            store.snapshot("expert0").export(tmp_path / "out")
            assert folder_bytes(tmp_path / "out") == folder_bytes(crashed.expert)
            assert_clean(store)

    def test_one_that_dies_after_it_has_published_lost_nothing(self, crashed: Crashed) -> None:
        with Store.open(crashed.roots["after"]) as store:
            assert_clean(store)
            assert ref_of(store, "expert0") is not None
            (result,) = store.ingest([crashed.expert], base="base")
            assert (result.unchanged, result.written_bytes) == (True, 0)


class TestTwoProcesses:
    def test_one_ref_has_one_winner_and_a_clear_loser(self, store: Store, tmp_path: Path) -> None:
        """Both read the ref, then both move it."""
        _, experts = write_family(tmp_path)
        code = """
            import sys
            from pathlib import Path
            from mergepipe.store import Store
            from mergepipe.store.errors import ConflictError
            from mergepipe.store.ingest import ingest
            print("ready", flush=True)
            waited = False
            def wait(stage, done, total):
                global waited
                if not waited:
                    waited = True
                    print("reading", flush=True)
                    sys.stdin.readline()
            try:
                with Store.open(sys.argv[1]) as store:
                    store.ingest([sys.argv[2]], ref="m", progress=wait)
            except ConflictError as error:
                print(error)
                sys.exit(error.exit_code)
        """
        children = [start_python(code, store.layout.root, path) for path in experts]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            assert child.stdout.readline() == "reading\n"
        outputs = [child.communicate("\n", timeout=120) for child in children]
        assert [child.returncode for child in children].count(0) == 1, outputs
        loser = next(index for index, child in enumerate(children) if child.returncode)
        winner = ref_of(store, "m")
        assert winner is not None
        assert children[loser].returncode == 6
        assert "'m' was absent" in outputs[loser][0]
        assert winner.short in outputs[loser][0]
        assert_clean(store)

    def test_different_refs_do_not_disturb_each_other(self, store: Store, tmp_path: Path) -> None:
        base, experts = write_family(tmp_path, experts=1)
        code = """
            import sys
            from mergepipe.store import Store
            with Store.open(sys.argv[1]) as store:
                store.ingest([sys.argv[2]])
        """
        children = [start_python(code, store.layout.root, path) for path in [base, *experts]]
        for child in children:
            _, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors
        for path in [base, *experts]:
            store.snapshot(path.name).export(tmp_path / "out" / path.name)
            original = (path / "model.safetensors").read_bytes()
            assert (tmp_path / "out" / path.name / "model.safetensors").read_bytes() == original


class TestThreads:
    def test_of_one_store_ingest_side_by_side(self, store: Store, tmp_path: Path) -> None:
        base, experts = write_family(tmp_path, experts=4)
        store.ingest([base])
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda path: store.ingest([path], base="base", workers=2), experts))
        for path in experts:
            store.snapshot(path.name).export(tmp_path / "out" / path.name)
            assert folder_bytes(tmp_path / "out" / path.name) == folder_bytes(path)


class TestInterrupts:
    def test_one_that_comes_too_late_is_dropped(self, treeless: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """All is done at that moment: an error would say that nothing was."""
        original = publish_module._put_rows

        def interrupted(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            original(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(publish_module, "_put_rows", interrupted)
        before = signal.getsignal(signal.SIGINT)
        commit = commit_of("a")
        publish(treeless.catalog, None, Changes(commits=[commit], refs=[RefUpdate("m", None, commit.id)]))
        assert ref_of(treeless, "m") == commit.id
        assert signal.getsignal(signal.SIGINT) is before
        publish(treeless.catalog, None, Changes(refs=[RefUpdate("m", commit.id, None)]))

    def test_one_that_comes_before_is_not(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(_: Path) -> bool:
            os.kill(os.getpid(), signal.SIGINT)
            return True

        monkeypatch.setattr(publish_module, "flush_filesystem", interrupted)
        with pytest.raises(KeyboardInterrupt), Staging(store.layout, store.catalog) as staging:
            stage(staging)
            publish(store.catalog, staging, Changes())
        assert not any(catalog_rows(store).values())
        assert writers_left(store) == []
