"""A command dies at each of its steps, or a step fails: nothing that was acknowledged is lost, and it can be repeated.

What a step is, and what must hold after it, say :mod:`support.steps` and :mod:`support.scenarios`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.covered import count
from support.model import write_variants
from support.processes import TESTS
from support.scenarios import SCENARIOS, make_template

CATALOG_CALLS = "pwrite64,pwritev,fdatasync,msync"
USUAL_STEPS = {"kill": 14, "error": 6}  # of each scenario, evenly spread; all of them in `make test-deep`
TRACED = [("ingest", "EIO"), ("refs", "ENOSPC")]
if os.environ.get("MP_TEST_DEPTH") == "deep":
    TRACED = [(scenario, error) for scenario in SCENARIOS for error in ("EIO", "ENOSPC") if scenario != "first"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store to begin with, and checkpoints."""
    top = tmp_path_factory.mktemp("steps")
    write_variants(top / "checkpoints")
    make_template(top / "template" / ".mp", top / "checkpoints")
    return top / "template" / ".mp", top / "checkpoints"


@pytest.mark.parametrize("mode", list(USUAL_STEPS))
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_every_step(
    made: tuple[Path, Path],
    tmp_path: Path,
    deep: bool,
    scenario: str,
    mode: str,
) -> None:
    template = tmp_path / "template" / ".mp"
    shutil.copytree(made[0], template)
    SCENARIOS[scenario].prepare(template)
    found = drive(scenario, mode, template, made[1], tmp_path / "work", 0 if deep else USUAL_STEPS[mode])
    count(steps=found["steps"], **{"killed" if mode == "kill" else "errors_put_in": found["tried"]})
    assert not found["failures"], "\n\n".join(found["failures"][:5])
    if mode == "kill":
        assert found["outcomes"]["killed"] > found["tried"] // 2
    else:  # a reader can do without its lease
        assert found["outcomes"]["failed with a clear error"] >= found["tried"] // 4


@pytest.fixture(scope="module")
def strace() -> list[str]:
    """How to start a process some of whose system calls fail; skipped where that cannot be done."""
    words = ["strace", "-f", "--seccomp-bpf", "-qq"]
    try:
        done = subprocess.run([*words, "-e", "trace=fdatasync", "true"], capture_output=True, check=False)
    except OSError:
        pytest.skip("strace is not there")
    if done.returncode != 0:
        pytest.skip("strace may not trace here")
    return words


@pytest.mark.parametrize(("scenario", "error"), TRACED)
def test_the_catalogs_own_calls_fail(
    made: tuple[Path, Path], tmp_path: Path, deep: bool, strace: list[str], scenario: str, error: str
) -> None:
    """What LMDB writes and flushes by itself, in the thread that commits."""
    chosen, found = SCENARIOS[scenario], []
    template, root = tmp_path / "template" / ".mp", tmp_path / "whole" / ".mp"
    shutil.copytree(made[0], template)
    chosen.prepare(template)
    before = chosen.look(template)
    shutil.copytree(template, root)
    log = tmp_path / "log"
    trace(strace, [], log, scenario, root, made[1])
    wanted = chosen.look(root)
    calls = calls_of_the_first_thread(log)
    for name, number in calls if deep else calls[:: max(1, len(calls) // 3)]:
        root = tmp_path / f"{name}{number}" / ".mp"
        shutil.copytree(template, root)
        said = trace(strace, ["-e", f"inject={name}:error={error}:when={number}"], log, scenario, root, made[1])
        assert "INJECTED" in log.read_text()
        found.append(said)
        chosen.judge(root, made[1], before, wanted)
    count(system_calls_that_fail=len(found))
    assert any(found)
    assert all(said.startswith("environment: ") for said in found if said), found


def calls_of_the_first_thread(log: Path) -> list[tuple[str, int]]:
    """Each call by its name, and which of that name it was: so strace counts them."""
    lines = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    names = [call.split("(")[0] for thread, call in lines if thread == lines[0][0] and "(" in call]
    return [(name, names[: place + 1].count(name)) for place, name in enumerate(names) if name in CATALOG_CALLS]


def trace(strace: list[str], options: list[str], log: Path, scenario: str, root: Path, checkpoints: Path) -> str:
    """What the scenario says in the end, while its calls are traced."""
    words = [*strace, "-o", str(log), "-e", f"trace={CATALOG_CALLS}", *options]
    done = subprocess.run(
        [*words, sys.executable, "-m", "support.steps", scenario, "once", str(root), str(checkpoints)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout.strip()


def drive(scenario: str, mode: str, template: Path, checkpoints: Path, work: Path, most: int) -> dict[str, Any]:
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "support.steps", scenario, mode, template, checkpoints, work, str(most)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))
