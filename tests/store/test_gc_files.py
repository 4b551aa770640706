"""Files that a crash left: which are taken for such, which are not, and what is said where one cannot be removed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mergepipe.store import Digest, Store
from mergepipe.store import gc_files as gc_files_module
from mergepipe.store.catalog import Reading, Writing
from mergepipe.store.digest import hash_bytes
from mergepipe.store.errors import EnvironmentalError, UsageError
from mergepipe.store.gc import collect, parse_age
from mergepipe.store.gc_files import remove_files
from support.collecting import CALM, nothing, put_block
from support.stores import object_files, object_path

GRACE = 1000
DAY = 86400


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """The clock stands still. The first second that is not older than ``GRACE``."""
    now = int(time.time())
    monkeypatch.setattr(time, "time", lambda: float(now))
    return now - GRACE + 1


def write(path: Path, when: float, data: bytes = b"half") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (when, when))
    return path


def stray_file(store: Store, number: int, when: float = 0) -> Path:
    """A file of an object without a row; 256 of them that follow one another lie in as many folders."""
    digest = Digest(bytes([number % 256]) + hash_bytes(str(number).encode())[1:])
    return write(object_path(store, digest), when)


def named(store: Store, name: str, when: float = 0) -> Path:
    return write(store.layout.objects / name[:2] / name[2:], when)


def test_files_without_rows_go_once_they_are_old(store: Store, limit: int) -> None:
    block = object_path(store, put_block(store, CALM))
    os.utime(block, (0, 0))
    young, old = stray_file(store, 1, limit), stray_file(store, 2, limit - 0.25)
    planned = collect(store, grace_seconds=GRACE)
    assert old.exists()
    assert (planned.stray_files, planned.stray_bytes, planned.freed_bytes) == (1, 4, 4)
    assert collect(store, apply=True, grace_seconds=GRACE) == planned
    assert young.exists()
    assert block.exists()
    assert not old.exists()


def test_all_of_many_files_go_whatever_else_lies_there(store: Store) -> None:
    """Odd entries among the folders end no search."""
    for number in range(3 * 256):
        stray_file(store, number)
    for name in ("aaa", "zzz", "notes"):
        write(store.layout.objects / name / "file", 0)
    for name in ("00000", ".hidden", "zz"):
        write(store.layout.objects / name, 0)
    found = collect(store, apply=True)
    assert (found.stray_files, found.stray_bytes) == (768, 4 * 768)
    assert len(object_files(store)) == 6


@pytest.mark.parametrize(
    "name",
    [
        "ab" + "c" * 61, "ab" + "c" * 63, "ab" + "c" * 64, "ab" + "C" * 62, "AB" + "c" * 62, "ab" + "x" * 62,
        "abnotes.txt", "abc", "zz" + "a" * 62,
    ],
)  # fmt: skip
def test_a_name_that_no_object_has(store: Store, name: str) -> None:
    path = named(store, name)
    assert nothing(collect(store, apply=True))
    assert path.exists()


def test_a_folder_whose_name_is_too_long(store: Store) -> None:
    path = write(store.layout.objects / "abc" / ("d" * 61), 0)
    assert nothing(collect(store, apply=True))
    assert path.exists()


def test_nothing_behind_a_link_goes_nor_the_link(store: Store, tmp_path: Path) -> None:
    """Neither what a folder that is a link holds, nor what a link among the objects or beside them leads to."""
    outside = write(tmp_path / "outside" / ("c" * 62), 0)
    folder, file = store.layout.objects / "ab", object_path(store, hash_bytes(b"link"))
    folder.rmdir()
    links = {folder: outside.parent, file: outside, store.layout.root / "refs.journal.7.part": outside}
    for link, target in links.items():
        link.symlink_to(target)
        os.utime(link, (0, 0), follow_symlinks=False)
    assert nothing(collect(store, apply=True))
    assert outside.exists()
    assert all(link.is_symlink() for link in links)
    folder.unlink()
    folder.mkdir()


def test_writers_do_not_wait_for_all_files_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [stray_file(store, number) for number in range(600)]
    write = store.catalog.write
    left: list[int] = []

    def counted(change: Callable[[Writing], object]) -> object:
        try:
            return write(change)
        finally:
            left.append(sum(path.exists() for path in paths))

    monkeypatch.setattr(store.catalog, "write", counted)
    remove_files(store, paths)
    assert left == [344, 88, 0]


def test_a_file_that_has_a_row_again_stays(store: Store) -> None:
    path, stray = object_path(store, put_block(store, CALM)), stray_file(store, 0)
    remove_files(store, [path, stray, stray_file(store, 1).with_name("0" * 62)])
    assert path.exists()
    assert not stray.exists()


def test_what_a_killed_writer_was_writing_goes(store: Store, limit: int) -> None:
    root = store.layout.root
    parts = [write(root / name, limit - 0.25) for name in ("refs.journal.77.part", "store.json.77.part")]
    young = write(root / "refs.journal.78.part", limit)
    others = [write(root / name, 0) for name in ("notes.77.part", "refs.journal.part", "refs.journal.7.part.txt")]
    folder = root / "refs.journal.79.part"
    folder.mkdir()
    os.utime(folder, (0, 0))
    planned = collect(store, grace_seconds=GRACE)
    assert all(path.exists() for path in parts)
    assert (planned.stray_files, planned.stray_bytes) == (2, 8)
    assert collect(store, apply=True, grace_seconds=GRACE) == planned
    assert not any(path.exists() for path in parts)
    assert all(path.exists() for path in (young, folder, *others, root / "store.json"))


def test_an_unfinished_file_that_its_writer_took_away_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(store.layout.root / "refs.journal.77.part", 0)
    original = gc_files_module.unfinished_files

    def late(store: Store, limit: int) -> dict[Path, int]:
        found = original(store, limit)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(gc_files_module, "unfinished_files", late)
    assert collect(store, apply=True).stray_files == 1


@pytest.mark.parametrize(
    ("make", "doing"),
    [
        (lambda store: stray_file(store, 0), "removing objects"),
        (lambda store: write(store.layout.root / "refs.journal.7.part", 0), "removing unfinished files"),
    ],
)
def test_a_file_that_the_system_does_not_remove(
    store: Store, monkeypatch: pytest.MonkeyPatch, make: Callable[[Store], Path], doing: str
) -> None:
    path = make(store)

    def refuse(self: Path, missing_ok: bool = False) -> None:  # noqa: ARG001
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(EnvironmentalError, match=f"^the system refused while {doing}: .*Input/output error"):
            collect(store, apply=True)
    assert path.exists()
    assert collect(store, apply=True).stray_files == 1
    assert not path.exists()


@pytest.mark.parametrize("apply", [False, True])
def test_a_file_that_another_collection_removes_while_this_one_looks(
    store: Store, monkeypatch: pytest.MonkeyPatch, apply: bool
) -> None:
    path = stray_file(store, 0)
    original = Reading.get

    def late(self: Reading, database: str, key: bytes) -> bytes | None:
        if database == "objects":
            path.unlink(missing_ok=True)
        return original(self, database, key)

    monkeypatch.setattr(Reading, "get", late)
    assert nothing(collect(store, apply=apply))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("14d", 14 * DAY), ("0", 0), ("0d", 0), ("1.5h", 5400), ("30m", 1800), ("90s", 90), ("999999999s", 999999999),
        ("11574d", 11574 * DAY),
    ],
)  # fmt: skip
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "d", "5", "-1d", "-1s", "nan d", "1e99d", "nand", "infd", "1000000000s", "1w", "1D"]
)
def test_no_ages(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_age(text)
    assert caught.value.message == f"{text!r} is not an age"
    assert caught.value.hint == "Write a number and d, h or m, as in 14d; or 0."
