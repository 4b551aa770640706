"""Where refs were, as far as anything still says it: the journal, else the old catalog, else the commits themselves.

The journal is asked first, for it goes on where a copy of the catalog is old. The old catalog is believed where there
is no journal, or where its own record shows that refs moved without one. Of both, only refs to commits that are there
are taken. Commits that nothing leads to, and that neither ever named, get refs ``recovered/ID``; what a log names was
let go on purpose, and stays in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from mergepipe.store.commits import Commit, default_author, timestamp_now
from mergepipe.store.digest import DIGEST_BYTES, Digest
from mergepipe.store.errors import DamagedError
from mergepipe.store.journal import MOVE, NOW, PAST, Entry, Journal, is_ref_name, moved_alone, past_move
from mergepipe.store.lmdb_file import Rows
from mergepipe.store.refs import Ref, decode_ref, encode_ref

JOURNAL: Final = "journal"
CATALOG: Final = "catalog"
COMMITS: Final = "commits"
_PREFIX: Final = "recovered/"


@dataclass
class Restored:
    """Refs and their logs. ``source``: JOURNAL, CATALOG or COMMITS.

    ``lost``: where refs should be and cannot, for that commit is not there. ``made``: refs to commits that nothing led
    to. ``unfinished``: commits that were never published whole. ``named``: all commits that the source names.
    """

    source: str = COMMITS
    refs: dict[str, Ref] = field(default_factory=dict)
    log: dict[str, list[Entry]] = field(default_factory=dict)
    lost: dict[str, Digest] = field(default_factory=dict)
    made: list[Ref] = field(default_factory=list)
    unfinished: list[Digest] = field(default_factory=list)
    named: set[Digest] = field(default_factory=set)

    def rows(self) -> tuple[Rows, Rows]:
        """The rows of ``refs`` and ``reflog``."""
        logs = {
            name.encode() + b"\0" + number.to_bytes(8, "big"): entry.log_row()
            for name, entries in self.log.items()
            for number, entry in enumerate(entries)
        }
        return {name.encode(): encode_ref(ref) for name, ref in self.refs.items()}, logs


def restore(
    journal: Journal | None,
    old: Mapping[str, Rows] | None,
    commits: Mapping[Digest, Commit],
    is_whole: Callable[[Digest], bool],
) -> Restored:
    """Refs for these commits. ``old``: the old catalog's rows, None where it cannot be read.

    Commits that are not whole, and that neither the journal nor the catalog names, are what a crash left.
    """
    restored = _choose(journal, old, commits)
    restored.named |= {Digest(key) for key in (old or {}).get("commits", {}) if len(key) == DIGEST_BYTES}
    reached = _reachable(commits, [*(ref.commit for ref in restored.refs.values()), *restored.named])
    rest = commits.keys() - reached
    if restored.source != COMMITS and (journal is None or not journal.unreadable):
        restored.unfinished = sorted(digest for digest in rest if not is_whole(digest))
        rest -= set(restored.unfinished)
    parents = {parent.commit for digest in rest for parent in commits[digest].parents}
    for digest in sorted(rest - parents, key=lambda digest: (commits[digest].time, digest)):
        ref = Ref(_free_name(restored.refs, digest), digest, "branch")
        restored.refs[ref.name] = ref
        restored.made.append(ref)
        _log(restored, ref.name, None, digest, "nothing led to it")
    return restored


def _choose(journal: Journal | None, old: Mapping[str, Rows] | None, commits: Mapping[Digest, Commit]) -> Restored:
    catalog = from_catalog(old, commits) if old is not None else Restored()
    if journal is None or not journal.entries:
        return catalog if catalog.refs or catalog.log else Restored()
    if old is not None and moved_alone(old) and not catalog.lost:
        return catalog
    return from_journal(journal, commits)


def from_journal(journal: Journal, commits: Mapping[Digest, Commit]) -> Restored:
    """What a journal says, line by line."""
    restored = Restored(JOURNAL)
    for entry in journal.entries:
        restored.named |= {digest for digest in (entry.old, entry.new) if digest is not None}
        if entry.event in (MOVE, PAST):
            restored.log.setdefault(entry.name, []).append(entry)
        if entry.event not in (MOVE, NOW):
            continue
        restored.lost.pop(entry.name, None)
        if entry.new is None:
            restored.refs.pop(entry.name, None)
        elif entry.new in commits:
            restored.refs[entry.name] = Ref(entry.name, entry.new, entry.kind)
        else:
            restored.lost[entry.name] = entry.new
    for name in restored.lost:
        _fall_back(restored, name)
    _forget_strangers(restored, commits)
    return restored


def from_catalog(old: Mapping[str, Rows], commits: Mapping[Digest, Commit]) -> Restored:
    """What the rows of a catalog say."""
    restored = Restored(CATALOG)
    for key, value in sorted(old.get("reflog", {}).items()):
        entry = past_move(key, value)
        if entry is not None and is_ref_name(entry.name):
            restored.log.setdefault(entry.name, []).append(entry)
            restored.named |= {digest for digest in (entry.old, entry.new) if digest is not None}
    for value in old.get("refs", {}).values():
        try:
            ref = decode_ref(value)
        except DamagedError:
            continue
        if not is_ref_name(ref.name) or ref.kind not in ("branch", "tag"):
            continue
        if ref.commit in commits:
            restored.refs[ref.name] = ref
        else:
            restored.lost[ref.name] = ref.commit
            _fall_back(restored, ref.name)
    _forget_strangers(restored, commits)
    return restored


def _forget_strangers(restored: Restored, commits: Mapping[Digest, Commit]) -> None:
    """Names of another store's: no commit of their log is here, and either the ref should be, or no log has any.

    A ref that was removed, and whose commits were collected since, keeps its log.
    """
    foreign = bool(commits) and restored.named.isdisjoint(commits)
    for name, entries in list(restored.log.items()):
        if not foreign and name not in restored.lost:
            continue
        if not any(digest in commits for entry in entries for digest in (entry.old, entry.new)):
            del restored.log[name]


def _fall_back(restored: Restored, name: str) -> None:
    """The commit that a ref was moved to is not there: it is where it was before, and its log says so."""
    before = restored.refs.get(name)
    _log(restored, name, restored.lost[name], before.commit if before else None, "its commit is gone")


def _log(restored: Restored, name: str, old: Digest | None, new: Digest | None, why: str) -> None:
    entry = Entry(PAST, name, "branch", old, new, f"recover: {why}", default_author(), timestamp_now())
    restored.log.setdefault(name, []).append(entry)


def _free_name(refs: Mapping[str, Ref], digest: Digest) -> str:
    for digits in range(len(digest.short), 2 * len(digest) + 1):
        name = _PREFIX + digest.hex()[:digits]
        if name not in refs:
            return name
    raise AssertionError("more refs than ids")


def _reachable(commits: Mapping[Digest, Commit], starts: Iterable[Digest]) -> set[Digest]:
    """These commits and all that they were made from, as far as they are there."""
    found: set[Digest] = set()
    waiting = [digest for digest in starts if digest in commits]
    while waiting:
        digest = waiting.pop()
        if digest not in found:
            found.add(digest)
            waiting += (parent.commit for parent in commits[digest].parents if parent.commit in commits)
    return found
