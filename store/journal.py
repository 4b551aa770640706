"""The refs' journal: a text file beside the objects that says how refs moved, for the day when the catalog is lost.

Refs and their logs are all in the catalog that cannot be told from the objects. So each publication that moves refs
appends its moves to ``refs.journal``, and flushes it, inside the write transaction and before that commits: the file's
order is that of the transactions, and a move that was acknowledged is in it. A crash before the commit leaves moves
that never happened. The catalog's row ``journal`` in ``meta`` says how long the journal was as of the last transaction;
what lies behind that is cut off by the next one. Where the two do not fit together (a store made before there was a
journal, one that an older release wrote to, one that was recovered), and where it has grown long, the whole is written
anew from the catalog, by a rename.

A line is a check (16 hexadecimal digits of BLAKE3 over the rest), a space, and canonical JSON. ``docs/format.md`` has
the fields. Reading believes nothing: a line that is not whole, or not what it should be, is left out and counted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from blake3 import blake3

from mergepipe.store.canonical import dump_canonical, load_strict
from mergepipe.store.catalog import Reading, Writing
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, DamagedError, UsageError
from mergepipe.store.filesystem import explain_os_error, write_durably
from mergepipe.store.refs import check_ref_name, decode_ref

MOVE: Final = "move"  # a ref moved
PAST: Final = "past"  # a row of the log, written again: it moves nothing
NOW: Final = "now"  # where a ref was when the journal was written anew
MOST_LINES: Final = 10_000
KEPT_MOVES: Final = 5_000
_KEY: Final = b"journal"
_CHECK_DIGITS: Final = 16
_LONGEST_LINE: Final = 1 << 20
_LONGEST_TEXT: Final = 4096
_LOG_FIELDS: Final = ("author", "reason", "time")
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no link out of the store, no waiting pipe


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. ``event``: MOVE, PAST or NOW; ``rest``: how many more lines belong to the same publication."""

    event: str
    name: str
    kind: str
    old: Digest | None
    new: Digest | None
    reason: str = ""
    author: str = ""
    time: str = ""
    rest: int = 0

    def log_row(self) -> bytes:
        """The row of the catalog's ``reflog``."""
        return dump_canonical({**_ids(self), "reason": self.reason, "author": self.author, "time": self.time})


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says. ``unreadable``: lines that are not whole, or not what they should be; ``torn``: moves at
    its end whose publication was not written whole.
    """

    entries: tuple[Entry, ...]
    unreadable: int = 0
    torn: int = 0


@dataclass(frozen=True, slots=True)
class _State:
    """The journal as of the last transaction: its length, its last line's length and check, its lines, and how many
    rows the log had. A release that knows no journal moves refs without it, and shows by the last.
    """

    size: int
    last_size: int
    check: str
    lines: int
    moves: int


def record_moves(view: Writing, path: Path, refs: Sequence[tuple[str, str]]) -> None:
    """Append one publication's moves of refs, given by name and kind; durable on return.

    Their rows in ``refs`` and ``reflog`` are put already: the journal says what the last row of each log says.

    Raises:
        EnvironmentalError: the disk is full, or the like; the journal is as it was, or what is too much is ignored.
    """
    moves = [_last_move(view, name, kind) for name, kind in refs]
    lines = [_line(move, len(moves) - 1 - index) for index, move in enumerate(moves)]
    state, logged = _state(view), view.count("reflog")
    try:
        if (
            state is not None
            and state.moves + len(moves) == logged
            and state.lines + len(moves) <= MOST_LINES
            and _append(path, state, b"".join(lines))
        ):
            _put_state(view, lines, state.size + sum(map(len, lines)), state.lines + len(lines))
        else:
            replace_journal(path, describe(view))
            return
    except OSError as error:
        raise explain_os_error(error, "writing the refs' journal") from error


def _last_move(view: Reading, name: str, kind: str) -> Entry:
    key, value = next(view.items("reflog", name.encode() + b"\0", reverse=True))
    entry = past_move(key, value)
    assert entry is not None  # it was put a moment ago
    return replace(entry, event=MOVE, kind=kind)


def _put_state(view: Writing, lines: Sequence[bytes], size: int, count: int) -> None:
    """Say in the catalog what the journal is as of this transaction."""
    last = lines[-1] if lines else b""
    row = {
        "bytes": size,
        "last": len(last),
        "check": last[:_CHECK_DIGITS].decode(),
        "lines": count,
        "moves": view.count("reflog"),
    }
    view.put("meta", _KEY, dump_canonical(row))


def describe(view: Writing) -> bytes:
    """A journal that says what the catalog says, which counts it as written. :func:`replace_journal` writes it."""
    lines = list(_present(view))
    _put_state(view, lines, sum(map(len, lines)), len(lines))
    return b"".join(lines)


def replace_journal(path: Path, data: bytes) -> None:
    """Let the journal be this, durably, or leave it as it was; raises OSError."""
    write_durably(path, data)


def moved_alone(catalog: Mapping[str, Mapping[bytes, bytes]]) -> bool:
    """Whether a catalog's refs moved without the journal after it was last written, as an older release moves them."""
    state = _parse_state(catalog.get("meta", {}).get(_KEY))
    return state is not None and state.moves != len(catalog.get("reflog", {}))


def is_ref_name(name: str) -> bool:
    """Whether a ref may have this name, or might in an earlier release."""
    try:
        return name == "auto" or bool(check_ref_name(name))
    except UsageError:
        return False


