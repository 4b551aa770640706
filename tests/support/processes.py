"""Running pieces of a test in a process of their own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent


def start_python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start Python on some code, with :mod:`support` importable and ``arguments`` in ``sys.argv[1:]``."""
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(code: str, *arguments: object, expect: int = 0, **environment: str) -> str:
    """Run it to its end; returns what it printed. ``expect`` is its exit code."""
    process = start_python(code, *arguments, **environment)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == expect, f"exit code {process.returncode}, not {expect}\n{output}\n{errors}"
    return output


def die_at(name: str, side: str, number: int) -> None:
    """Let this process die before (``<``) or after (``>``) the n-th call of a function, ``module.name``."""
    module, _, path = name.partition(".")
    owner: Any = importlib.import_module("mergepipe.store." + module)
    *owners, attribute = path.split(".")
    for each in owners:
        owner = getattr(owner, each)
    original, calls = getattr(owner, attribute), 0

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and side == "<":
            os._exit(77)
        result = original(*arguments, **named)
        if calls == number and side == ">":
            os._exit(77)
        return result

    setattr(owner, attribute, dying)
