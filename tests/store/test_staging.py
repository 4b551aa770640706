"""Unpublished work: the smallest encoding wins, ids are claimed once, and nothing stays behind."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mergepipe.store import Digest, Store, leases
from mergepipe.store.digest import hash_bytes, hash_record
from mergepipe.store.errors import MergePipeError
from mergepipe.store.frame import HEADER_BYTES, Encoding, Kind, check_matches, unpack_header
from mergepipe.store.leases import is_abandoned, remove_abandoned, write_lease
from mergepipe.store.publish import Changes, publish
from mergepipe.store.staging import Staging
from support.processes import run_python, start_python
from support.stores import catalog_rows, object_files, object_path, writers_left

NOISE = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
CALM = np.random.default_rng(1).integers(0, 4, 4096, np.uint8)
NEAR = (CALM.view(np.int16) + np.random.default_rng(2).integers(0, 2, 2048, np.int16)).view(np.uint8)


def block_id(data: NDArray[np.uint8]) -> Digest:
    return hash_bytes(data.tobytes())


def stage(staging: Staging, data: NDArray[np.uint8], width: int = 2, base: NDArray[np.uint8] | None = None) -> Digest:
    digest = block_id(data)
    if staging.claim(digest):
        staging.add_block(Kind.BLOCK, digest, data, width, None if base is None else (block_id(base), base))
    return digest


class TestEncodings:
    def test_noise_is_kept_raw(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            row = staging.rows[stage(staging, NOISE)]
            assert (row.encoding, row.stored_bytes) == (Encoding.RAW, HEADER_BYTES + 4096)

    def test_planes_where_they_are_smaller(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            row = staging.rows[stage(staging, CALM)]
            assert row.encoding is Encoding.PLANES
            assert row.stored_bytes < 4096

    def test_a_delta_where_that_is_smaller_still(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            row = staging.rows[stage(staging, NEAR, base=CALM)]
            assert (row.encoding, row.base) == (Encoding.DELTA, block_id(CALM))

    def test_no_delta_where_planes_are_smaller(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            row = staging.rows[stage(staging, CALM, base=NOISE)]
            assert (row.encoding, row.base) == (Encoding.PLANES, None)

    def test_no_delta_of_a_block_to_itself_or_of_eight_byte_elements(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            assert staging.rows[stage(staging, CALM, base=CALM)].base is None
            assert staging.rows[stage(staging, NEAR, width=8, base=CALM)].base is None

    def test_an_odd_size_is_encoded_byte_by_byte(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            row = staging.rows[stage(staging, CALM[:4095].copy(), width=4)]
            assert (row.encoding, row.width, row.raw_bytes) == (Encoding.PLANES, 1, 4095)

    def test_the_file_is_a_whole_object(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            for digest in (stage(staging, NOISE), stage(staging, CALM), stage(staging, NEAR, base=CALM)):
                data = staging.file_of(digest).read_bytes()
                row = staging.rows[digest]
                header = unpack_header(data)
                assert check_matches(data)
                assert len(data) == row.stored_bytes == header.stored_bytes
                assert (header.kind, header.encoding, header.base) == (row.kind, row.encoding, row.base)
            assert staging.written_bytes == sum(row.stored_bytes for row in staging.rows.values())

    def test_records_are_deflated_where_that_helps(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            small, large = staging.add_record(Kind.NODE, b"{}"), staging.add_record(Kind.NODE, b"{ }" * 500)
            assert small == hash_record("node", b"{}")
            assert staging.rows[small].encoding is Encoding.RAW
            assert staging.rows[large].encoding is Encoding.DEFLATE
            assert staging.rows[large].stored_bytes < 200


class TestWriting:
    @pytest.mark.parametrize("most", [1, 95, 97, 5000])
    def test_a_system_that_writes_a_part_at_a_time(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, most: int
    ) -> None:
        def some(descriptor: int, parts: list[memoryview]) -> int:
            return os.write(descriptor, b"".join(parts)[:most])

        with monkeypatch.context() as patched:
            patched.setattr(os, "writev", some)
            with Staging(store.layout, store.catalog) as staging:
                digest = stage(staging, CALM)
                publish(store.catalog, staging, Changes())
        assert store.reader.read_piece(digest, CALM.nbytes) == CALM.tobytes()

    def test_one_that_writes_nothing(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        with Staging(store.layout, store.catalog) as staging, monkeypatch.context() as patched:
            patched.setattr(os, "writev", lambda *_: 0)
            with pytest.raises(MergePipeError, match="wrote nothing"):
                stage(staging, CALM)
            assert staging.rows == {}


class TestClaims:
    def test_one_thread_of_many_gets_an_id(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            digest = block_id(NOISE)
            got: list[bool] = []
            threads = [threading.Thread(target=lambda: got.append(staging.claim(digest))) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(got) == [False] * 15 + [True]

    def test_what_is_stored_is_not_claimed(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            digest = stage(staging, NOISE)
            publish(store.catalog, staging, Changes())
        with Staging(store.layout, store.catalog) as staging:
            assert not staging.claim(digest)
            assert staging.claim(block_id(CALM))

    @pytest.mark.parametrize("harm", ["delete", "truncate", "mark"])
    def test_what_was_lost_is(self, hurt_store: Store, harm: str) -> None:
        store = hurt_store
        with Staging(store.layout, store.catalog) as staging:
            digest = stage(staging, NOISE)
            publish(store.catalog, staging, Changes())
        path = object_path(store, digest)
        if harm == "mark":
            store.catalog.write(lambda view: view.put("damaged", digest, b""))
        else:
            path.unlink()
        if harm == "truncate":
            path.write_bytes(b"short")
        with Staging(store.layout, store.catalog) as staging:
            assert stage(staging, NOISE) in staging.rows
            publish(store.catalog, staging, Changes())
        assert check_matches(path.read_bytes())
        assert catalog_rows(store, "damaged") == {"damaged": {}}

    def test_a_lost_base_is_not_written_anew_as_a_delta(self, store: Store) -> None:
        """Others may be deltas to it, and a delta's base is never a delta itself."""
        with Staging(store.layout, store.catalog) as staging:
            base, tuned = stage(staging, CALM), stage(staging, NEAR, base=CALM)
            publish(store.catalog, staging, Changes())
        object_path(store, base).unlink()
        other = (CALM.view(np.int16) + np.int16(1)).view(np.uint8)
        with Staging(store.layout, store.catalog) as staging:
            stage(staging, other)
            stage(staging, CALM, base=other)
            assert staging.rows[base].encoding is Encoding.PLANES
            publish(store.catalog, staging, Changes())
        out = np.empty(4096, np.uint8)
        store.reader.read_block(tuned, out)
        assert np.array_equal(out, NEAR)