def read_journal(path: Path) -> Journal | None:
    """All that can be read of it; None where there is none."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return Journal((), 1)
        with os.fdopen(os.open(path, os.O_RDONLY | (_FLAGS & ~os.O_RDWR)), "rb") as file:
            return _parse(file)
    except FileNotFoundError:
        return None
    except OSError:
        return Journal((), 1)


def _parse(file: BinaryIO) -> Journal:
    entries: list[Entry] = []
    unreadable = whole = 0
    for line in _lines(file):
        entry = _entry(line)
        if entry is None:
            unreadable += 1
            continue
        entries.append(entry)
        if entry.rest == 0:
            whole = len(entries)
    return Journal(tuple(entries[:whole]), unreadable, len(entries) - whole)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Line after line; one that is too long counts as one and is empty."""
    while line := file.readline(_LONGEST_LINE):
        if line.endswith(b"\n") or len(line) < _LONGEST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_LONGEST_LINE)
        yield b""


def _entry(line: bytes) -> Entry | None:
    if not _is_whole(line):
        return None
    try:
        return _entry_of(load_strict(line[_CHECK_DIGITS + 1 : -1], "a line of the journal"))
    except (BadInputError, UsageError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_whole(line: bytes) -> bool:
    check, _, rest = line.partition(b" ")
    return line.endswith(b"\n") and check.decode("latin-1") == _check(rest[:-1])


def _entry_of(value: dict[str, Any]) -> Entry:
    event, name, kind, left = value["event"], value["name"], value["kind"], value.get("rest", 0)
    if event not in (MOVE, PAST, NOW) or kind not in ("branch", "tag") or type(left) is not int or left < 0:
        raise ValueError("not an event")
    if not is_ref_name(name):
        raise ValueError("not a ref's name")
    old, new = (Digest.parse(text) if text is not None else None for text in (value["old"], value["new"]))
    reason, author, time = (value[key] for key in ("reason", "author", "time"))
    if not all(isinstance(text, str) for text in (reason, author, time)):
        raise ValueError("not texts")
    return Entry(event, name, kind, old, new, reason, author, time, left)


def _line(entry: Entry, rest: int = 0) -> bytes:
    value = {
        "event": entry.event,
        "name": entry.name,
        "kind": entry.kind,
        **_ids(entry),
        "reason": entry.reason[:_LONGEST_TEXT],
        "author": entry.author[:_LONGEST_TEXT],
        "time": entry.time,
    }
    text = dump_canonical({**value, "rest": rest} if rest else value)
    return f"{_check(text)} ".encode() + text + b"\n"


def _ids(entry: Entry) -> dict[str, str | None]:
    return {"old": entry.old.hex() if entry.old else None, "new": entry.new.hex() if entry.new else None}


def _check(text: bytes) -> str:
    return blake3(text).hexdigest()[:_CHECK_DIGITS]


def _state(view: Reading) -> _State | None:
    return _parse_state(view.get("meta", _KEY))


def _parse_state(row: bytes | None) -> _State | None:
    if row is None:
        return None
    try:
        value = load_strict(row, "the journal's row")
        numbers = [value[key] for key in ("bytes", "last", "lines", "moves")]
        if not all(type(number) is int and number >= 0 for number in numbers):
            return None
        return _State(numbers[0], numbers[1], str(value["check"]), numbers[2], numbers[3])
    except (BadInputError, KeyError, TypeError):
        return None


def _append(path: Path, state: _State, data: bytes) -> bool:
    """Put lines behind those of the last transaction; False where the file is not the one that the catalog knows."""
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError:
        return False
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size < state.size or state.last_size > state.size:
            return False
        last = os.pread(descriptor, state.last_size, state.size - state.last_size)
        if last[:_CHECK_DIGITS] != state.check.encode() or (last and not _is_whole(last)):
            return False
        if found.st_size > state.size:  # of a transaction that did not commit
            os.ftruncate(descriptor, state.size)
        try:
            _write_at(descriptor, data, state.size)
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, state.size)
            raise
    finally:
        os.close(descriptor)
    return True


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        offset, rest = offset + written, rest[written:]


def _present(view: Reading) -> Iterator[bytes]:
    """The lines that say what the catalog says: the newest of the logs, then all refs."""
    rows: list[Entry] = []
    for key, value in view.items("reflog"):
        entry = past_move(key, value)
        if entry is not None:
            rows.append(entry)
    oldest = sorted(row.time for row in rows)[-KEPT_MOVES] if len(rows) > KEPT_MOVES else ""
    kept: list[Entry] = []
    ended = ""  # of each ref the last moves stay, without a gap, whatever its clock said
    for row in reversed(rows):
        if row.name != ended and row.time >= oldest:
            kept.append(row)
        else:
            ended = row.name
    for row in reversed(kept):
        yield _line(row)
    for _, value in view.items("refs"):
        try:
            ref = decode_ref(value)
        except DamagedError:
            continue  # it is not lost because of this, and `mp verify` says what is wrong
        yield _line(Entry(NOW, ref.name, ref.kind, None, ref.commit))


def past_move(key: bytes, value: bytes) -> Entry | None:
    """A row of the catalog's ``reflog`` as a line of the journal; None where it cannot be read."""
    try:
        row = load_strict(value, "a row of the log")
        old, new = (Digest.parse(text) if text is not None else None for text in (row["old"], row["new"]))
        author, reason, time = (str(row[name]) for name in _LOG_FIELDS)
        return Entry(PAST, key[:-9].decode(), "branch", old, new, reason, author, time)
    except (BadInputError, ValueError, KeyError, TypeError):
        return None
