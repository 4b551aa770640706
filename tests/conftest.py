"""Fixtures and Hypothesis profiles for all tests."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from mergepipe.store import Store
from support.stores import assert_clean

os.environ.pop("MP_STORE", None)  # tests name their stores
DEEP = os.environ.get("MP_TEST_DEPTH") == "deep"

_COMMON: dict[str, Any] = {
    "deadline": None,  # the machine is shared, and time proves nothing
    "print_blob": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("default", max_examples=40, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
settings.load_profile("deep" if DEEP else "default")


@pytest.fixture(scope="session")
def deep() -> bool:
    """Whether ``MP_TEST_DEPTH=deep`` asks for the long versions of tests."""
    return DEEP


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """Makes a new empty folder at each call: one for each Hypothesis example."""
    numbers = itertools.count()

    def make() -> Path:
        folder = tmp_path / f"fresh{next(numbers)}"
        folder.mkdir()
        return folder

    return make


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Makes stores that are verified and closed when the test ends; ``damaged=True`` leaves out the verifying."""
    made: list[tuple[Store, bool]] = []

    def make(path: Path | None = None, *, damaged: bool = False, **options: Any) -> Store:
        where = path or tmp_path / f"store{len(made)}"
        store = Store.create(where, **{"block_bytes": 4096, **options})
        made.append((store, damaged))
        return store

    yield make
    try:
        for store, damaged in made:
            if not damaged:
                with Store.open(store.layout.root) as again:  # the test may have closed its own
                    assert_clean(again)
    finally:
        for store, _ in made:
            store.close()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    """A new store with blocks of 4 KiB, verified when the test ends."""
    return make_store()


@pytest.fixture
def hurt_store(make_store: Callable[..., Store]) -> Store:
    """The same for tests that damage it."""
    return make_store(damaged=True)


@pytest.fixture
def mounted_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small filesystems in memory: ``mounted_disk("4m")``. Skips where that is not allowed."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            done = False
        if not done:
            pytest.skip("needs the right to mount a filesystem in memory")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
