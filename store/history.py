"""Looking back: commits newest first, who stands on whom, which refs point where, and how refs moved.

Everything here reads the catalog alone, inside one read transaction of the caller's, and no more of it than is asked
for: the twenty newest commits of a long history cost twenty rows, and those of their parents.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from mergepipe.store.canonical import load_strict
from mergepipe.store.catalog import Reading
from mergepipe.store.commits import Commit
from mergepipe.store.digest import DIGEST_BYTES, Digest
from mergepipe.store.errors import BadInputError, DamagedError
from mergepipe.store.refs import Ref, all_refs, load_commit

_SHORTEST: Final = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A commit with its id."""

    id: Digest
    commit: Commit


@dataclass(frozen=True, slots=True)
class Move:
    """One line of a ref's log. ``ago``: 0 for its last move, as in ``ref@{0}``; None for ``new``: it was removed."""

    ref: str
    ago: int
    old: Digest | None
    new: Digest | None
    reason: str
    author: str
    time: str


def walk(view: Reading, starts: Iterable[Digest], limit: int | None = None) -> Iterator[Entry]:
    """Commits that can be reached from ``starts``, each once, children before their parents, else newest first.

    A parent whose clock ran ahead counts as no newer than the child that led to it. Reads only as far as the
    caller does. ``limit`` None means all.
    """
    waiting: list[tuple[int, int, Digest, Commit]] = []
    seen: set[Digest] = set()

    def meet(digest: Digest, older_than: int | None) -> None:
        if digest not in seen:
            seen.add(digest)
            commit = load_commit(view, digest)
            age = -_microseconds(commit.time)
            heapq.heappush(waiting, (age if older_than is None else max(age, older_than), len(seen), digest, commit))

    for start in starts:
        meet(start, None)
    given = 0
    while waiting and (limit is None or given < limit):
        age, _, digest, commit = heapq.heappop(waiting)
        yield Entry(digest, commit)
        given += 1
        for parent in commit.parents:
            meet(parent.commit, age)


def _microseconds(time: str) -> int:
    """Since 1970; 0 for a text that is no time."""
    try:
        return int(datetime.fromisoformat(time).timestamp() * 1e6)
    except (ValueError, OverflowError):
        return 0


def children(view: Reading, commit: Digest) -> list[tuple[Digest, str]]:
    """The commits made from this one, each with the role that this one had in it."""
    return [(Digest(key[DIGEST_BYTES:]), value.decode()) for key, value in view.items("children", commit)]


def refs_by_commit(view: Reading) -> Mapping[Digest, list[Ref]]:
    """For each commit that refs point at, those refs by name."""
    found: dict[Digest, list[Ref]] = {}
    for ref in all_refs(view):
        found.setdefault(ref.commit, []).append(ref)
    return found


def reflog(view: Reading, ref: str | None = None) -> list[Move]:
    """How a ref moved, or how all did, the last move first; also those of refs that were removed."""
    moves: list[Move] = []
    ago: dict[str, int] = {}
    prefix = ref.encode() + b"\0" if ref is not None else b""
    for key, value in view.items("reflog", prefix, reverse=True):
        name = key[:-9].decode(errors="replace")
        ago[name] = ago.get(name, -1) + 1
        moves.append(_move(name, ago[name], value))
    return sorted(moves, key=lambda move: move.time, reverse=True) if ref is None else moves


def _move(name: str, ago: int, data: bytes) -> Move:
    try:
        value = load_strict(data, f"a row of the log of {name!r}")
        old, new = (Digest.parse(text) if text is not None else None for text in (value["old"], value["new"]))
        return Move(name, ago, old, new, str(value["reason"]), str(value["author"]), str(value["time"]))
    except (BadInputError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"a row of the log of ref {name!r} cannot be read ({error})") from error


def short_length(view: Reading, commits: Iterable[Digest]) -> int:
    """How many digits tell each of these commits from all others in the store; eight at least, and even."""
    length = _SHORTEST
    for commit in commits:
        while length < 2 * DIGEST_BYTES and _is_shared(view, commit[: length // 2]):
            length += 2
    return length


def _is_shared(view: Reading, prefix: bytes) -> bool:
    found = view.items("commits", prefix)
    return next(found, None) is not None and next(found, None) is not None
