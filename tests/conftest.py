"""Fixtures and Hypothesis profiles for all tests."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Each worker compiles for itself: two at once in one cache, with arguments of other types, can mix up its entries.
_ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("NUMBA_CACHE_DIR", str(_ROOT / "build" / "numba" / os.environ.get("PYTEST_XDIST_WORKER", "main")))

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from mergepipe.store import Store  # noqa: E402
from support.covered import pytest_runtest_call, pytest_terminal_summary  # noqa: E402, F401
from support.stores import assert_clean  # noqa: E402

os.environ.pop("MP_STORE", None)  # tests name their stores
DEEP = os.environ.get("MP_TEST_DEPTH") == "deep"

# Stores are made and flushed by the hundred. In memory that takes half of the time, and no other program's writes are
# waited for; on a disk it is the same code. `make test-deep`, TMPDIR and --basetemp go to the disk.
_MEMORY = Path("/dev/shm")
if not DEEP and "TMPDIR" not in os.environ and os.access(_MEMORY, os.W_OK):
    _room = os.statvfs(_MEMORY)
    if _room.f_bavail * _room.f_frsize > 4 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

_COMMON: dict[str, Any] = {
    "deadline": None,  # the machine is shared, and time proves nothing
    "print_blob": True,
    "derandomize": bool(os.environ.get("CI")) and not DEEP,  # a build's outcome is that of its code
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
