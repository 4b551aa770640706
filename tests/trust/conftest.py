"""What tests of trust share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergepipe.store import Store
from support.family import base_weights, write_model


@pytest.fixture
def soon(deep: bool) -> Iterator[None]:
    """What takes longer than this hangs."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300 if deep else 60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def evil(hurt_store: Store, tmp_path: Path) -> Store:
    """A store with the model ``m`` in it, to be made a stranger's."""
    hurt_store.ingest([write_model(tmp_path / "m", base_weights())])
    return hurt_store
