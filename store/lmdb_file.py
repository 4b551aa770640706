"""LMDB's data file, read without LMDB: what is broken becomes an error, and not a crash.

LMDB maps its file and believes every number in it. Where the file was cut, it reads beyond the end, which ends the
process (SIGBUS); where a page is noise, anything may happen. So the catalog looks here before it opens a file, and
``mp recover`` reads what may be broken here alone. Only what the catalog uses is known: format 0.9 of 64-bit machines,
named databases without flags.

A page is 16 bytes of head (number, pad, flags, lower, upper), then u16 offsets of nodes. A node is u16 ``lo``, ``hi``,
``flags``, key size, the key, the value; in a branch the first three are the child's number.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from mergepipe.store.errors import DamagedError

Rows = dict[bytes, bytes]
Result = TypeVar("Result")
_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
_HEAD: Final = struct.Struct("=QHHHH")
_META: Final = struct.Struct("=IIQQ")  # magic, version, address, map size
_TREE: Final = struct.Struct("=IHHQQQQQ")  # pad (of the first one: the page's size), flags, depth, counts, root
_TAIL: Final = struct.Struct("=QQ")  # last page, transaction
_NODE: Final = struct.Struct("=HHHH")
_META_BYTES: Final = _HEAD.size + _META.size + 2 * _TREE.size + _TAIL.size
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG, _SUBTREE = 1, 2
_NOWHERE: Final = (1 << 64) - 1
_DEEPEST: Final = 32
_NUMBER_BYTES: Final = 8
_TRIES: Final = 20
_SMALL_BYTES: Final = 4 << 20


class _BrokenError(Exception):
    """A page is not what it should be."""


class _ChangedError(Exception):
    """Somebody wrote meanwhile, and pages are of different times."""


@dataclass(frozen=True, slots=True)
class _Meta:
    page_bytes: int
    free_root: int
    main_root: int
    last_page: int
    transaction: int


def why_unsafe(path: Path) -> str:
    """Why LMDB should not open a data file; empty where nothing speaks against it.

    Quick: of a file of more than 4 MiB it looks at the size, and at the root of each tree; a smaller one is checked
    whole, in some milliseconds. Where the last pages were freed before they were ever written, a file is shorter than
    it says and nothing is missing: then all is read.

    Raises:
        OSError: it cannot be read.
    """
    if struct.calcsize("P") != 8:
        return ""
    try:
        if path.stat().st_size <= _SMALL_BYTES:
            with suppress(_ChangedError):  # where somebody writes all the time, a look has to do
                _once(path, _File.check)
                return ""
        _undisturbed(path, _File.look)
    except DamagedError as error:
        return error.message
    return ""


def check_pages(path: Path) -> None:
    """Look at every page; raises DamagedError where LMDB could end the process. Takes a second for some 250 MB.

    Raises:
        DamagedError: some of it cannot be read.
        OSError: the system refuses.
    """
    _undisturbed(path, _File.check)


def read_databases(path: Path) -> dict[str, Rows]:
    """All rows of all named databases, in memory.

    Raises:
        DamagedError: some of it cannot be read.
        OSError: the system refuses.
    """
    return _undisturbed(path, _File.everything)


def _undisturbed(path: Path, read: Callable[[_File], Result]) -> Result:
    """What ``read`` returns. Nothing is locked: where somebody wrote meanwhile, it reads again."""
    for _ in range(_TRIES):
        with suppress(_ChangedError):
            return _once(path, read)
    raise DamagedError(f"the catalog {path} cannot be read: somebody writes to it all the time")


def _once(path: Path, read: Callable[[_File], Result]) -> Result:
    with _File(path) as file:
        try:
            return read(file)
        except (_BrokenError, struct.error) as error:
            if file.has_changed():
                raise _ChangedError from error
            raise DamagedError(f"the catalog {path} is damaged: {error}") from error


class _File:
    """An open data file as of its newest transaction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._seen: set[int] = set()
        try:
            self.meta = self._newest_meta()
            self.size = os.fstat(self._descriptor).st_size  # after the meta page: whoever writes writes that last
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def has_changed(self) -> bool:
        """Whether there was a transaction since it was opened."""
        return self._newest_meta() != self.meta

    def look(self) -> None:
        """Whether all is there, or seems to be; raises _BrokenError."""
        if self.size < (self.meta.last_page + 1) * self.meta.page_bytes:
            self.everything()
            return
        roots = [self.meta.free_root, self.meta.main_root, *(root for _, root in self.names())]
        self._seen.clear()
        for root in roots:
            if root != _NOWHERE:
                self._offsets(self._page(root, 0)[0])

    def check(self) -> None:
        """Reads all; raises _BrokenError."""
        for root in [self.meta.free_root, *(root for _, root in list(self.names()))]:
            self._check_tree(root)

    def _check_tree(self, root: int) -> None:
        """What :meth:`tree` looks at, without making anything of it, in less time. Raises _BrokenError."""
        waiting = [] if root == _NOWHERE else [(root, 0)]
        leaves = -1  # how deep they are: all the same
        while waiting:
            number, depth = waiting.pop()
            page, flags = self._page(number, depth)
            offsets = self._offsets(page)
            if len(offsets) < (2 if flags & _BRANCH and root != self.meta.free_root else 1):
                raise _BrokenError(f"page {number} has too few nodes")
            if flags & _LEAF:
                leaves = depth if leaves < 0 else leaves
                if depth != leaves:
                    raise _BrokenError(f"page {number} is not as deep as others")
            for at in offsets:
                lo, hi, node_flags, key_bytes = _NODE.unpack_from(page, at)
                begin = at + _NODE.size + key_bytes
                if flags & _BRANCH:
                    waiting.append((lo | hi << 16 | node_flags << 32, depth + 1))
                    size = 0
                elif not node_flags:
                    size = lo | hi << 16
                elif node_flags == _BIG:
                    size = _NUMBER_BYTES
                    self._overflow(page, begin, lo | hi << 16)
                else:
                    raise _BrokenError(f"page {number} has a node of another kind")
                if begin + size > len(page):
                    raise _BrokenError(f"page {number} has a node beyond its end")

    def everything(self) -> dict[str, Rows]:
        """All rows of all named databases; raises _BrokenError."""
        for _ in self.tree(self.meta.free_root):
            pass
        return {name: dict(self.tree(root)) for name, root in self.names()}

    def _newest_meta(self) -> _Meta:
        first = self._meta_at(0)
        second = self._meta_at(first.page_bytes)
        if second.page_bytes != first.page_bytes:
            raise self._no_catalog()
        return max(first, second, key=lambda meta: meta.transaction)

    def _meta_at(self, offset: int) -> _Meta:
        data = os.pread(self._descriptor, _META_BYTES, offset)
        if len(data) < _META_BYTES:
            raise self._no_catalog("it ends within its first pages")
        flags = _HEAD.unpack_from(data)[2]
        magic, version, _, _ = _META.unpack_from(data, _HEAD.size)
        free, main = (_TREE.unpack_from(data, _HEAD.size + _META.size + at * _TREE.size) for at in range(2))
        last, transaction = _TAIL.unpack_from(data, _META_BYTES - _TAIL.size)
        page_bytes = free[0]
        if magic != _MAGIC or not flags & _META_PAGE:
            raise self._no_catalog()
        if version != _VERSION:
            raise self._no_catalog(f"it is of another LMDB format ({version})")
        if page_bytes not in (1 << shift for shift in range(9, 17)) or last >= 1 << 48:
            raise self._no_catalog()
        return _Meta(page_bytes, free[7], main[7], last, transaction)

    def _no_catalog(self, why: str = "it does not begin as an LMDB file does") -> DamagedError:
        return DamagedError(f"the catalog {self._path} is damaged: {why}")

    def names(self) -> Iterator[tuple[str, int]]:
        """The named databases, each with the number of its root page."""
        for key, value in self._nodes(self.meta.main_root, wanted=_SUBTREE):
            if len(value) != _TREE.size:
                raise _BrokenError("a database's record has another size")
            _, flags, *_, root = _TREE.unpack(value)
            if not flags:  # those with flags are a later release's, and their pages may be of other kinds
                yield key.decode("latin-1"), root

    def tree(self, root: int) -> Iterator[tuple[bytes, bytes]]:
        """All rows below a root page."""
        return self._nodes(root, wanted=0)

    def _nodes(self, root: int, wanted: int) -> Iterator[tuple[bytes, bytes]]:
        waiting = [] if root == _NOWHERE else [(root, 0)]
        while waiting:
            number, depth = waiting.pop()
            page, flags = self._page(number, depth)
            children = []
            for at in self._offsets(page):
                lo, hi, node_flags, key_bytes = _NODE.unpack_from(page, at)
                begin = at + _NODE.size
                if begin + key_bytes > len(page):
                    raise _BrokenError(f"page {number} has a node beyond its end")
                if flags & _BRANCH:
                    children.append((lo | hi << 16 | node_flags << 32, depth + 1))
                elif node_flags & ~_BIG != wanted:
                    raise _BrokenError(f"page {number} has a node of another kind")
                else:
                    key, size = page[begin : begin + key_bytes], lo | hi << 16
                    yield key, self._value(page, begin + key_bytes, size, big=bool(node_flags & _BIG))
            waiting += reversed(children)

    def _page(self, number: int, depth: int) -> tuple[bytes, int]:
        """A branch or leaf page that was not met before, and its flags."""
        size = self.meta.page_bytes
        if number in self._seen or depth > _DEEPEST:
            raise _BrokenError(f"page {number} is in two places")
        self._take(number, 1)
        page = os.pread(self._descriptor, size, number * size)
        found, _, flags, _, _ = _HEAD.unpack_from(page)
        if len(page) != size or found != number or flags not in (_BRANCH, _LEAF):
            raise _BrokenError(f"page {number} is not a page of a tree")
        return page, flags

    def _take(self, number: int, count: int) -> None:
        if number < 2 or number + count > min(self.meta.last_page + 1, self.size // self.meta.page_bytes):
            raise _BrokenError(f"page {number} lies beyond the end of the file")
        self._seen.update(range(number, number + count))

    def _offsets(self, page: bytes) -> tuple[int, ...]:
        _, _, _, lower, upper = _HEAD.unpack_from(page)
        if not _HEAD.size <= lower <= upper <= len(page) or lower % 2:
            raise _BrokenError("a page's head contradicts itself")
        count = (lower - _HEAD.size) // 2
        offsets: tuple[int, ...] = struct.unpack_from(f"={count}H", page, _HEAD.size)
        if offsets and not upper <= min(offsets) <= max(offsets) <= len(page) - _NODE.size:
            raise _BrokenError("a node lies outside of its page")
        return offsets

    def _value(self, page: bytes, at: int, size: int, *, big: bool) -> bytes:
        if not big:
            if at + size > len(page):
                raise _BrokenError("a value lies outside of its page")
            return page[at : at + size]
        number = self._overflow(page, at, size)
        return os.pread(self._descriptor, _HEAD.size + size, number * self.meta.page_bytes)[_HEAD.size :]

    def _overflow(self, page: bytes, at: int, size: int) -> int:
        """The first of the pages that hold a value, whose number is in a node."""
        if at + _NUMBER_BYTES > len(page):
            raise _BrokenError("a value lies outside of its page")
        number = int.from_bytes(page[at : at + _NUMBER_BYTES], sys.byteorder)
        page_bytes = self.meta.page_bytes
        count = -(-(_HEAD.size + size) // page_bytes)
        if number in self._seen:
            raise _BrokenError(f"page {number} is in two places")
        self._take(number, count)
        found, _, flags, low, high = _HEAD.unpack(os.pread(self._descriptor, _HEAD.size, number * page_bytes))
        if found != number or not flags & _OVERFLOW or (low | high << 16 if _IS_LITTLE else high | low << 16) != count:
            raise _BrokenError(f"page {number} does not hold a value")
        return number


_IS_LITTLE: Final = sys.byteorder == "little"
assert _META_BYTES == 152
