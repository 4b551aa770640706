"""Every step of a command that the outside can see, counted, so that the n-th can be its last or can fail.

A step is a call that changes a file or a folder, asks for it to be flushed, or begins or ends a write transaction of
the catalog. Patched are the functions of :mod:`os` and :mod:`io`, the C library's that the store calls by itself, and
``Catalog.write``. For a process of its own: nothing is ever put back.

:func:`main` drives one scenario of :mod:`support.scenarios`: it runs it whole to count its steps, then forks a process
for each of the chosen steps, on a copy of the same store, and another one that looks at what that left.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import lmdb

from mergepipe.store import filesystem
from mergepipe.store.catalog import Catalog, Writing
from mergepipe.store.errors import MergePipeError
from support.scenarios import SCENARIOS, Look, Scenario

DIED = 77
_CALLS = (
    "replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "write", "writev", "pwrite", "fsync",
    "fdatasync", "truncate", "ftruncate",
)  # fmt: skip
_C_CALLS = ("syncfs", "sync_file_range", "renameat2")


class Steps:
    """Counts steps; at number ``at`` the process dies, or the call fails with ``error``."""

    def __init__(self, at: int = 0, error: int = 0) -> None:
        self.at = at
        self.error = error
        self.count = 0
        self.last = ""
        self._lock = threading.Lock()

    def take(self, name: str) -> bool:
        """One step more; True where it must fail."""
        with self._lock:
            self.count += 1
            if self.count != self.at:
                return False
            self.last = name
        if self.error:
            return True
        os._exit(DIED)

    def install(self) -> None:
        """From now on everything is counted."""
        for name in _CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.open = self._counted_open(os.open)
        io.open = self._counted_stream(io.open)
        libc = _Library(self)
        filesystem._libc = lambda: libc  # type: ignore[assignment]
        self._count_transactions()

    def fail(self) -> NoReturn:
        raise OSError(self.error, os.strerror(self.error))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self.take(name):
                self.fail()
            return original(*arguments, **named)

        return call

    def _counted_open(self, original: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and self.take("open"):
                self.fail()
            return original(path, flags, *arguments, **named)

        return call

    def _counted_stream(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What writes through Python's own streams: before it is open, and open and still empty."""

        def call(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if not set(mode) & set("wax+"):
                return original(file, mode, *arguments, **named)
            if self.take("open a stream"):
                self.fail()
            stream = original(file, mode, *arguments, **named)
            if self.take("write a stream"):
                stream.close()
                self.fail()
            return stream

        return call

    def _count_transactions(self) -> None:
        original = Catalog.write

        def write(catalog: Catalog, change: Callable[[Writing], Any]) -> Any:
            def counted(view: Writing) -> Any:
                result = change(view)
                if self.take("commit"):
                    raise lmdb.DiskError(os.strerror(self.error))
                return result

            if self.take("begin"):
                raise_explained(catalog, self.error)
            found = original(catalog, counted)
            if not self.error:  # it is durable; that cannot fail any more
                self.take("committed")
            return found

        Catalog.write = write  # type: ignore[assignment,method-assign]


def raise_explained(catalog: Catalog, error: int) -> NoReturn:
    """As where LMDB cannot begin a transaction."""
    from mergepipe.store.catalog import _explain

    raise _explain(lmdb.DiskError(os.strerror(error)), catalog.path)


class _Library:
    """The C library, for the three calls that the store makes of it; they say that they failed by their result."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._real = ctypes.CDLL(None, use_errno=True)

    def __getattr__(self, name: str) -> Any:
        if name not in _C_CALLS:
            raise AttributeError(name)
        original = getattr(self._real, name)

        def call(*arguments: Any) -> int:
            if self._steps.take(name):
                ctypes.set_errno(self._steps.error)
                return -1
            found: int = original(*arguments)
            return found

        return call


def main(words: list[str]) -> None:
    """``SCENARIO kill|error TEMPLATE CHECKPOINTS WORK MOST`` prints one JSON object.

    ``SCENARIO once ROOT CHECKPOINTS`` runs it as it is, and prints the error that it ended with.
    """
    if words[1] == "once":
        try:
            SCENARIOS[words[0]].run(Path(words[2]), Path(words[3]))
        except MergePipeError as error:
            print(f"{error.kind}: {error.message}")
        return
    name, mode, template, checkpoints, work, most = words
    driver = _Driver(SCENARIOS[name], mode, Path(template), Path(checkpoints), Path(work))
    print(json.dumps(driver.run(int(most))))


class _Driver:
    def __init__(self, scenario: Scenario, mode: str, template: Path, checkpoints: Path, work: Path) -> None:
        self.scenario = scenario
        self.mode = mode
        self.template = template
        self.checkpoints = checkpoints
        self.work = work

    def run(self, most: int) -> dict[str, Any]:
        """Count the steps, then die (or fail) at each, or at ``most`` of them, evenly spread."""
        warm = self._copy("warm")
        self.scenario.run(warm, self.checkpoints)  # compiled and imported once, before the first fork
        wanted = self.scenario.look(warm)
        before = self.scenario.look(self._copy("before"))
        total, _ = self._forked(lambda: self._whole(self._copy("count")))
        count = int(total)
        most = min(most, count) if most else count
        chosen = [1 + place * count // most for place in range(most)]
        outcomes: dict[str, int] = {}
        failures = []
        for number in chosen:
            root = self._copy("one")
            error = (errno.ENOSPC, errno.EIO)[number % 2] if self.mode == "error" else 0

            def until(root: Path = root, number: int = number, error: int = error) -> str:
                return self._until(root, number, error, before, wanted)

            def judge(root: Path = root) -> str:
                self.scenario.judge(root, self.checkpoints, before, wanted)
                return ""

            said, code = self._forked(until)
            if code == DIED:
                outcome, problem = "killed", ""
            elif code == 0:
                outcome, problem = said, ""
            else:
                outcome, problem = "broken", f"exit code {code}: {said}"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if not problem:
                problem, code = self._forked(judge)
                problem = problem or (f"judging it ended with {code}" if code else "")
            if problem:
                failures.append(f"{self.mode} at step {number} of {total}: {problem}")
        return {"steps": count, "tried": len(chosen), "outcomes": outcomes, "failures": failures}

    def _copy(self, name: str) -> Path:
        root = self.work / name / ".mp"
        shutil.rmtree(root.parent, ignore_errors=True)
        if self.template.exists():
            shutil.copytree(self.template, root)
        else:
            root.parent.mkdir()
        return root

    def _whole(self, root: Path) -> str:
        steps = Steps()
        steps.install()
        self.scenario.run(root, self.checkpoints)
        return str(steps.count)

    def _until(self, root: Path, number: int, error: int, before: Look, wanted: Look) -> str:
        """Runs up to the step, which is its last; or fails there with an error, and is given again. Says which."""
        steps = Steps(number, error)
        steps.install()
        try:
            self.scenario.run(root, self.checkpoints)
        except MergePipeError as found:
            if not steps.last:
                raise
            assert len(found.message) > 20, found
            steps.at = 0
            self.scenario.check_left(root, before, wanted)
            self.scenario.run(root, self.checkpoints)
            return "failed with a clear error"
        except OSError as found:
            raise AssertionError(f"{steps.last} failed with a bare {found!r}") from found
        return "went on" if steps.last else "was done before"

    def _forked(self, work: Callable[[], str]) -> tuple[str, int]:
        """What ``work`` returns in a process of its own, and its exit code."""
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            code, said = 0, ""
            try:
                said = work() or ""
            except BaseException:
                code, said = 1, traceback.format_exc()
            data = said.encode()[:60_000]
            ctypes.CDLL(None).write(into, data, len(data))
            os._exit(code)
        os.close(into)
        with os.fdopen(out, "rb") as stream:
            said = stream.read().decode(errors="replace")
        return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(sys.argv[1:])
