"""A full disk is a clear error, the store is as it was, and the same command works once there is room."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mergepipe.store import Store
from mergepipe.store.errors import EnvironmentalError
from support.checkpoints import folder_bytes
from support.covered import count
from support.family import write_family
from support.processes import run_python
from support.stores import assert_clean, state_of, writers_left


def fill(disk: Path, free_bytes: int) -> Path:
    """Leave about so much room."""
    status = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(max(status.f_bavail * status.f_frsize - free_bytes, 0)))
    return filler


def test_ingest_at_every_amount_of_room(mounted_disk: Callable[..., Path], tmp_path: Path) -> None:
    """From none at all to enough: it fails while staging, then while the catalog is written, then it works."""
    disk = mounted_disk("4m")
    base, (expert, _) = write_family(tmp_path)
    messages: list[str] = []
    with Store.create(disk / "store", block_bytes=4096) as store:
        store.ingest([base])
        before = state_of(store)
        for free in range(0, 1 << 20, 12 << 10):
            filler = fill(disk, free)
            count(amounts_of_room=1)
            try:
                store.ingest([expert], base="base")
            except EnvironmentalError as error:
                assert error.exit_code == 8
                assert "the disk is full" in error.message
                assert "Free some space" in (error.hint or "")
                messages.append(error.message)
            else:
                break
            assert state_of(store) == before
            assert writers_left(store) == []
            filler.unlink()
        else:
            pytest.fail("there was never enough room")
        filler.unlink()
        assert_clean(store)
        said = " ".join(messages)
        assert "making the writer's folder" in said or "writing objects" in said
        assert "writing the catalog" in said
        assert messages == sorted(messages, key=lambda message: "catalog" in message), "staging fails first"
        store.snapshot("expert0").export(tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == folder_bytes(expert)


def test_a_store_that_was_full_is_the_same_after_reopening(mounted_disk: Callable[..., Path], tmp_path: Path) -> None:
    disk = mounted_disk("4m")
    base, (expert, _) = write_family(tmp_path)
    with Store.create(disk / "store", block_bytes=4096) as store:
        store.ingest([base])
        before = state_of(store)
        fill(disk, 0)
        with pytest.raises(EnvironmentalError):
            store.ingest([expert], base="base")
    with Store.open(disk / "store") as store:
        assert state_of(store) == before
        assert_clean(store)
        assert store.snapshot("base").read_file("config.json")
        (disk / "filler").unlink()
        store.ingest([expert], base="base")
        assert_clean(store)


@pytest.mark.parametrize("free_bytes", [0, 40_000, 90_000])
def test_an_export_leaves_nothing(
    mounted_disk: Callable[..., Path], store: Store, tmp_path: Path, free_bytes: int
) -> None:
    disk = mounted_disk("1m")
    base, _ = write_family(tmp_path, experts=0)
    assert sum(map(len, folder_bytes(base).values())) > 100_000
    store.ingest([base])
    filler = fill(disk, free_bytes)
    with pytest.raises(EnvironmentalError, match="the disk is full") as caught:
        store.snapshot("base").export(disk / "out")
    assert caught.value.exit_code == 8
    assert [path.name for path in disk.iterdir()] == ["filler"]
    filler.unlink()
    store.snapshot("base").export(disk / "out")
    assert folder_bytes(disk / "out") == folder_bytes(base)


def test_a_store_cannot_be_made_where_there_is_no_room(mounted_disk: Callable[..., Path]) -> None:
    disk = mounted_disk("1m")
    filler = fill(disk, 8192)
    with pytest.raises(EnvironmentalError, match="the disk is full"):
        Store.create(disk / "store")
    filler.unlink()
    Store.create(disk / "store").close()


@pytest.mark.parametrize("too_long", ["object", "catalog"])
def test_a_limit_on_file_sizes(make_store: Callable[..., Store], tmp_path: Path, too_long: str) -> None:
    """The same without the right to mount."""
    base, (expert, _) = write_family(tmp_path)
    store = make_store(tmp_path / "s")
    store.ingest([base])
    before = state_of(store)
    limit = 1000 if too_long == "object" else (store.layout.catalog / "data.mdb").stat().st_size
    assert limit > 5000 or too_long == "object"
    output = run_python(
        """
        import resource, signal, sys
        from mergepipe.store import MergePipeError, Store
        import mergepipe.store.ingest
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Store.open(sys.argv[1]) as store:
            limit = int(sys.argv[3])
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                store.ingest([sys.argv[2]], base="base")
            except MergePipeError as error:
                print(error)
                sys.exit(error.exit_code)
        """,
        store.layout.root,
        expert,
        limit,
        expect=8,
    )
    assert ("writing objects" if too_long == "object" else "catalog") in output
    assert state_of(store) == before
    store.ingest([expert], base="base")
