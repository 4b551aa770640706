"""LMDB's file read without LMDB: the same rows, and an error where anything is broken."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mergepipe.store import Store
from mergepipe.store.catalog import DATABASES, Catalog, Writing, open_catalog, release_catalog
from mergepipe.store.errors import DamagedError
from mergepipe.store.lmdb_file import check_pages, read_databases, why_unsafe
from support.family import write_family
from support.processes import run_python, start_python

Rows = dict[str, dict[bytes, bytes]]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A catalog with small rows, rows longer than pages, and holes; and what is in it."""
    folder = tmp_path_factory.mktemp("catalog")
    generator = random.Random(1)
    catalog = open_catalog(folder, create=True)

    def fill(view: Writing) -> None:
        for _ in range(400):
            view.put("deltas", generator.randbytes(64), generator.randbytes(296))
            view.put("tensors", generator.randbytes(64), generator.randbytes(generator.randrange(9000)))

    def thin(view: Writing) -> None:
        for database in ("deltas", "tensors"):
            for key, _ in list(view.items(database))[::3]:
                view.delete(database, key)

    for change in (fill, thin, lambda view: view.put("refs", b"m", b"")):
        catalog.write(change)
    with catalog.reading() as view:
        rows = {name: dict(view.items(name)) for name in DATABASES}
    release_catalog(catalog)
    return folder / "data.mdb", rows


def test_it_reads_what_lmdb_reads(filled: tuple[Path, Rows]) -> None:
    path, rows = filled
    assert read_databases(path) == rows
    assert why_unsafe(path) == ""


