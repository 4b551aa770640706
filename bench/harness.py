"""Run whole processes side by side, from a cold cache: wall seconds, peak memory, bytes written.

A side is one or more commands that are timed together, with a hook before and hooks after that are not. Sides
take turns (A B A B ...), so that a machine that slows down slows both; quote the median and the ratio.

Peak memory is `ru_maxrss` of the child and all it waited for: it counts mapped file pages, and, as Linux
carries it over a fork, is never less than this process holds. So nothing heavy is imported here: standard
library only. Bytes written are the kernel's count, `ru_oublock`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "out"
MP = Path(sys.executable).with_name("mp")

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")

Command = Sequence[str | Path]


class BenchError(Exception):
    """A measured command failed, or something that it needs is missing."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a side took; `outputs` holds each command's standard output."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    written_bytes: int
    outputs: tuple[str, ...]


def nothing() -> None:
    """A hook that does nothing."""


def ignore(_: Run) -> None:
    """A hook that looks at nothing."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things compared: `prepare`, then the timed commands, then `inspect` and `cleanup`."""

    name: str
    commands: Sequence[Command]
    cwd: Path
    prepare: Callable[[], None] = nothing
    inspect: Callable[[Run], None] = ignore
    cleanup: Callable[[], None] = nothing


def drop_page_cache() -> bool:
    """Flush, then empty the page cache; False where this user may not (the runs are then warm)."""
    os.sync()
    try:
        _DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


def environment() -> dict[str, str]:
    """This process's environment without what would point `mp` at another store, and with compiled modules kept.

    Installed packages have theirs from the start, and a source tree should not be compiled anew for each run.
    """
    others = {key: value for key, value in os.environ.items() if not key.startswith("MP_")}
    others.pop("PYTHONDONTWRITEBYTECODE", None)
    return others


def run_command(command: Command, cwd: Path) -> Run:
    """Run one process to its end and measure it; BenchError, with its last words, where it fails."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        try:
            child = subprocess.Popen(words, cwd=cwd, stdout=out, stderr=err, env=environment())
        except FileNotFoundError as error:
            raise BenchError(f"{words[0]} is not there: run `make setup` first") from error
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if child.returncode != 0:
            tail = (out.read() + err.read()).decode(errors="replace")[-2000:]
            raise BenchError(f"exit {child.returncode}: {' '.join(words)}\n{tail}")
        unit = 1 if sys.platform == "darwin" else 1024
        cpu = usage.ru_utime + usage.ru_stime
        text = out.read().decode(errors="replace")
        return Run(seconds, cpu, usage.ru_maxrss * unit, usage.ru_oublock * 512, (text,))


def run_side(side: Side, cold: bool = True) -> Run:
    """One turn of one side: its commands' seconds and bytes add up, the peak is the highest of them."""
    side.prepare()
    try:
        if cold:
            drop_page_cache()
        runs = [run_command(command, side.cwd) for command in side.commands]
        run = Run(
            sum(r.seconds for r in runs),
            sum(r.cpu_seconds for r in runs),
            max(r.peak_bytes for r in runs),
            sum(r.written_bytes for r in runs),
            tuple(text for r in runs for text in r.outputs),
        )
        side.inspect(run)
    finally:
        side.cleanup()
    return run


def alternate(sides: Sequence[Side], rounds: int, cold: bool = True) -> dict[str, list[Run]]:
    """Every side in turn, `rounds` times over, telling each result on standard error as it comes."""
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for turn in range(1, rounds + 1):
        for side in sides:
            run = run_side(side, cold)
            runs[side.name].append(run)
            peak = format_bytes(run.peak_bytes)
            print(f"  {turn}/{rounds} {side.name}: {run.seconds:.2f} s, {peak} peak", file=sys.stderr)
    return runs


def median_seconds(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def peak_bytes(runs: Sequence[Run]) -> int:
    return max(run.peak_bytes for run in runs)


def format_bytes(size: float) -> str:
    """1290000000 -> `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def print_runs(runs: Mapping[str, Sequence[Run]], against: str) -> None:
    """The table of medians; ratios are to the side named `against`."""
    reference = median_seconds(runs[against])
    rows = []
    for name, side in runs.items():
        seconds = [run.seconds for run in side]
        middle = median_seconds(side)
        cpu = statistics.median(run.cpu_seconds for run in side)
        figures = [f"{value:.2f}" for value in (middle, min(seconds), max(seconds), cpu)]
        sizes = [format_bytes(peak_bytes(side)), format_bytes(max(run.written_bytes for run in side))]
        rows.append([name, *figures, *sizes, f"{middle / reference:.2f}x"])
    print_table(["", "median s", "min s", "max s", "cpu s", "peak memory", "written", "ratio"], rows)


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that was asked for: met where `value` is at most `limit`."""

    name: str
    value: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def print_goals(goals: Sequence[Goal]) -> None:
    rows = [[g.name, f"{g.value:.3g}{g.unit}", f"{g.limit:.3g}{g.unit}", "met" if g.met else "MISSED"] for g in goals]
    print_table(["goal", "measured", "at most", ""], rows)


def write_report(
    name: str, facts: Mapping[str, object], runs: Mapping[str, Sequence[Run]], goals: Sequence[Goal]
) -> Path:
    """Write `bench/out/NAME.json` and return its path."""
    OUT.mkdir(parents=True, exist_ok=True)
    report = {
        "bench": name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        "facts": dict(facts),
        "runs": {
            side: [
                {
                    "seconds": run.seconds,
                    "cpu_seconds": run.cpu_seconds,
                    "peak_bytes": run.peak_bytes,
                    "written_bytes": run.written_bytes,
                }
                for run in each
            ]
            for side, each in runs.items()
        },
        "goals": [{"name": g.name, "value": g.value, "limit": g.limit, "unit": g.unit, "met": g.met} for g in goals],
    }
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def remove(path: Path) -> None:
    """Remove a folder that may not be there."""
    shutil.rmtree(path, ignore_errors=True)


def copy_command(source: Path, target: Path) -> Command:
    """The yardstick: copy the bytes, and wait until the disk has them."""
    return ("sh", "-c", 'cp -r "$1" "$2" && sync', "sh", source, target)


def folder_bytes(folder: Path) -> int:
    """The length of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_bytes(folder: Path) -> int:
    """What a folder takes on disk, as `du` counts it: holes are free, a file linked twice counts once."""
    stats = (path.lstat() for path in folder.rglob("*"))
    return sum({(s.st_dev, s.st_ino): s.st_blocks * 512 for s in stats}.values())


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)


@contextmanager
def workspace(keep: bool, parent: Path | None) -> Iterator[Path]:
    """A folder on a real disk (`build/` by default: /tmp may be memory), removed at the end unless kept."""
    parent = parent or ROOT / "build"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield folder
    finally:
        if keep:
            print(f"kept {folder}", file=sys.stderr)
        else:
            remove(folder)
