"""The doctor says what is so, about stores in every state; and changes nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mergepipe.store import Store, surroundings, writers
from mergepipe.store import catalog as catalog_module
from mergepipe.store import doctor as doctor_module
from mergepipe.store.check import verify
from mergepipe.store.doctor import Examination, examine
from mergepipe.store.findings import Finding, Level
from mergepipe.store.leases import write_lease
from mergepipe.store.repack import models_to_repack, repack
from mergepipe.store.staging import Staging
from support.family import write_family
from support.processes import run_python
from support.stores import flip_bit, object_files, rewrite, state_of

OF_THE_STORE = ("store", "filesystem", "permissions", "writers", "clock", "catalog", "readers", "objects", "damage")


@pytest.fixture
def filled(hurt_store: Store, tmp_path: Path) -> Store:
    base, experts = write_family(tmp_path, experts=1)
    hurt_store.ingest([base])
    hurt_store.ingest(experts, base="base")
    return hurt_store


def look(store: Store, **options: float) -> Examination:
    return examine(store.layout.root, **options)


def of(found: Examination, check: str) -> list[Finding]:
    return [each for each in found.findings if each.check == check]


def the(found: Examination, check: str, level: Level) -> Finding:
    (one,) = (each for each in of(found, check) if each.level is level)
    assert one.advice or level is Level.OK
    return one


class TestWholeStores:
    def test_all_is_well(self, filled: Store) -> None:
        before = state_of(filled)
        files = object_files(filled)
        found = look(filled)
        assert found.store == filled.layout.root
        assert {each.level for each in found.findings if each.check in OF_THE_STORE} == {Level.OK}
        assert f"{len(files)} objects have their files" in the(found, "objects", Level.OK).text
        assert {each.exit_code for each in found.findings if each.level is not Level.PROBLEM} == {0}
        assert state_of(filled) == before

    def test_an_empty_one_too(self, store: Store) -> None:
        found = look(store)
        assert {each.level for each in found.findings if each.check in OF_THE_STORE} == {Level.OK}

    def test_the_folder_that_holds_it(self, make_store: Callable[..., Store], tmp_path: Path) -> None:
        make_store(tmp_path / "around" / ".mp")
        assert examine(tmp_path / "around").store == tmp_path / "around" / ".mp"

    def test_there_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        found = examine()
        assert found.store is None
        assert found.exit_code == 3
        assert the(found, "store", Level.PROBLEM).advice
        assert of(found, "versions")

    def test_one_of_a_later_release(self, filled: Store) -> None:
        settings = filled.layout.root / "store.json"
        settings.write_text(settings.read_text().replace('"format": 1', '"format": 9'))
        found = look(filled)
        assert found.exit_code == 4
        assert "newer" in the(found, "store", Level.PROBLEM).text


class TestObjects:
    def test_lost_and_cut_files(self, filled: Store) -> None:
        first, second, *_ = (object_path_of(filled, name) for name in object_files(filled))
        first.unlink()
        rewrite(second, b"short")
        found = look(filled)
        assert found.exit_code == 5
        line = the(found, "objects", Level.PROBLEM)
        assert "1 object files are missing and 1 have another size" in line.text
        assert "mp heal" in line.advice

    def test_known_damage(self, filled: Store) -> None:
        flip_bit(object_path_of(filled, next(iter(object_files(filled)))), -1)
        assert look(filled).exit_code == 0  # contents are not read
        verify(filled)
        found = look(filled)
        assert found.exit_code == 5
        assert "damaged" in the(found, "damage", Level.PROBLEM).text

    def test_garbage_and_what_is_strange(self, filled: Store) -> None:
        objects = filled.layout.objects
        (objects / "00" / ("0" * 62)).write_bytes(bytes(2048))
        (objects / "00" / "notes.txt").write_bytes(b"?")
        found = look(filled)
        assert found.exit_code == 0
        assert "1 files without a row take 2.0 KiB" in the(found, "garbage", Level.WARNING).text
        assert "00/notes.txt" in the(found, "objects", Level.WARNING).text

    def test_it_stops_in_time(self, filled: Store) -> None:
        assert "looked at 0 of 256 folders" in the(look(filled, scan_seconds=-1.0), "objects", Level.OK).text

    def test_a_row_that_cannot_be_read_agrees_with_no_file(self, filled: Store) -> None:
        name = next(iter(object_files(filled)))
        filled.catalog.write(lambda view: view.put("objects", bytes.fromhex(name), b"?"))
        found = look(filled)
        assert found.exit_code == 5
        assert "0 object files are missing and 1 have another size" in the(found, "objects", Level.PROBLEM).text

    def test_a_file_in_a_folders_place(self, filled: Store) -> None:
        fan = next(path for path in filled.layout.objects.iterdir() if not any(path.iterdir()))
        fan.rmdir()
        fan.write_bytes(b"")
        found = look(filled)
        assert f"such as {fan.name}" in the(found, "objects", Level.WARNING).text
        assert of(found, "versions")

    def test_a_folder_of_objects_that_is_gone(self, filled: Store) -> None:
        filled.layout.objects.rename(filled.layout.root / "elsewhere")
        found = look(filled)
        assert found.exit_code == 5
        assert "copy" in the(found, "filesystem", Level.PROBLEM).advice
        assert not of(found, "objects")

    def test_a_repack_that_was_stopped(self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base, experts = write_family(tmp_path, experts=1)
        store.ingest([base, *experts])
        from mergepipe.store import replace as replace_module

        class _Died(BaseException):
            pass

        def die(*_: object) -> None:
            raise _Died

        with monkeypatch.context() as patched:
            patched.setattr(replace_module, "refuse_other_writers", die)
            patched.setattr(replace_module, "settle", lambda *_: 0)
            with pytest.raises(_Died):
                repack(store, models_to_repack(store))
        found = look(store)
        assert found.exit_code == 0
        assert "18 objects" in the(found, "repack", Level.WARNING).text
        repack(store, models_to_repack(store))
        assert not of(look(store), "repack")


def object_path_of(store: Store, name: str) -> Path:
    return store.layout.objects / name[:2] / name[2:]


class TestCatalogs:
    @pytest.mark.parametrize("harm", ["delete", "empty", "noise"])
    def test_one_that_cannot_be_opened(self, filled: Store, harm: str) -> None:
        filled.close()
        data = filled.layout.catalog / "data.mdb"
        if harm == "delete":
            data.unlink()
        else:
            data.write_bytes(b"" if harm == "empty" else b"noise" * 4000)
        found = look(filled)
        assert found.exit_code == 5
        line = the(found, "catalog", Level.PROBLEM)
        assert "cannot be opened" in line.text
        assert "mp recover" in line.advice
        assert of(found, "versions")

    def test_a_folder_that_is_gone(self, filled: Store) -> None:
        filled.close()
        shutil.rmtree(filled.layout.catalog)
        found = look(filled)
        assert found.exit_code == 5
        assert "mp recover" in the(found, "filesystem", Level.PROBLEM).advice

    def test_a_key_that_is_none(self, filled: Store) -> None:
        filled.catalog.write(lambda view: view.put("objects", b"\0short", b""))
        found = look(filled)
        assert found.exit_code == 5
        line = next(line for line in of(found, "catalog") if line.level is Level.PROBLEM)
        assert "cannot be read" in line.text
        assert "mp recover" in line.advice

    def test_many_pages_to_be_used_again(self, filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor_module, "_MANY_FREE_BYTES", 0)
        keys = [number.to_bytes(4, "big") for number in range(1000)]
        filled.catalog.write(lambda view: [view.put("results", key, bytes(1000)) for key in keys])
        assert the(look(filled), "catalog", Level.OK)
        filled.catalog.write(lambda view: [view.delete("results", key) for key in keys])
        assert "mdb_copy" in the(look(filled), "catalog", Level.WARNING).advice

    def test_a_map_that_is_nearly_full(self, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(catalog_module, "_MAP_BYTES", 1 << 20)
        store = make_store()
        store.catalog.write(
            lambda view: [view.put("results", number.to_bytes(4, "big"), bytes(1000)) for number in range(620)]
        )
        assert "the map of 1.0 MiB will double soon" in the(look(store), "catalog", Level.OK).text

    def test_many_readers(self, filled: Store) -> None:
        with ExitStack() as reading:
            for _ in range(420):
                reading.enter_context(filled.catalog.reading())
            assert re.match("42[0-9] of 512 places", the(look(filled), "readers", Level.WARNING).text)
        assert the(look(filled), "readers", Level.OK)

    def test_readers_that_died(self, filled: Store) -> None:
        run_python(
            """
            import os, sys
            from mergepipe.store import Store
            store = Store.open(sys.argv[1])
            with store.catalog.reading() as view:
                view.count("objects")
                os._exit(0)
            """,
            filled.layout.root,
        )
        found = look(filled)
        assert "1 readers of the catalog had died" in the(found, "readers", Level.WARNING).text
        assert the(look(filled), "readers", Level.OK)

    def test_a_network_filesystem(self, filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        filled.close()
        from mergepipe.store import filesystem

        monkeypatch.setattr(doctor_module, "filesystem_type", lambda _: "nfs4")
        monkeypatch.setattr(filesystem, "filesystem_type", lambda *_: "nfs4")
        found = look(filled)
        assert found.exit_code == 8
        lines = of(found, "filesystem")
        assert [line.level for line in lines] == [Level.WARNING, Level.PROBLEM]
        assert "mp init --catalog" in lines[1].advice


class TestDisks:
    def test_a_read_only_one(self, filled: Store, mounted_disk: Callable[..., Path]) -> None:
        disk = mounted_disk("8m")
        shutil.copytree(filled.layout.root, disk / "store")
        if os.system(f"mount -o remount,ro {disk}"):
            pytest.skip("cannot be made read-only")
        found = examine(disk / "store")
        assert [line.level for line in of(found, "filesystem")] == [Level.WARNING, Level.WARNING]
        assert "have their files" in the(found, "objects", Level.OK).text
        assert not of(found, "permissions")
        assert the(found, "readers", Level.OK)

    def test_a_small_one(self, mounted_disk: Callable[..., Path]) -> None:
        disk = mounted_disk("8m")
        Store.create(disk / "store").close()
        found = examine(disk / "store")
        assert found.exit_code == 8
        assert "Free some space" in the(found, "space", Level.PROBLEM).advice

    @pytest.mark.parametrize(
        ("free", "level"), [(1 << 20, Level.PROBLEM), (1 << 30, Level.WARNING), (1 << 40, Level.OK)]
    )
    def test_grades(self, store: Store, monkeypatch: pytest.MonkeyPatch, free: int, level: Level) -> None:
        class _Disk:
            f_bavail, f_frsize, f_favail, f_files, f_flag = free, 1, 10**9, 10**9, 0

        monkeypatch.setattr(doctor_module.os, "statvfs", lambda _: _Disk)
        assert the(look(store), "space", level)

    def test_one_that_does_not_count_files(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        class _Disk:
            f_bavail, f_frsize, f_favail, f_files, f_flag = 1 << 40, 1, 0, 0, 0

        monkeypatch.setattr(doctor_module.os, "statvfs", lambda _: _Disk)
        found = look(store)
        assert the(found, "space", Level.OK)
        assert not of(found, "inodes")

    def test_work_on_another_one(self, store: Store, mounted_disk: Callable[..., Path]) -> None:
        """Nothing could be moved from there to its place."""
        temporary = store.layout.temporary
        shutil.rmtree(temporary)
        temporary.symlink_to(mounted_disk("1m"))
        found = look(store)
        assert found.exit_code
        assert "different filesystems" in the(found, "filesystem", Level.PROBLEM).text
        temporary.unlink()
        temporary.mkdir()

    def test_folders_that_are_missing(self, filled: Store) -> None:
        shutil.rmtree(filled.layout.temporary)
        fan = next(path for path in filled.layout.objects.iterdir() if not any(path.iterdir()))
        fan.rmdir()
        found = look(filled)
        assert {line.text.split(",")[0].split(" are")[0] for line in of(found, "permissions")} >= {
            "1 of the 256 folders of objects/", "the folder tmp/ is missing",
        }  # fmt: skip
        assert found.exit_code == 5
        filled.layout.temporary.mkdir()

    def test_what_is_closed(self, filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        allowed = os.access
        monkeypatch.setattr(
            doctor_module.os, "access", lambda path, mode: "/objects/a" not in str(path) and allowed(path, mode)
        )
        line = the(look(filled), "permissions", Level.PROBLEM)
        assert "you may not write to" in line.text
        assert "and 15 more" in line.text

    def test_what_belongs_to_others(self, filled: Store) -> None:
        if os.geteuid():
            pytest.skip("only root can give files away")
        os.chown(filled.layout.objects / "00", 12345, -1)
        assert "12345" in the(look(filled), "permissions", Level.WARNING).text


@pytest.fixture
def folder(store: Store) -> Iterator[Path]:
    """A writer's folder with a kibibyte in it."""
    found = store.layout.temporary / "1700000000-1-abcdef01"
    found.mkdir()
    (found / ("0" * 64)).write_bytes(bytes(1024))
    yield found
    shutil.rmtree(found)