def test_a_file_that_is_cut_anywhere(filled: tuple[Path, Rows], tmp_path: Path) -> None:
    path, rows = filled
    data = path.read_bytes()
    cut = tmp_path / "data.mdb"
    sizes = [1, 15, 100, 4096, 4100, 8191, 8192, 8193, *range(12288, len(data), len(data) // 60)]
    safe = 0
    for size in sizes:
        cut.write_bytes(data[:size])
        if why_unsafe(cut):
            with pytest.raises(DamagedError):
                read_databases(cut)
        else:  # nothing that is used is missing
            safe += 1
            assert read_databases(cut) == rows
    assert safe < len(sizes) / 4


def test_pages_at_the_end_that_nobody_uses_may_be_missing(tmp_path: Path) -> None:
    """LMDB does not write a page that was freed in the transaction that took it."""
    catalog = open_catalog(tmp_path, create=True)
    catalog.write(lambda view: view.put("tensors", b"k", bytes(200_000)))
    catalog.write(lambda view: view.delete("tensors", b"k"))
    for number in range(9):  # what is used moves away from the end
        catalog.write(lambda view, row=b"%d" % number: view.put("refs", b"m", row))  # type: ignore[misc]
    release_catalog(catalog)
    path = tmp_path / "data.mdb"
    data = path.read_bytes()
    rows = read_databases(path)
    shortest = len(data)
    while shortest:
        path.write_bytes(data[: shortest - 4096])
        if why_unsafe(path):
            break
        shortest -= 4096
    assert shortest < len(data), "nothing was free, and the test proves nothing"
    path.write_bytes(data[:shortest])
    assert read_databases(path) == rows
    catalog = open_catalog(tmp_path)
    catalog.write(lambda view: view.put("meta", b"k", bytes(100_000)))
    with catalog.reading() as view:
        assert view.get("meta", b"k") == bytes(100_000)
    release_catalog(catalog)


def test_noise_in_any_place_is_an_error_or_other_rows(
    filled: tuple[Path, Rows], tmp_path: Path, deep: bool
) -> None:  # fmt: skip
    data = filled[0].read_bytes()
    path = tmp_path / "data.mdb"
    generator = random.Random(2)
    refused = 0
    for _ in range(2000 if deep else 150):
        noisy = bytearray(data)
        if generator.random() < 0.5:
            begin = generator.randrange(len(noisy))
            noisy[begin : begin + 6000] = generator.randbytes(len(noisy[begin : begin + 6000]))
        page = generator.randrange(len(data) // 4096) * 4096
        for _ in range(generator.randrange(1, 20)):
            noisy[page + generator.randrange(100)] = generator.randrange(256)
        path.write_bytes(noisy)
        why_unsafe(path)
        try:
            read_databases(path)
        except DamagedError:
            refused += 1
    assert refused


NOISE = """
import os, random, shutil, sys
from pathlib import Path
from mergepipe.store.catalog import DATABASES, open_catalog
from mergepipe.store.errors import DamagedError
from mergepipe.store.lmdb_file import why_unsafe

good, work, count = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3])
dice, opened, refused = random.Random(3), 0, 0

def noisy():
    data = bytearray(good)
    page = dice.randrange(len(data) // 4096) * 4096
    match dice.randrange(5):
        case 0:
            begin = page + dice.choice([0, 16, 16 + 2 * dice.randrange(100)])
            data[begin : page + 4096] = dice.randbytes(page + 4096 - begin)
        case 1:
            data[page + 2 * dice.randrange(60)] = dice.randrange(256)
        case 2:
            begin = page + 2 * dice.randrange(2048)
            data[begin : begin + 2] = dice.randrange(1 << 12).to_bytes(2, "little")
        case 3:
            other = dice.randrange(len(data) // 4096) * 4096
            data[page + 8 : page + 4096] = data[other + 8 : other + 4096]
        case 4:
            numbers = dice.choices([0, 1, 2, 4, 16, 18, 20, 4096, 4000], k=4)
            data[page + 8 : page + 16] = b"".join(number.to_bytes(2, "little") for number in numbers)
    return data

def look():
    catalog = open_catalog(work)
    with catalog.reading() as view:
        rows = {name: list(view.items(name)) for name in DATABASES}
        for name in DATABASES:
            list(view.items(name, reverse=True))
            for key, _ in rows[name]:
                view.get(name, key)
    for name in DATABASES[:3]:
        catalog.write(lambda view, name=name: view.put(name, bytes(64), bytes(300)))
        catalog.write(lambda view, name=name: view.delete(name, bytes(64)))

for number in range(count):
    (work / "lock.mdb").unlink(missing_ok=True)
    (work / "data.mdb").write_bytes(noisy())
    refused += bool(why_unsafe(work / "data.mdb"))
    child = os.fork()
    if not child:
        try:
            look()
        except DamagedError:
            os._exit(5)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(99)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 5), (number, code)
    opened += code == 0
print(opened, refused)
"""


def test_noise_never_ends_a_process(filled: tuple[Path, Rows], tmp_path: Path, deep: bool) -> None:
    """A file of this size is looked at whole before LMDB gets it."""
    count = 2500 if deep else 200
    assert filled[0].stat().st_size < 4 << 20
    opened, refused = map(int, run_python(NOISE, filled[0], tmp_path, count).split())
    assert opened > count / 10
    assert refused > count / 10


def make_large(catalog: Catalog) -> None:
    """More rows than a file of 4 MiB holds."""
    rows = [(number.to_bytes(64, "big"), bytes(296)) for number in range(20_000)]
    catalog.write(lambda view: [view.put("deltas", *row) for row in rows])


def put_noise(path: Path) -> None:
    """Into one of the pages with these rows."""
    data = bytearray(path.read_bytes())
    assert len(data) > 4 << 20
    where = data.rindex((19_000).to_bytes(64, "big")) // 4096 * 4096
    data[where + 16 : where + 4096] = b"\xff" * 4080
    path.write_bytes(data)


def test_a_large_file_is_opened_after_a_look_at_its_roots(tmp_path: Path) -> None:
    """Looking at all of it takes too long for that; :func:`check_pages` does it."""
    catalog = open_catalog(tmp_path, create=True)
    make_large(catalog)
    catalog.check()
    release_catalog(catalog)
    path = tmp_path / "data.mdb"
    put_noise(path)
    assert why_unsafe(path) == ""
    with pytest.raises(DamagedError, match="outside of its page"):
        check_pages(path)


UPKEEP = """
import json, sys
from mergepipe.cli.app import main

store, model = sys.argv[1:]
commands = [["verify"], ["gc"], ["gc", "--apply"], ["repack", "--apply"], ["heal", "--from", model], ["doctor"]]
print(json.dumps([main([*words, "--store", store]) for words in commands]))
"""


def test_upkeep_looks_at_all_of_a_large_file_first(tmp_path: Path) -> None:
    base, _ = write_family(tmp_path)
    with Store.create(tmp_path / "store", block_bytes=8192) as store:
        store.ingest([base])
        make_large(store.catalog)
        path = store.layout.catalog / "data.mdb"
    put_noise(path)
    codes = json.loads(run_python(UPKEEP, tmp_path / "store", base).splitlines()[-1])
    assert codes == [5] * 6


def test_a_check_is_not_disturbed_by_a_writer(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path, create=True)
    make_large(catalog)
    code = """
    import sys
    from pathlib import Path
    from mergepipe.store.catalog import open_catalog
    catalog, number = open_catalog(Path(sys.argv[1])), 0
    while True:
        number = (number + 7) % 20_000
        catalog.write(lambda view: view.put("deltas", number.to_bytes(64, "big"), number.to_bytes(296, "big")))
        print(number, flush=True)
    """
    writer = start_python(code, tmp_path)
    assert writer.stdout is not None
    try:
        seen = []
        for _ in range(12):
            seen.append(writer.stdout.readline())
            catalog.check()
    finally:
        writer.kill()
        writer.communicate()
        release_catalog(catalog)
    assert all(seen)


def test_a_file_that_somebody_writes_to_is_not_broken(tmp_path: Path) -> None:
    open_catalog(tmp_path, create=True)
    code = """
    import sys
    from pathlib import Path
    from mergepipe.store.catalog import open_catalog
    catalog, number = open_catalog(Path(sys.argv[1])), 0
    while True:
        keys = [(number + i).to_bytes(64, "big") for i in range(50)]
        catalog.write(lambda view: [view.put("deltas", key, bytes(300)) for key in keys])
        catalog.write(lambda view: [view.delete("deltas", key) for key in keys[:40]])
        number = number + 50 if number < 3000 else 0
        print(number, flush=True)
    """
    writer = start_python(code, tmp_path)
    assert writer.stdout is not None
    try:
        for _ in range(300):
            writer.stdout.readline()
            assert why_unsafe(tmp_path / "data.mdb") == ""
    finally:
        writer.kill()
        writer.communicate()


@pytest.mark.parametrize("content", [b"\0" * 20000, b"text\n" * 5000, bytes(range(256)) * 80])
def test_what_is_no_catalog_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.mdb"
    path.write_bytes(content)
    assert "does not begin as an LMDB file does" in why_unsafe(path)
    with pytest.raises(DamagedError):
        read_databases(path)


def test_another_format_of_lmdb(filled: tuple[Path, Rows], tmp_path: Path) -> None:
    data = bytearray(filled[0].read_bytes())
    data[20:24] = (2).to_bytes(4, "little")
    (tmp_path / "data.mdb").write_bytes(data)
    assert "another LMDB format" in why_unsafe(tmp_path / "data.mdb")
