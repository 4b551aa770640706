"""The catalog: an LMDB environment of small rows, and the only module that talks to LMDB.

An object exists if and only if ``objects`` has its row. Everything but the refs can be rebuilt from the objects.
Rows of fixed layout are described in ``docs/format.md``; variable ones are canonical JSON. ``mp recover`` makes a new
one (:mod:`mergepipe.store.recover`), and may put it in the place of the old one while somebody waits to open that.

One environment a process and path (LMDB's own rule), shared by all stores opened on it; never used across a fork.
Transactions are short: nothing here stays open while weights are read.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import lmdb

from mergepipe.store.digest import DIGEST_BYTES, Digest
from mergepipe.store.errors import ConflictError, DamagedError, EnvironmentalError
from mergepipe.store.filesystem import explain_os_error, refuse_network_filesystem, will_need
from mergepipe.store.frame import Encoding, Kind
from mergepipe.store.lmdb_file import check_pages, why_unsafe

Result = TypeVar("Result")
Databases: TypeAlias = dict[str, Any]
DATABASES: Final = (
    "objects", "deltas", "tensors", "commits", "children", "refs", "reflog", "results", "meta", "damaged",
    "previews",
)  # fmt: skip
_KEY_BYTES: Final = {
    "objects": DIGEST_BYTES, "commits": DIGEST_BYTES, "damaged": DIGEST_BYTES,
    "children": 2 * DIGEST_BYTES, "previews": 2 * DIGEST_BYTES + 1,
}  # fmt: skip
_LATER: Final = ("previews",)  # databases that the first stores did not have
DATA: Final = "data.mdb"
LOCK: Final = "lock.mdb"
_RECOVER: Final = "The objects are not lost, keep the folder: `mp recover` says what it can rebuild from them."
_ENGINE: Final = 0  # LMDB 0.9's file format; 1.0's differs, and only one of them can open a file
_MAP_BYTES: Final = 64 << 30  # reserved address space, not disk
_NEARLY_FULL_BYTES: Final = 1 << 20
_READ_AHEAD_BYTES: Final = 512 << 20
_OBJECT_ROW = struct.Struct("<BBBB4xQQQ32s")
_NO_BASE: Final = bytes(DIGEST_BYTES)
_READER: Final = re.compile(r"^ *\d+ ", re.MULTILINE)  # a line of LMDB's list, which has those that are reading now


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """What the catalog knows of one object. Sizes in bytes; ``touched`` is when it was last relied on (Unix time)."""

    kind: Kind
    encoding: Encoding
    width: int
    raw_bytes: int
    stored_bytes: int
    touched: int
    base: Digest | None = None

    def pack(self) -> bytes:
        return _OBJECT_ROW.pack(
            self.kind, self.encoding, self.width, 0,
            self.raw_bytes, self.stored_bytes, self.touched, self.base or _NO_BASE,
        )  # fmt: skip


def unpack_object_row(data: bytes) -> ObjectRow:
    """Inverse of :meth:`ObjectRow.pack`; raises ValueError or struct.error on other bytes."""
    kind, encoding, width, _, raw, stored, touched, base = _OBJECT_ROW.unpack(data)
    return ObjectRow(
        Kind(kind),
        Encoding(encoding),
        width,
        raw,
        stored,
        touched,
        None if base == _NO_BASE else Digest(base),
    )


@dataclass(frozen=True, slots=True)
class CatalogState:
    """What LMDB says of itself. Sizes in bytes: of the reserved map, of pages with content, of pages to be used again.

    ``cleared_readers``: places of readers that had died, which are free now.
    """

    map_bytes: int
    used_bytes: int
    free_bytes: int
    most_readers: int
    readers: int
    cleared_readers: int


class Catalog:
    """One open LMDB environment."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        refuse_network_filesystem(path)
        if not create and not _has_content(path / DATA):
            raise DamagedError(f"the catalog in {path} is lost: there is no {DATA}, or nothing in it", hint=_RECOVER)
        if _has_content(path / DATA):
            _refuse_broken(path)
        self.path = path
        self.journal: Path | None = None
        """Where moves of refs are written down as well; whoever opens the store says it."""
        self._pid = os.getpid()
        self.read_only = not os.access(path, os.W_OK)
        try:
            self._env = self._open_environment()
            self._databases: Databases = {name: self._open_database(name) for name in DATABASES}
        except lmdb.Error as error:
            raise _explain(error, path) from error

    def _open_environment(self) -> lmdb.Environment:
        """LMDB opens its lock file first, waits there if need be, and then opens the data file by its name.

        Where another catalog has taken the place meanwhile, the two are not of one pair: both are opened anew.
        """
        while True:
            before = _lock_file(self.path)
            try:
                environment = lmdb.open(
                    str(self.path),
                    map_size=_MAP_BYTES,
                    max_dbs=len(DATABASES) + 7,
                    max_readers=512,
                    readonly=self.read_only,
                    lock=not self.read_only,
                    create=not self.read_only,
                    lib_version=_ENGINE,
                )
            except lmdb.Error:
                if before is None or before == _lock_file(self.path):
                    raise
                continue
            if self.read_only or (before is not None and before == _lock_file(self.path)):
                return environment
            environment.close()

    def _open_database(self, name: str) -> Any:
        """A database's handle; None where a store that cannot be written was made before there was this one."""
        try:
            return self._env.open_db(name.encode(), create=not self.read_only)
        except lmdb.NotFoundError:
            if name not in _LATER:
                raise
            return None

    def read_ahead(self) -> None:
        """Have the system read the catalog, before many large rows are wanted, if it is small enough; never fails."""
        with suppress(OSError):
            if (self.path / DATA).stat().st_size <= _READ_AHEAD_BYTES:
                will_need(str(self.path / DATA), 0)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """A short read transaction: one consistent view."""
        self._same_process()
        try:
            with self._begin(write=False) as transaction:
                yield Reading(transaction, self._databases)
        except lmdb.Error as error:
            raise _explain(error, self.path) from error

    def write(self, change: Callable[[Writing], Result]) -> Result:
        """Run ``change`` in one durable write transaction; all of it happens or none.

        ``change`` runs again from the start where the map had to grow, so it must not mind that.
        """
        self._same_process()
        if self.read_only:
            raise EnvironmentalError(
                f"the store is on a read-only filesystem ({self.path})",
                hint="Copy it to where you may write.",
            )
        while True:
            try:
                with self._begin(write=True) as transaction:
                    return change(Writing(transaction, self._databases))
            except lmdb.MapFullError:
                self._env.set_mapsize(self._env.info()["map_size"] * 2)
            except lmdb.Error as error:
                raise _explain(error, self.path) from error

    def _begin(self, *, write: bool) -> lmdb.Transaction:
        try:
            return self._env.begin(write=write)
        except lmdb.MapResizedError:  # another process grew the map
            self._env.set_mapsize(0)
            return self._env.begin(write=write)
        except lmdb.ReadersFullError:  # processes that died in a transaction still have their places
            self._env.reader_check()
            return self._env.begin(write=write)

    def state(self) -> CatalogState:
        """Sizes, and readers; those that died are cleared, which any writer may do at any time."""
        self._same_process()
        try:
            cleared = 0 if self.read_only else self._env.reader_check()
            info, main = self._env.info(), self._env.stat()
            with self._begin(write=False) as transaction:
                stats = [main, *(transaction.stat(db=db) for db in self._databases.values() if db is not None)]
        except lmdb.Error as error:
            raise _explain(error, self.path) from error
        pages = sum(each["branch_pages"] + each["leaf_pages"] + each["overflow_pages"] for each in stats)
        page = main["psize"]
        used = (pages + 2) * page  # and the two meta pages
        return CatalogState(
            info["map_size"], used, max((info["last_pgno"] + 1) * page - used, 0), info["max_readers"],
            len(_READER.findall(self._env.readers())), cleared,
        )  # fmt: skip

    def check(self) -> None:
        """Look at all of the file without LMDB, which would end the process where a page is noise. Raises DamagedError.

        Meanwhile a transaction holds what there is: else pages may be used again while they are looked at.
        """
        with self.reading():
            check_pages(self.path / DATA)

    def _same_process(self) -> None:
        if os.getpid() != self._pid:
            raise _forked(self.path)

    def close(self) -> None:
        self._env.close()


