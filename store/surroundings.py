"""What the machine gives to ``mp``: versions, processors, memory, limits, and where compiled code is kept."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from mergepipe.store.findings import Finding, problem, warning, well
from mergepipe.store.sizes import format_size
from mergepipe.store.version import VERSION

PACKAGES: Final = ("numpy", "numba", "lmdb", "zstandard", "blake3", "ml_dtypes", "numcodecs", "zarr", "torch")
_NEEDED: Final = frozenset(PACKAGES) - {"torch", "zarr"}  # the others are for merging, and for looking with zarr
_FEW_FILES, _LOW_FILES = 128, 512
_LOW_MEMORY, _LITTLE_MEMORY = 512 << 20, 2 << 30
_OWN_BITS: Final = 0o700
_UNLIMITED: Final = 1 << 60


def look_at_machine() -> Iterator[Finding]:
    """All of it, each line by itself."""
    yield from _versions()
    yield _compiled_code()
    yield _open_files()
    yield from _address_space()
    yield from _processors(Path("/sys/fs/cgroup"))
    yield from _memory(Path("/proc"), Path("/sys/fs/cgroup"))
    yield from _umask(Path("/proc"))


def _versions() -> Iterator[Finding]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    missing = [name for name, number in found.items() if not number]
    there = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    yield well("versions", f"mergepipe {VERSION}, Python {platform.python_version()}, {there}")
    if missing:
        advice = f"Install them: pip install {' '.join(missing)}"
        make = problem if _NEEDED.intersection(missing) else warning
        yield make("versions", f"not installed: {', '.join(missing)}", advice)


def _compiled_code() -> Finding:
    """Whether numba can keep what it compiled: in the folder that is named, else in the package, else in the home."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba"
    places = [Path(named)] if named else [Path(__file__).parent / "__pycache__", home]
    for place in places:
        if _can_be_written(place):
            return well("compiled code", f"is kept in {place}")
    return warning(
        "compiled code",
        f"cannot be kept in {' or '.join(map(str, places))}: every command that encodes compiles for seconds first",
        "Name a folder that you may write to: export NUMBA_CACHE_DIR=/tmp/numba",
    )


def _can_be_written(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = _UNLIMITED if soft == resource.RLIM_INFINITY else soft
    advice = "Raise it: ulimit -n 4096" + (f" (at most {hard})" if 0 < hard < 4096 else "")
    if soft < _LOW_FILES:
        make = problem if soft < _FEW_FILES else warning
        return make("open files", f"{soft} at once: a model of many shards needs one for each", advice)
    return well("open files", f"{soft:,} at once" if soft < _UNLIMITED else "as many as one likes")


def _address_space() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft < 128 << 30:
        yield problem(
            "address space",
            f"limited to {format_size(soft)}: the catalog reserves 64 GiB of it, which takes no memory",
            "Lift the limit: ulimit -v unlimited",
        )


def _processors(cgroup: Path) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _processor_quota(cgroup)
    if quota is not None and quota < 0.75 * usable:
        yield warning(
            "processors",
            f"{usable} can be seen, and the container may use {quota:.1f}: threads wait for each other",
            f"Show it fewer: taskset -c 0-{max(round(quota) - 1, 0)} mp ...",
        )
    else:
        yield well("processors", f"{usable} of {os.cpu_count() or 1}")


def _processor_quota(cgroup: Path) -> float | None:
    """How many processors a container may use; None where nobody says."""
    fields = _text(cgroup / "cpu.max").split()
    if len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit() and int(fields[1]):
        return int(fields[0]) / int(fields[1])
    quota, period = (_text(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def _memory(proc: Path, cgroup: Path) -> Iterator[Finding]:
    available = _available_bytes(proc)
    limit = next((size for size in (_limit(cgroup, name) for name in _LIMITS) if size is not None), None)
    parts = [f"{format_size(available)} available"] if available is not None else []
    if limit is not None:
        parts.append(f"a limit of {format_size(limit)} for this container")
    if not parts:
        return
    least = min(size for size in (available, limit) if size is not None)
    advice = "Close other programs, or raise the limit."
    if least < _LOW_MEMORY:
        yield problem("memory", ", ".join(parts), advice)
    elif least < _LITTLE_MEMORY:
        yield warning("memory", ", ".join(parts), advice)
    else:
        yield well("memory", ", ".join(parts))


_LIMITS: Final = ("memory.max", "memory/memory.limit_in_bytes")


def _available_bytes(proc: Path) -> int | None:
    for line in _text(proc / "meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable" and rest.split()[:1] and rest.split()[0].isdigit():
            return int(rest.split()[0]) << 10
    return None


def _limit(cgroup: Path, name: str) -> int | None:
    text = _text(cgroup / name)
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _umask(proc: Path) -> Iterator[Finding]:
    """Read from the kernel: asking for it in the usual way would set it."""
    for line in _text(proc / "self" / "status").splitlines():
        name, _, text = line.partition(":")
        if name == "Umask":
            mask = int(text.strip(), 8)
            if mask & _OWN_BITS:
                yield problem("umask", f"{mask:04o}: files that you make are closed to you", "Set another: umask 022")
            else:
                yield well("umask", f"{mask:04o}" + ("" if mask & 0o020 else ": others of your group may write"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
