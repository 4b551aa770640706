"""A small family in a store, for tests of merging."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergepipe.store import Store
from support.family import base_weights, fine_tune
from support.merges import ingest_family


@pytest.fixture
def family(store: Store, tmp_path: Path) -> Store:
    """A store with ``base``, and ``math`` and ``code`` that change the matrices of all three layers."""
    base = base_weights()
    ingest_family(store, tmp_path, base, {"math": fine_tune(base, 1), "code": fine_tune(base, 2, scale=3e-3)})
    return store


@pytest.fixture
def hurt_family(hurt_store: Store, tmp_path: Path) -> Store:
    """The same in a store that a test damages."""
    base = base_weights()
    ingest_family(hurt_store, tmp_path, base, {"math": fine_tune(base, 1), "code": fine_tune(base, 2, scale=3e-3)})
    return hurt_store