def put_lease(folder: Path, **changes: object) -> None:
    """A lease that nobody holds."""
    os.close(write_lease(folder))
    lease = folder / "lease.json"
    lease.write_text(json.dumps({**json.loads(lease.read_text()), **changes}))


class TestWriters:
    def test_one_at_work(self, store: Store) -> None:
        with Staging(store.layout, store.catalog):
            assert "1 at work" in the(look(store), "writers", Level.OK).text

    def test_one_that_died(self, store: Store, folder: Path) -> None:
        put_lease(folder)
        line = the(look(store), "writers", Level.WARNING)
        assert "1 commands died and left 1." in line.text
        assert folder.exists()

    def test_one_that_goes_while_it_is_looked_at(self, store: Store) -> None:
        gone = writers._writer(store.layout.temporary / "gone")
        assert (gone.host, gone.pid, gone.bytes) == ("", 0, 0)
        assert abs(gone.started - time.time()) < 60

    def test_an_old_one_on_another_machine(self, store: Store, folder: Path) -> None:
        put_lease(folder, host="elsewhere", boot="another", pid=7, started=time.time() - 3 * 86400 - 60)
        line = the(look(store), "writers", Level.WARNING)
        assert "process 7 on elsewhere, is 3 days old" in line.text
        assert str(folder) in line.advice

    @pytest.mark.parametrize("lease", [b"", b"{}", b"\xff\xfe", b'{"host": 1, "pid": "x", "started": []}'])
    def test_one_that_nobody_can_tell(self, store: Store, folder: Path, lease: bytes) -> None:
        (folder / "lease.json").write_bytes(lease)
        os.utime(folder, (0, 1_600_000_000))
        assert "cannot be told" in the(look(store), "writers", Level.WARNING).text
        assert writers.writers(store.layout)[0].folder == folder

    def test_a_clock_that_is_wrong(self, store: Store, folder: Path) -> None:
        put_lease(folder, started=time.time() + 5000)
        line = the(look(store), "clock", Level.WARNING)
        assert "in the future" in line.text