class Reading:
    """A view of all databases inside one transaction."""

    def __init__(self, transaction: lmdb.Transaction, databases: Databases) -> None:
        self._transaction = transaction
        self._databases = databases

    def get(self, database: str, key: bytes) -> bytes | None:
        if self._databases[database] is None:
            return None
        value: Any = self._transaction.get(key, db=self._databases[database])
        found: bytes | None = value  # a memoryview only where buffers were asked for
        return found

    def items(self, database: str, prefix: bytes = b"", *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """All rows whose key begins with ``prefix``, in key order."""
        if self._databases[database] is None:
            return
        cursor: Any = self._transaction.cursor(db=self._databases[database])
        if reverse:
            # The key after the last one with this prefix: step back from there.
            found = cursor.set_range(prefix + b"\xff" * 16)
            found = cursor.prev() if found else cursor.last()
        else:
            found = cursor.set_range(prefix)
        while found:
            key, value = cursor.item()
            if not key.startswith(prefix):
                return
            if len(key) != _KEY_BYTES.get(database, len(key)):
                raise DamagedError(f"the catalog has a row in {database} whose key is not one", hint=_RECOVER)
            yield key, value
            found = cursor.prev() if reverse else cursor.next()

    def count(self, database: str) -> int:
        """Rows of a database."""
        if self._databases[database] is None:
            return 0
        entries: int = self._transaction.stat(db=self._databases[database])["entries"]
        return entries

    def object_row(self, digest: Digest) -> ObjectRow | None:
        """The row of an object, or None where it does not exist."""
        data = self.get("objects", digest)
        try:
            return None if data is None else unpack_object_row(data)
        except (ValueError, struct.error) as error:
            raise DamagedError(
                f"the catalog's row for object {digest.short} cannot be read", hint="Run `mp verify`."
            ) from error


class Writing(Reading):
    """The same, with changes."""

    def put(self, database: str, key: bytes, value: bytes) -> None:
        self._transaction.put(key, value, db=self._databases[database])

    def delete(self, database: str, key: bytes) -> bool:
        done: bool = self._transaction.delete(key, db=self._databases[database])
        return done


_open: dict[str, tuple[int, int, Catalog]] = {}
_guard = threading.Lock()


def is_open_here(path: Path) -> bool:
    """Whether this process has the catalog open."""
    with _guard:
        return str(path.resolve()) in _open


def _lock_file(path: Path) -> tuple[int, int] | None:
    """Which file LMDB's lock file is; None where there is none."""
    try:
        found = (path / LOCK).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _refuse_broken(path: Path) -> None:
    """Raises DamagedError where LMDB would read beyond the end of its file, or what is no page: it ends the process."""
    reason = why_unsafe(path / DATA)
    if reason:
        raise DamagedError(reason, hint=_RECOVER)


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return False
        raise


def open_catalog(path: Path, *, create: bool = False) -> Catalog:
    """The process's catalog for a path; each call needs one :func:`release_catalog`."""
    key = str(path.resolve())
    with _guard:
        users, pid, catalog = _open.get(key, (0, 0, None))
        if catalog is not None and pid != os.getpid():
            raise _forked(path)
        if catalog is None:
            try:
                catalog, users = Catalog(path, create=create), 0
            except OSError as error:
                raise explain_os_error(error, f"opening the catalog in {path}") from error
        _open[key] = (users + 1, os.getpid(), catalog)
        return catalog


def release_catalog(catalog: Catalog) -> None:
    """Give a catalog back; the last user closes it."""
    key = str(catalog.path.resolve())
    with _guard:
        users, pid, found = _open.get(key, (0, 0, None))
        if found is not catalog:
            return
        if users > 1:
            _open[key] = (users - 1, pid, catalog)
        else:
            del _open[key]
            catalog.close()


def _forked(path: Path) -> EnvironmentalError:
    # Nor can a child open it anew: LMDB's locks belong to the process, and closing what the child inherited
    # would take the parent's readers out of the shared table.
    return EnvironmentalError(
        f"the catalog in {path} was opened before this process forked",
        hint="Close the store before forking, or start processes with multiprocessing's 'spawn' method.",
    )


def unix_time() -> int:
    """Seconds since 1970, as ``touched`` is kept."""
    return int(time.time())


def _was_short_write(text: str, path: Path) -> bool:
    """Whether the disk is full: where a write ends there half-way, LMDB says EIO."""
    if os.strerror(errno.EIO) not in text:
        return False
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize < _NEARLY_FULL_BYTES


def _explain(error: lmdb.Error, path: Path) -> Exception:
    code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = str(error)
    if isinstance(error, lmdb.DiskError) or "No space left" in text or _was_short_write(text, path):
        return explain_os_error(OSError(errno.ENOSPC, text), "writing the catalog")
    if isinstance(error, lmdb.PanicError):  # of this process alone, after a write that failed
        return EnvironmentalError(f"the catalog in {path} could not be written: {text}", hint="Run the command again.")
    if isinstance(error, (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError)):
        return DamagedError(f"the catalog in {path} is damaged: {text}", hint=_RECOVER)
    if isinstance(error, lmdb.VersionMismatchError):
        return DamagedError(f"the catalog in {path} was written by another LMDB format: {text}", hint=_RECOVER)
    if isinstance(error, lmdb.LockError):
        return ConflictError(f"the catalog in {path} is locked: {text}")
    return EnvironmentalError(f"the catalog in {path} cannot be used: {text}" + (f" ({code})" if code else ""))
