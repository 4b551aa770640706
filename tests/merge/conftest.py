"""A small family in a store, for tests of merging."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mergepipe.store import Store
from support.family import base_weights, fine_tune
from support.merges import ingest_family
from support.stores import assert_clean


def _ingest(store: Store, folder: Path) -> Store:
    base = base_weights()
    ingest_family(store, folder, base, {"math": fine_tune(base, 1), "code": fine_tune(base, 2, scale=3e-3)})
    return store


@pytest.fixture
def family(store: Store, tmp_path: Path) -> Store:
    """A store with ``base``, and ``math`` and ``code`` that change the matrices of all three layers."""
    return _ingest(store, tmp_path)


@pytest.fixture
def hurt_family(hurt_store: Store, tmp_path: Path) -> Store:
    """The same in a store that a test damages."""
    return _ingest(hurt_store, tmp_path)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for many tests, whose refs are anybody's: for those that make all that they look at."""
    with Store.create(tmp_path_factory.mktemp("shared") / "store", block_bytes=4096) as store:
        yield store
        assert_clean(store)


@pytest.fixture(scope="session")
def shared_family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The family in one store for many tests: for those that change nothing, or only refs that nobody else has."""
    folder = tmp_path_factory.mktemp("shared")
    with Store.create(folder / "store", block_bytes=4096) as store:
        yield _ingest(store, folder)
        assert_clean(store)
