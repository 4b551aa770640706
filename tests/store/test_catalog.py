"""The catalog: rows as the format says, one writer at a time, never across a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.store import catalog as catalog_module
from mergepipe.store.catalog import Catalog, ObjectRow, Writing, open_catalog, release_catalog, unpack_object_row
from mergepipe.store.digest import Digest
from mergepipe.store.errors import DamagedError, EnvironmentalError
from mergepipe.store.frame import Encoding, Kind
from support.processes import run_python, start_python

sizes = st.integers(0, 2**64 - 1)
rows = st.builds(
    ObjectRow,
    kind=st.sampled_from(Kind),
    encoding=st.sampled_from(Encoding),
    width=st.sampled_from([1, 2, 4, 8]),
    raw_bytes=sizes,
    stored_bytes=sizes,
    touched=sizes,
    base=st.none() | st.binary(min_size=32, max_size=32).filter(any).map(Digest),
)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = open_catalog(tmp_path, create=True)
    yield opened
    release_catalog(opened)


def put(database: str, items: dict[bytes, bytes]) -> object:
    def change(view: Writing) -> None:
        for key, value in items.items():
            view.put(database, key, value)

    return change


class TestObjectRows:
    @given(rows)
    def test_they_come_back(self, row: ObjectRow) -> None:
        assert unpack_object_row(row.pack()) == row

    def test_every_byte_is_where_the_format_says(self) -> None:
        row = ObjectRow(Kind.BLOCK, Encoding.DELTA, 2, 0x1111, 0x2222, 0x3333, Digest(b"\x44" * 32))
        numbers = b"".join(number.to_bytes(8, "little") for number in (0x1111, 0x2222, 0x3333))
        assert row.pack() == bytes([1, 2, 2, 0, 0, 0, 0, 0]) + numbers + b"\x44" * 32

    @pytest.mark.parametrize("data", [b"", bytes(63), bytes(65), bytes(64), b"\1\x09" + bytes(62)])
    def test_other_bytes_are_damage(self, catalog: Catalog, data: bytes) -> None:
        digest = Digest(b"\5" * 32)
        catalog.write(lambda view: view.put("objects", digest, data))
        with catalog.reading() as view, pytest.raises(DamagedError, match=digest.short):
            view.object_row(digest)


class TestTransactions:
    def test_rows_are_there_after_reopening(self, tmp_path: Path) -> None:
        first = open_catalog(tmp_path, create=True)
        first.write(put("meta", {b"k": b"v"}))
        release_catalog(first)
        second = open_catalog(tmp_path, create=True)
        with second.reading() as view:
            assert view.get("meta", b"k") == b"v"
            assert view.get("meta", b"other") is None
            assert view.get("refs", b"k") is None
            assert view.count("meta") == 1
        release_catalog(second)

    def test_an_error_undoes_everything(self, catalog: Catalog) -> None:
        def change(view: Writing) -> None:
            view.put("meta", b"a", b"1")
            view.put("refs", b"b", b"2")
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            catalog.write(change)
        with catalog.reading() as view:
            assert (view.count("meta"), view.count("refs")) == (0, 0)

    def test_a_reader_sees_one_moment(self, catalog: Catalog) -> None:
        catalog.write(put("meta", {b"k": b"old"}))
        with catalog.reading() as view:
            thread = threading.Thread(target=catalog.write, args=[put("meta", {b"k": b"new"})])
            thread.start()
            thread.join()
            assert view.get("meta", b"k") == b"old"
        with catalog.reading() as view:
            assert view.get("meta", b"k") == b"new"

    def test_deleting_says_whether_there_was_something(self, catalog: Catalog) -> None:
        catalog.write(put("meta", {b"k": b"v"}))
        assert catalog.write(lambda view: view.delete("meta", b"k")) is True
        assert catalog.write(lambda view: view.delete("meta", b"k")) is False

    @given(st.sets(st.binary(min_size=1, max_size=3), max_size=30), st.binary(max_size=2))
    def test_prefixes(self, tmp_path: Path, keys: set[bytes], prefix: bytes) -> None:
        catalog = open_catalog(tmp_path, create=True)
        try:
            old = catalog.write(lambda view: [key for key, _ in view.items("meta")])
            catalog.write(lambda view: [view.delete("meta", key) for key in old])
            catalog.write(put("meta", dict.fromkeys(keys, b"")))
            expected = sorted(key for key in keys if key.startswith(prefix))
            with catalog.reading() as view:
                assert [key for key, _ in view.items("meta", prefix)] == expected
                assert [key for key, _ in view.items("meta", prefix, reverse=True)] == expected[::-1]
        finally:
            release_catalog(catalog)


class TestGrowing:
    def test_the_map_grows_when_it_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(catalog_module, "_MAP_BYTES", 256 << 10)
        catalog = open_catalog(tmp_path, create=True)
        runs = 0

        def change(view: Writing) -> str:
            nonlocal runs
            runs += 1
            for number in range(2000):
                view.put("meta", number.to_bytes(4, "big"), bytes(1000))
            return "done"

        try:
            assert catalog.write(change) == "done"
            assert runs > 1, "the map was large enough, and the test proves nothing"
            with catalog.reading() as view:
                assert view.count("meta") == 2000
        finally:
            release_catalog(catalog)

    def test_a_map_that_another_process_grew_is_followed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(catalog_module, "_MAP_BYTES", 256 << 10)
        catalog = open_catalog(tmp_path, create=True)
        try:
            catalog.write(put("meta", {b"mine": b"1"}))
            run_python(
                """
                import sys
                from pathlib import Path
                from mergepipe.store import catalog as module
                module._MAP_BYTES = 256 << 10
                catalog = module.open_catalog(Path(sys.argv[1]))
                catalog.write(lambda view: [view.put("meta", b"%d" % i, bytes(1000)) for i in range(2000)])
                """,
                tmp_path,
            )
            with catalog.reading() as view:
                assert view.count("meta") == 2001
            catalog.write(put("meta", {b"mine": b"2"}))
        finally:
            release_catalog(catalog)


class TestProcesses:
    def test_after_a_fork_it_is_not_used(self, catalog: Catalog) -> None:
        child = os.fork()
        if child == 0:  # no test framework here: leave by os._exit whatever happens
            code = 1
            try:
                with catalog.reading():
                    code = 2
            except EnvironmentalError as error:
                code = 0 if "forked" in error.message and error.hint else 3
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        catalog.write(put("meta", {b"k": b"v"}))

    def test_nor_opened_again_in_the_child(self, catalog: Catalog) -> None:
        """LMDB's locks belong to the process that opened it; the parent goes on undisturbed."""
        with catalog.reading() as view:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    open_catalog(catalog.path)
                except EnvironmentalError as error:
                    code = 0 if "forked" in error.message and "spawn" in (error.hint or "") else 3
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert view.count("meta") == 0
        catalog.write(put("meta", {b"k": b"v"}))

    def test_a_child_may_open_what_was_closed_before(self, tmp_path: Path) -> None:
        release_catalog(open_catalog(tmp_path, create=True))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                open_catalog(tmp_path, create=True).write(put("meta", {b"child": b"1"}))
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        catalog = open_catalog(tmp_path, create=True)
        with catalog.reading() as view:
            assert view.get("meta", b"child") == b"1"
        release_catalog(catalog)

    def test_two_processes_add_without_losing(self, catalog: Catalog) -> None:
        code = """
            import sys
            from pathlib import Path
            from mergepipe.store.catalog import open_catalog
            catalog = open_catalog(Path(sys.argv[1]))
            def add(view):
                view.put("meta", b"n", b"%d" % (int(view.get("meta", b"n") or 0) + 1))
            for _ in range(50):
                catalog.write(add)
        """
        children = [start_python(code, catalog.path) for _ in range(2)]
        for child in children:
            _, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors
        with catalog.reading() as view:
            assert view.get("meta", b"n") == b"100"

    def test_places_of_dead_readers_are_taken_back(self, catalog: Catalog) -> None:
        """A process that is killed while it reads leaves its places in LMDB's table, which has an end."""
        run_python(
            """
            import os, sys
            import lmdb
            from pathlib import Path
            from mergepipe.store.catalog import open_catalog
            catalog = open_catalog(Path(sys.argv[1]))
            held = []
            try:
                while True:
                    held.append(catalog._env.begin())
            except lmdb.ReadersFullError:
                os._exit(0)
            """,
            catalog.path,
        )
        with catalog.reading() as view:
            assert view.count("meta") == 0


