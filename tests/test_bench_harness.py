"""The bench harness measures what it says, takes turns, and cleans up after failures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return pytest.importorskip("harness")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_measures_seconds_output_and_writes(harness: ModuleType, tmp_path: Path) -> None:
    run = harness.run_command(python("import time; time.sleep(0.2); print('hello')"), tmp_path)
    assert 0.2 <= run.seconds < 5
    assert run.outputs == ("hello\n",)
    assert run.peak_bytes > 2**20


def test_peak_counts_grandchildren(harness: ModuleType, tmp_path: Path) -> None:
    # Above the size of the test process itself, which a child is said to have had as well.
    small = harness.run_command(python("pass"), tmp_path).peak_bytes
    code = f"x = bytearray({small + 2**28}); x[::4096] = b'1' * len(x[::4096])"
    run = harness.run_command(("sh", "-c", '"$1" -c "$2"; true', "sh", sys.executable, code), tmp_path)
    assert run.peak_bytes > small + 2**27


def test_takes_turns_with_hooks_around(harness: ModuleType, tmp_path: Path) -> None:
    seen: list[str] = []

    def side(name: str) -> object:
        return harness.Side(
            name,
            [python("pass"), python("pass")],
            tmp_path,
            prepare=lambda: seen.append(f"{name} prepare"),
            inspect=lambda run: seen.append(f"{name} inspect {len(run.outputs)}"),
            cleanup=lambda: seen.append(f"{name} cleanup"),
        )

    runs = harness.alternate([side("a"), side("b")], 2, cold=False)
    turn = [f"{name} {what}" for name in "ab" for what in ("prepare", "inspect 2", "cleanup")]
    assert seen == turn * 2
    assert {name: len(each) for name, each in runs.items()} == {"a": 2, "b": 2}


def test_failure_tells_and_cleans_up(harness: ModuleType, tmp_path: Path) -> None:
    cleaned: list[bool] = []
    side = harness.Side(
        "bad", [python("raise SystemExit('went wrong')")], tmp_path, cleanup=lambda: cleaned.append(True)
    )
    with pytest.raises(harness.BenchError, match="went wrong"):
        harness.run_side(side, cold=False)
    assert cleaned == [True]


def test_disk_bytes_ignores_holes(harness: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**30)
    assert harness.disk_bytes(tmp_path) < 2**20
    assert harness.folder_bytes(tmp_path) == 2**30
