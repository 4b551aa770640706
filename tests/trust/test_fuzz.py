"""Random harm to every kind of input: it is refused with a clear error, or read right; see :mod:`support.fuzz`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.covered import FUZZED
from support.fuzz import targets
from support.fuzz_stores import make_zoo
from support.processes import TESTS

SEED = 5
# How many mutations: usually, and in `make test-deep`.
COUNTS = {
    "objects": (250, 3000),
    "preview objects": (60, 700),
    "previews": (60, 700),
    "records": (200, 3000),
    "catalog rows": (30, 600),
    "catalog files": (12, 400),
    "store.json": (80, 800),
    "refs.journal": (80, 800),
    "safetensors": (200, 2500),
    "shard indices": (100, 1200),
    "PyTorch files": (120, 1500),
    "adapter configs": (80, 800),
    "config.json": (60, 600),
    "tokenizers": (80, 800),
    "plans": (150, 2000),
    "recipes": (150, 2500),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def test_every_kind_is_run_often_enough() -> None:
    assert set(COUNTS) == set(targets())
    assert sum(usual for usual, _ in COUNTS.values()) >= 1500
    assert sum(deep for _, deep in COUNTS.values()) >= 10_000


@pytest.mark.parametrize("kind", COUNTS)
def test_hostile_bytes(
    zoo: Path, tmp_path: Path, deep: bool, kind: str, record_property: Callable[[str, object], None]
) -> None:
    """In a process of its own: a crash is the case's that was last, and memory is limited."""
    count = COUNTS[kind][deep]
    result = fuzz(zoo, tmp_path, kind, count)
    record_property(FUZZED, json.dumps(result))
    assert not result["failures"], "\n\n".join(result["failures"])
    assert sum(result["outcomes"].values()) == count
    if count >= 50:  # of a few, all may end alike
        assert len(result["outcomes"]) > 1, "nothing was refused, or everything was for one reason"


def fuzz(zoo: Path, work: Path, kind: str, count: int) -> dict[str, Any]:
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "support.fuzz", zoo, kind, str(SEED), str(count), work],
        env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=60 + 2 * count)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail(f"{kind} {SEED} {_last(work, kind)}: hangs where no signal is heard")
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        pytest.fail(f"{kind} {SEED} {_last(work, kind)}: the process ended with {name}\n{err[-3000:]}")
    assert process.returncode == 0, err[-3000:]
    return dict(json.loads(out.splitlines()[-1]))


def _last(work: Path, kind: str) -> str:
    path = work / f"{kind}.last"
    return path.read_text() if path.exists() else "before the first"