class TestTheMachine:
    def test_all_packages_are_named(self, store: Store) -> None:
        text = the(look(store), "versions", Level.OK).text
        assert all(name in text for name in surroundings.PACKAGES)

    @pytest.mark.parametrize(("name", "level"), [("lmdb", Level.PROBLEM), ("torch", Level.WARNING)])
    def test_one_that_is_missing(self, monkeypatch: pytest.MonkeyPatch, name: str, level: Level) -> None:
        from importlib.metadata import PackageNotFoundError, version

        def found(wanted: str) -> str:
            if wanted == name:
                raise PackageNotFoundError
            return version(wanted)

        monkeypatch.setattr(surroundings, "version", found)
        lines = list(surroundings._versions())
        assert lines[1].level is level
        assert name in lines[1].text

    def test_compiled_code_that_cannot_be_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
        assert surroundings._compiled_code().level is Level.WARNING
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "to" / "be" / "made"))
        assert surroundings._compiled_code().level is Level.OK

    @pytest.mark.parametrize(
        ("limit", "level"),
        [(100, Level.PROBLEM), (256, Level.WARNING), (1024, Level.OK), (resource.RLIM_INFINITY, Level.OK)],
    )
    def test_open_files(self, monkeypatch: pytest.MonkeyPatch, limit: int, level: Level) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
        assert surroundings._open_files().level is level

    def test_address_space(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 30, 8 << 30))
        (line,) = surroundings._address_space()
        assert line.level is Level.PROBLEM

    @pytest.mark.parametrize(
        ("files", "quota"),
        [
            ({"cpu.max": "50000 100000\n"}, 0.5),
            ({"cpu.max": "max 100000\n"}, None),
            ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
            ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
            ({}, None),
            ({"cpu.max": "nonsense"}, None),
        ],
    )
    def test_processors(self, tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
        write_files(tmp_path, files)
        assert surroundings._processor_quota(tmp_path) == quota
        (line,) = surroundings._processors(tmp_path)
        assert line.level is (Level.WARNING if quota == 0.5 else line.level)

    @pytest.mark.parametrize(
        ("files", "level"),
        [
            ({"meminfo": "MemTotal: 9\nMemAvailable: 8388608 kB\n", "memory.max": "max"}, Level.OK),
            ({"meminfo": "MemAvailable: 8388608 kB\n", "memory.max": str(1 << 30)}, Level.WARNING),
            ({"meminfo": "MemAvailable: 8388608 kB\n", "memory/memory.limit_in_bytes": str(1 << 20)}, Level.PROBLEM),
            ({"meminfo": "MemAvailable: 1024 kB\n"}, Level.PROBLEM),
        ],
    )
    def test_memory(self, tmp_path: Path, files: dict[str, str], level: Level) -> None:
        write_files(tmp_path, files)
        (line,) = surroundings._memory(tmp_path, tmp_path)
        assert line.level is level

    def test_nothing_to_be_read(self, tmp_path: Path) -> None:
        assert not list(surroundings._memory(tmp_path, tmp_path))
        assert not list(surroundings._umask(tmp_path))

    @pytest.mark.parametrize(("mask", "level"), [("0022", Level.OK), ("0002", Level.OK), ("0777", Level.PROBLEM)])
    def test_umask(self, tmp_path: Path, mask: str, level: Level) -> None:
        write_files(tmp_path, {"self/status": f"Name:\tmp\nUmask:\t{mask}\n"})
        (line,) = surroundings._umask(tmp_path)
        assert line.level is level


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_it_loads_nothing_heavy() -> None:
    output = run_python("import sys, mergepipe.store.doctor\nprint(*sorted(sys.modules))")
    assert not {"numpy", "numba", "torch", "zarr"} & set(output.split())
