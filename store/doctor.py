"""``mp doctor``: a look at a store and what it stands on, in words: what is well, what may go wrong, what is wrong.

Nothing is changed, but that places of dead readers in LMDB's lock file are freed. No content is read: that is for
``mp verify``. Each check stands by itself, so a store whose catalog cannot be opened, or that lies on a read-only
filesystem, is looked at as far as possible. What the machine has is looked at by
:mod:`mergepipe.store.surroundings`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mergepipe.store.catalog import DATA, LOCK, Catalog, Reading, open_catalog, release_catalog, unpack_object_row
from mergepipe.store.digest import Digest
from mergepipe.store.errors import DamagedError, EnvironmentalError, MergePipeError
from mergepipe.store.filesystem import NETWORK_FILESYSTEMS, filesystem_type
from mergepipe.store.findings import Finding, problem, warning, well
from mergepipe.store.layout import FORMAT_VERSION, Layout, find_layout
from mergepipe.store.replace import unsettled
from mergepipe.store.sizes import format_size
from mergepipe.store.surroundings import look_at_machine
from mergepipe.store.writers import look_at_clock, look_at_writers

SCAN_SECONDS: Final = 10.0
_LOW_BYTES, _FEW_BYTES = 4 << 30, 256 << 20
_LOW_INODES, _FEW_INODES = 100_000, 1000
_FULL_MAP: Final = 0.8
_MANY_FREE_BYTES: Final = 256 << 20
_HEX: Final = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was found, in the order in which it was looked at. ``store`` is None where there is none."""

    store: Path | None
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0 where nothing is a problem, 5 where something is damaged, else that of the first problem."""
        codes = [finding.exit_code for finding in self.findings if finding.exit_code]
        return DamagedError.exit_code if DamagedError.exit_code in codes else next(iter(codes), 0)


def examine(path: Path | None = None, *, scan_seconds: float = SCAN_SECONDS) -> Examination:
    """Look at the store in ``path`` (or the nearest), and at the machine. Looks through files for so long at most."""
    try:
        layout = find_layout(path)
    except MergePipeError as error:
        found = problem("store", error.message, error.hint or "", error.exit_code)
        return Examination(None, (found, *look_at_machine()))
    findings = [
        well("store", f"{layout.root}: format {FORMAT_VERSION}, blocks of {format_size(layout.block_bytes)}"),
        *_filesystems(layout),
        *_space(layout),
        *_permissions(layout),
        *look_at_writers(layout),
        *look_at_clock(layout),
        *_with_catalog(layout, scan_seconds),
    ]
    return Examination(layout.root, (*findings, *look_at_machine()))


def _filesystems(layout: Layout) -> Iterator[Finding]:
    for name, path in (("objects", layout.objects), ("catalog", layout.catalog)):
        if not path.is_dir():
            advice = "`mp recover` makes a new catalog." if name == "catalog" else "Put the folder back from a copy."
            yield problem("filesystem", f"the folder of the {name} is missing: {path}", advice, DamagedError.exit_code)
            continue
        kind = filesystem_type(path) or "unknown"
        if _is_read_only(path):
            yield warning(
                "filesystem",
                f"the {name} are on a read-only filesystem ({kind}): nothing can be stored"
                if name == "objects"
                else f"the catalog is on a read-only filesystem ({kind}): nothing can be stored",
                "Reading works. To write, copy the store, or mount it writable.",
            )
        elif kind in NETWORK_FILESYSTEMS and name == "catalog":
            yield problem(
                "filesystem",
                f"the catalog is on a network filesystem ({kind}), where its locks do not hold",
                "Keep it on a local disk beside shared objects: mp init --catalog /local/dir",
            )
        elif kind.startswith("fuse") or kind in NETWORK_FILESYSTEMS:
            yield warning(
                "filesystem",
                f"the {name} are on {kind}: slower, and what is flushed may not be on a disk",
                "A local disk is better where there is one.",
            )
        else:
            yield well("filesystem", f"{name}: {kind}")
    with_tmp = layout.temporary.is_dir() and layout.objects.is_dir()
    if with_tmp and layout.temporary.stat().st_dev != layout.objects.stat().st_dev:
        yield problem(
            "filesystem",
            "tmp/ and objects/ are on different filesystems: files cannot be moved from one to the other",
            f"Make {layout.temporary} a plain folder of the store again.",
        )


def _is_read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _space(layout: Layout) -> Iterator[Finding]:
    seen: set[int] = set()
    for path in (layout.objects, layout.catalog):
        if not path.is_dir() or path.stat().st_dev in seen:
            continue
        seen.add(path.stat().st_dev)
        disk = os.statvfs(path)
        free, inodes = disk.f_bavail * disk.f_frsize, disk.f_favail
        text = f"{format_size(free)} free where {path} is"
        advice = "Free some space: `mp gc` says what could go, `mp repack` what could shrink."
        yield _graded("space", text, advice, few=free < _FEW_BYTES, low=free < _LOW_BYTES)
        if disk.f_files:
            text = f"{inodes:,} files can still be made there"
            advice = "Every block is a file. Delete small files, or use a filesystem with more inodes."
            yield _graded("inodes", text, advice, few=inodes < _FEW_INODES, low=inodes < _LOW_INODES)


def _graded(check: str, text: str, advice: str, *, few: bool, low: bool) -> Finding:
    if few:
        return problem(check, text, advice)
    return warning(check, text, advice) if low else well(check, text)


def _permissions(layout: Layout) -> Iterator[Finding]:
    if not layout.objects.is_dir() or _is_read_only(layout.objects):
        return
    fans = [layout.objects / f"{fan:02x}" for fan in range(256)]
    missing = [fan for fan in fans if not fan.is_dir()]
    if missing:
        yield problem(
            "permissions",
            f"{len(missing)} of the 256 folders of objects/ are missing, such as {missing[0].name}",
            f"Make them again: mkdir {missing[0]}. `mp verify` says whether anything was in them.",
            DamagedError.exit_code,
        )
    places = [layout.root, layout.objects, layout.temporary, layout.catalog, *fans]
    places += [layout.journal, *(layout.catalog / name for name in (DATA, LOCK))]
    closed = [path for path in places if path.exists() and not os.access(path, os.W_OK)]
    owners = {path.stat().st_uid for path in places if path.exists()}
    if not layout.temporary.is_dir():
        yield problem("permissions", "the folder tmp/ is missing", f"Make it again: mkdir {layout.temporary}")
    if closed:
        yield problem(
            "permissions",
            f"you may not write to {closed[0]}" + (f" and {len(closed) - 1} more" if len(closed) > 1 else ""),
            f"Reading works. To write, ask its owner, or: chown -R {os.geteuid()} {layout.root}",
        )
    elif len(owners) > 1 or os.geteuid() not in owners:
        yield warning(
            "permissions",
            f"parts of the store belong to users {', '.join(map(str, sorted(owners)))}, and you are {os.geteuid()}",
            "What you write may be closed to them. Work as one user, or give the folder a common group.",
        )
    else:
        yield well("permissions", "the store is yours, and can be written")


def _with_catalog(layout: Layout, scan_seconds: float) -> Iterator[Finding]:
    if not layout.catalog.is_dir():
        return
    try:
        catalog = open_catalog(layout.catalog)
    except MergePipeError as error:
        yield problem("catalog", f"it cannot be opened: {error.message}", _recovery(error), error.exit_code)
        return
    try:
        catalog.check()
        yield from _catalog(catalog)
        yield from _content(layout, catalog, scan_seconds)
    except MergePipeError as error:
        yield problem("catalog", f"it cannot be read: {error.message}", _recovery(error), error.exit_code)
    finally:
        release_catalog(catalog)


def _recovery(error: MergePipeError) -> str:
    if isinstance(error, DamagedError) and "mp recover" not in (error.hint or ""):
        return "The objects are not lost: `mp recover` says what it can rebuild from them."
    return error.hint or ""


def _catalog(catalog: Catalog) -> Iterator[Finding]:
    state = catalog.state()
    size = (catalog.path / DATA).stat().st_size
    text = f"{format_size(size)}, of which {format_size(state.free_bytes)} to be used again"
    if state.free_bytes > max(size // 2, _MANY_FREE_BYTES):
        yield warning("catalog", text, "Harmless. A copy made by `mdb_copy -c` has no free pages.")
    elif size > _FULL_MAP * state.map_bytes:
        yield well("catalog", f"{text}; the map of {format_size(state.map_bytes)} will double soon, by itself")
    else:
        yield well("catalog", f"{text}; a map of {format_size(state.map_bytes)} is reserved, which takes no disk")
    if state.cleared_readers:
        yield warning(
            "readers",
            f"{state.cleared_readers} readers of the catalog had died and kept old pages; their places are free now",
            "Nothing to do, unless it happens often: then something kills mp, perhaps for want of memory.",
        )
    elif state.readers > state.most_readers * _FULL_MAP:
        yield warning("readers", f"{state.readers} of {state.most_readers} places for readers are taken", "Run fewer.")
    else:
        yield well("readers", "no dead reader holds old pages of the catalog")


@dataclass
class _Scan:
    """Object files against rows, folder by folder."""

    folders: int = 0
    objects: int = 0
    missing: int = 0
    cut: int = 0
    garbage: int = 0
    garbage_bytes: int = 0
    strange: list[str] = field(default_factory=list)


def _content(layout: Layout, catalog: Catalog, scan_seconds: float) -> Iterator[Finding]:
    if not layout.objects.is_dir():
        return
    with catalog.reading() as view:
        marked, pending = view.count("damaged"), unsettled(view)
    scan, until = _Scan(), time.monotonic() + scan_seconds
    for fan in range(256):
        if time.monotonic() > until:
            break
        with catalog.reading() as view:
            _scan_folder(layout, view, fan, pending, scan)
        scan.folders += 1
    part = "" if scan.folders == 256 else f" (looked at {scan.folders} of 256 folders in the time)"
    if marked:
        yield problem(
            "damage",
            f"{marked:,} objects are known to be damaged",
            "`mp verify` says what needs them. `mp heal --from PATH` takes them from another store or checkpoint.",
            DamagedError.exit_code,
        )
    if scan.missing or scan.cut:
        yield problem(
            "objects",
            f"{scan.missing:,} object files are missing and {scan.cut:,} have another size than they had{part}",
            "`mp heal --from PATH` takes them from another store or checkpoint; ingesting again does too.",
            DamagedError.exit_code,
        )
    elif not marked:
        yield well("objects", f"{scan.objects:,} objects have their files, of the right size{part}")
    if scan.garbage:
        yield warning(
            "garbage",
            f"{scan.garbage:,} files without a row take {format_size(scan.garbage_bytes)}: left by a crash, or just "
            "being written",
            "Harmless. `mp gc` removes old ones.",
        )
    if scan.strange:
        names = f"{len(scan.strange)} things in objects/ are no object files, such as {scan.strange[0]}"
        yield warning("objects", names, "Nothing uses them. Look at what they are before you remove them.")
    if pending:
        yield warning("repack", f"a repack is at work, or was stopped, at {len(pending)} objects", "Run `mp repack`.")


def _scan_folder(layout: Layout, view: Reading, fan: int, pending: set[Digest], scan: _Scan) -> None:
    folder = layout.objects / f"{fan:02x}"
    files: dict[str, int] = {}
    if folder.exists() and not folder.is_dir():
        scan.strange.append(folder.name)
    for entry in _entries(folder):
        if len(entry.name) == 62 and set(entry.name) <= _HEX and entry.is_file(follow_symlinks=False):
            files[folder.name + entry.name] = entry.stat(follow_symlinks=False).st_size
        else:
            scan.strange.append(f"{folder.name}/{entry.name}")
    for key, value in view.items("objects", bytes([fan])):
        scan.objects += 1
        size = files.pop(key.hex(), None)
        if size is None:
            scan.missing += 1
        elif Digest(key) not in pending and size != _stored_bytes(value):
            scan.cut += 1
    scan.garbage += len(files)
    scan.garbage_bytes += sum(files.values())


def _entries(folder: Path) -> Sequence[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise EnvironmentalError(f"{folder} cannot be read: {error.strerror}") from error


def _stored_bytes(row: bytes) -> int | None:
    try:
        return unpack_object_row(row).stored_bytes
    except Exception:  # whatever its bytes are: a row that cannot be read agrees with no file
        return None