class TestSharing:
    def test_one_environment_for_all_users_of_a_path(self, tmp_path: Path) -> None:
        first = open_catalog(tmp_path, create=True)
        second = open_catalog(tmp_path / ".." / tmp_path.name)
        assert first is second
        release_catalog(first)
        second.write(put("meta", {b"k": b"v"}))
        release_catalog(second)
        third = open_catalog(tmp_path, create=True)
        assert third is not first
        release_catalog(third)

    def test_a_second_release_of_the_last_user_does_no_harm(self, tmp_path: Path) -> None:
        first = open_catalog(tmp_path, create=True)
        release_catalog(first)
        second = open_catalog(tmp_path, create=True)
        release_catalog(first)
        second.write(put("meta", {b"k": b"v"}))
        release_catalog(second)


class TestDamage:
    def test_a_file_that_is_no_catalog(self, tmp_path: Path) -> None:
        (tmp_path / "data.mdb").write_bytes(os.urandom(8192))
        with pytest.raises(DamagedError, match=str(tmp_path)):
            open_catalog(tmp_path)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DamagedError, match="missing is lost"):
            open_catalog(tmp_path / "missing")

    @pytest.mark.parametrize("content", [None, b""])
    def test_a_lost_one_is_not_made_anew(self, tmp_path: Path, content: bytes | None) -> None:
        """An empty catalog in its place would say that there was never anything."""
        release_catalog(open_catalog(tmp_path, create=True))
        (tmp_path / "data.mdb").unlink()
        if content is not None:
            (tmp_path / "data.mdb").write_bytes(content)
        with pytest.raises(DamagedError, match="is lost"):
            open_catalog(tmp_path)
        assert (tmp_path / "data.mdb").exists() == (content is not None)
