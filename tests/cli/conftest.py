"""Running ``mp``: in this process where that is enough, as a process of its own where it matters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mergepipe.cli.app import main
from support.family import write_family

MP = Path(sys.executable).with_name("mp")


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a command that ran with ``--json``: the last line of stderr."""
        value = json.loads(self.err.splitlines()[-1])
        assert set(value) == {"error", "message", "hint"}
        return dict(value)


Run = Callable[..., Answer]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints ``base``, ``expert0`` and ``expert1``."""
    folder = tmp_path_factory.mktemp("family")
    write_family(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory without colours, and a known author."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("MP_STORE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MP_AUTHOR", "ada")
    monkeypatch.setenv("TZ", "UTC")
    return folder


@pytest.fixture
def call(here: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:  # noqa: ARG001  # it is where commands run
    """Runs a command line inside this process, in ``here``; ``code`` is the exit code that it must have."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*words: object, code: int = 0) -> Answer:
        capfd.readouterr()
        found = main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert found == code, f"exit code {found}, not {code}\n{out}\n{err}"
        assert "Traceback" not in err
        return Answer(found, out, err)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def mp(here: Path) -> Run:
    """Runs the installed ``mp`` as a process, in ``here``."""

    def run(*words: object, code: int = 0, **environment: str) -> Answer:
        done = subprocess.run(
            [MP, *map(str, words)],
            cwd=here,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return Answer(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def filled_template(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mergepipe.store import Store

    root = tmp_path_factory.mktemp("filled") / ".mp"
    with Store.create(root, block_bytes=4096) as store:
        store.ingest([family / "base"], message="the base", author="ada")
        store.ingest([family / "expert0"], base="base", message="first\nwith a second line", author="ada")
        store.ingest([family / "expert1"], base="base", message="second", author="ada")
    return root


@pytest.fixture
def filled(filled_template: Path, here: Path) -> Path:
    """``here`` with a store in it: ``base``, and ``expert0`` and ``expert1`` on it, in blocks of 4 KiB."""
    shutil.copytree(filled_template, here / ".mp")
    return here


@pytest.fixture(scope="session")
def merged_template(filled_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mergepipe.merge import Expert, execute, parse_budget, plan_merge
    from mergepipe.store import Store

    root = tmp_path_factory.mktemp("merged") / ".mp"
    shutil.copytree(filled_template, root)
    with Store.open(root) as store:
        experts = [Expert("expert0", {"weight": 0.6}), Expert("expert1", {"weight": 0.4})]
        budget = parse_budget("60%", None)
        first = plan_merge(store, "base", experts, "ties", parameters={"density": 0.3}, budget=budget)
        execute(store, first, "merged/v1", author="ada")
        again = [Expert("merged/v1", {"weight": 0.5}), Expert("expert1", {"weight": 0.5})]
        execute(store, plan_merge(store, "base", again, "task_arithmetic"), "merged/v2", message="again", author="ada")
    return root


@pytest.fixture
def merged(merged_template: Path, here: Path) -> Path:
    """As ``filled``; and ``merged/v1``, which read a part of both experts, and ``merged/v2``, of it and ``expert1``."""
    shutil.copytree(merged_template, here / ".mp")
    return here
