"""LMDB's file read without LMDB: the same rows, and an error where anything is broken."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mergepipe.store.catalog import DATABASES, Writing, open_catalog, release_catalog
from mergepipe.store.errors import DamagedError
from mergepipe.store.lmdb_file import read_databases, why_unsafe

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
            view.put("tensors", generator.randbytes(64), generator.randbytes(generator.randrange(20000)))

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