class TestCleanliness:
    def test_nothing_is_visible_and_nothing_stays(self, store: Store) -> None:
        with Staging(store.layout, store.catalog) as staging:
            stage(staging, NOISE)
            assert len(writers_left(store)) == 1
        assert writers_left(store) == []
        assert object_files(store) == {}
        assert not any(catalog_rows(store).values())

    def test_nor_after_an_error(self, store: Store) -> None:
        with pytest.raises(KeyboardInterrupt), Staging(store.layout, store.catalog) as staging:
            stage(staging, NOISE)
            raise KeyboardInterrupt
        assert writers_left(store) == []

    def test_what_a_dead_writer_left_is_removed_by_the_next(self, store: Store) -> None:
        run_python(
            """
            import os, sys
            from mergepipe.store import Store
            from mergepipe.store.frame import Kind
            from mergepipe.store.staging import Staging
            store = Store.open(sys.argv[1])
            staging = Staging(store.layout, store.catalog).__enter__()
            staging.add_record(Kind.NODE, b"{}")
            os._exit(9)
            """,
            store.layout.root,
            expect=9,
        )
        (left,) = writers_left(store)
        with Staging(store.layout, store.catalog) as staging:
            assert writers_left(store) == [staging.path.name]
            assert left != staging.path.name


class TestLeases:
    def test_a_living_writer_keeps_its_folder(self, tmp_path: Path) -> None:
        held = write_lease(tmp_path)
        assert not is_abandoned(tmp_path)
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
        os.close(held)
        assert is_abandoned(tmp_path)

    @pytest.mark.parametrize("name", ["host", "namespace", "pid"])
    def test_under_one_kernel_the_lock_says_it(self, tmp_path: Path, name: str) -> None:
        """Of another container, say; or its number is somebody else's by now."""
        held = write_lease(tmp_path)
        change_lease(tmp_path, **{name: 1 if name == "pid" else "elsewhere"})
        assert not is_abandoned(tmp_path)
        os.close(held)
        assert is_abandoned(tmp_path)

    def test_a_writer_that_is_killed_lets_go(self, tmp_path: Path) -> None:
        code = """
        import sys, time
        from pathlib import Path
        from mergepipe.store.leases import make_folder
        make_folder(Path(sys.argv[1]))
        print(flush=True)
        time.sleep(600)
        """
        child = start_python(code, tmp_path)
        assert child.stdout is not None
        child.stdout.readline()
        (folder,) = tmp_path.iterdir()
        assert not is_abandoned(folder)
        child.kill()
        child.wait()
        assert is_abandoned(folder)

    def test_a_folder_that_goes_is_let_go(self, tmp_path: Path) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            leases.remove_folder(leases.make_folder(tmp_path))
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    @pytest.mark.parametrize("name", ["host", "boot", "namespace"])
    def test_one_from_elsewhere_is_left_alone(self, tmp_path: Path, name: str) -> None:
        """Where there is no lock: a process number means nothing on another machine."""
        abandon(tmp_path)
        change_lease(tmp_path, locked=False)
        assert is_abandoned(tmp_path)
        change_lease(tmp_path, **{name: "elsewhere"})
        assert not is_abandoned(tmp_path)

    @pytest.mark.parametrize("where", ["host", "boot"])
    def test_a_lock_of_another_machine_cannot_be_seen(self, tmp_path: Path, where: str) -> None:
        abandon(tmp_path)
        change_lease(tmp_path, host="elsewhere", boot="elsewhere" if where == "boot" else "")
        assert not is_abandoned(tmp_path)

    def test_a_filesystem_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_descriptor: int, _operation: int) -> None:
            raise OSError(errno.ENOLCK, "no locks")

        with monkeypatch.context() as patch:
            patch.setattr(leases.fcntl, "flock", refuse)
            held = write_lease(tmp_path)
            assert not is_abandoned(tmp_path)
        assert json.loads((tmp_path / "lease.json").read_text())["locked"] is False
        os.close(held)
        assert not is_abandoned(tmp_path)  # this process still runs
        abandon(tmp_path)
        monkeypatch.setattr(leases.fcntl, "flock", refuse)
        assert not is_abandoned(tmp_path)  # it was locked, and nobody can tell whether it still is

    @pytest.mark.parametrize("locked", [True, False])
    def test_one_from_before_this_machine_was_started(self, tmp_path: Path, locked: bool) -> None:
        """Dead where it names an earlier time, and nobody has touched anything for a day."""
        abandon(tmp_path)
        long_ago = leases._boot_time() - 10
        change_lease(tmp_path, boot="an earlier one", started=long_ago, locked=locked)
        assert not is_abandoned(tmp_path)
        old = time.time() - 90_000
        make_old(tmp_path, old)
        assert is_abandoned(tmp_path)
        (tmp_path / "pins").write_bytes(b"")
        os.utime(tmp_path, (old, old))
        assert not is_abandoned(tmp_path)
        make_old(tmp_path, old)
        for changes in ({"host": "elsewhere"}, {"started": time.time()}, {"boot": ""}, {"boot": None}):
            changed = tmp_path / str(len(list(tmp_path.iterdir())))
            changed.mkdir()
            (changed / "lease.json").write_text((tmp_path / "lease.json").read_text())
            change_lease(changed, **changes)
            make_old(changed, old)
            assert not is_abandoned(changed), changes
        held = os.open(tmp_path / "lease.json", os.O_RDONLY)
        leases.fcntl.flock(held, leases.fcntl.LOCK_EX)
        make_old(tmp_path, old)
        assert not is_abandoned(tmp_path)
        os.close(held)
        assert is_abandoned(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x"}', "\0"])
    def test_one_that_cannot_be_read_is_left_alone(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "lease.json").write_text(text)
        assert not is_abandoned(tmp_path)

    def test_only_abandoned_folders_go(self, fresh: Callable[[], Path]) -> None:
        top = fresh()
        for name in ("dead", "alive", "unknown"):
            (top / name).mkdir()
        (top / "file").write_bytes(b"x")
        (top / "link").symlink_to(top / "dead")
        abandon(top / "dead")
        write_lease(top / "alive")
        assert remove_abandoned(top) == 1
        assert sorted(path.name for path in top.iterdir()) == ["alive", "file", "link", "unknown"]
        assert remove_abandoned(top / "missing") == 0


class TestFolders:
    """A folder has its name only while its lease is in it, so that whoever dies leaves none that nobody can judge."""

    def test_one_that_is_half_made_is_nobodys(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[str] = []

        def dies(folder: Path) -> None:
            seen.append(folder.name)
            raise KeyboardInterrupt

        monkeypatch.setattr(leases, "write_lease", dies)
        with pytest.raises(KeyboardInterrupt):
            leases.make_folder(tmp_path)
        (left,) = tmp_path.iterdir()
        assert [left.name] == seen
        assert is_abandoned(left)
        assert not leases.living_leases(tmp_path)
        assert remove_abandoned(tmp_path) == 0  # somebody may be making it now
        then = time.time() - 100
        os.utime(left, (then, then))
        assert remove_abandoned(tmp_path) == 1
        assert not list(tmp_path.iterdir())

    def test_one_that_is_half_removed_is_nobodys(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = leases.make_folder(tmp_path)
        assert not is_abandoned(folder)
        with monkeypatch.context() as patched:
            patched.setattr(leases.shutil, "rmtree", lambda *_, **__: None)
            leases.remove_folder(folder)
        (left,) = tmp_path.iterdir()
        assert left.name == f".{folder.name}"
        assert is_abandoned(left)
        leases.remove_folder(left)
        assert not list(tmp_path.iterdir())

    def test_no_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(_: Path) -> None:
            raise OSError(28, "full")

        monkeypatch.setattr(leases, "write_lease", fails)
        with pytest.raises(OSError, match="full"):
            leases.make_folder(tmp_path)
        assert not list(tmp_path.iterdir())


def abandon(folder: Path) -> None:
    """A lease of a process that is gone."""
    child = os.fork()
    if child == 0:
        try:
            write_lease(folder)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def change_lease(folder: Path, **changes: object) -> None:
    path = folder / "lease.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_old(folder: Path, when: float) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (when, when))
