"""``mp gc``: remove what nothing needs any more.

*Kept* are: every commit that a ref points at, or pointed at within the grace period, or that somebody alive is reading;
all commits that these were made from; everything that their trees, files and plans name; the base blocks of deltas
among it; whatever is younger than the grace period (a writer touches what it relies on when it publishes); and what a
writer that is still at work relies on. A lease that cannot be judged counts as alive.

*Removed* is the rest: first its rows, in one write transaction, and only if no commit and no ref came or went since the
marking (else it is marked again, in the end while all writers wait); then its files, under the write lock and only
where there is still no row. Rows of results, statistics and previews go with the blocks that they are about; the cache
of results keeps nothing alive. Files without a row, and unfinished ones, that are older than the grace period, left by
a crash, go as well. A collection that dies at any point leaves such files at most, and the next one removes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mergepipe.store.canonical import load_strict
from mergepipe.store.catalog import ObjectRow, Reading, Writing
from mergepipe.store.digest import DIGEST_BYTES, Digest
from mergepipe.store.errors import BadInputError, DamagedError, NotFoundError, UsageError
from mergepipe.store.filesystem import explain_os_error
from mergepipe.store.frame import Kind
from mergepipe.store.gc_files import remove_files, remove_unfinished_files, stray_files, unfinished_files
from mergepipe.store.history import reflog
from mergepipe.store.leases import living_leases, remove_abandoned
from mergepipe.store.refs import all_refs, known_lost, load_commit
from mergepipe.store.usage import object_ids

if TYPE_CHECKING:
    from mergepipe.store.store import Store

DEFAULT_GRACE_SECONDS: Final = 14 * 86400
_PATIENT_TRIES: Final = 4
_PATIENT_LOOKS: Final = 20


@dataclass(frozen=True, slots=True)
class Collection:
    """What goes, or went. ``objects`` and ``bytes``: those with rows, by kind; ``stray``: files without a row.

    ``rows``: of results, statistics and previews that were about them. ``kept_young``: objects and bytes that nothing
    needs and that are too young.
    """

    commits: int
    objects: dict[str, int]
    bytes: dict[str, int]
    rows: int
    stray_files: int
    stray_bytes: int
    kept_young: int
    kept_young_bytes: int

    @property
    def freed_bytes(self) -> int:
        """Of files, all together."""
        return sum(self.bytes.values()) + self.stray_bytes


@dataclass
class _Marked:
    """What is needed: commits, objects, tensor ids (with those of their inputs), and the state it was found in."""

    commits: set[Digest] = field(default_factory=set)
    objects: set[Digest] = field(default_factory=set)
    tensors: set[Digest] = field(default_factory=set)
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class _Dead:
    """What goes: commits, objects with their rows, and rows by database; and what is only too young to go."""

    commits: set[Digest]
    objects: dict[Digest, ObjectRow]
    rows: list[tuple[str, bytes]]
    young: dict[Digest, ObjectRow]


def collect(store: Store, *, apply: bool = False, grace_seconds: float = DEFAULT_GRACE_SECONDS) -> Collection:
    """Remove what nothing needs; without ``apply``, only say what that would be.

    Raises:
        DamagedError: the catalog cannot be read, or a commit that is needed, so nobody knows what it needs.
        EnvironmentalError: the store cannot be written, or leases in it cannot be read.
    """
    try:
        return _collect(store, apply, grace_seconds)
    except OSError as error:
        raise explain_os_error(error, "looking for what nothing needs") from error


def _collect(store: Store, apply: bool, grace_seconds: float) -> Collection:
    store.catalog.check()
    limit = int(time.time() - grace_seconds) + 1  # in whole seconds, as ages are kept: without grace, all is old
    if apply:
        remove_abandoned(store.layout.temporary)
    removed, tries = None, 0
    while removed is None:
        tries += 1
        before = _state_of(store)
        try:
            marked = _mark(store, limit)
        except (DamagedError, NotFoundError):
            if _state_of(store) != before:
                continue  # another collection took a commit that this one was reading
            raise
        if not apply:
            with store.catalog.reading() as view:
                if _state(view) != marked.state and tries < _PATIENT_LOOKS:
                    continue
                dead = _dead(view, marked, _relied_on(store), limit)
            return _report(dead, {**stray_files(store, limit), **unfinished_files(store, limit)})
        removal = partial(_remove_rows, store, marked, _relied_on(store), limit, patient=tries < _PATIENT_TRIES)
        removed = store.catalog.write(removal)
    remove_files(store, [Path(store.layout.object_path(digest)) for digest in removed.objects])
    found = stray_files(store, limit)
    stray = {path: found[path] for path in remove_files(store, list(found))}
    unfinished = store.catalog.write(lambda _: remove_unfinished_files(store, limit))
    return _report(removed, {**stray, **unfinished})


def _remove_rows(
    store: Store, marked: _Marked, relied: set[Digest], limit: int, view: Writing, *, patient: bool
) -> _Dead | None:
    """Remove the rows of what is dead; None where it must be marked again, for something changed meanwhile.

    Where others commit all the time that would never end. So who is no longer ``patient`` marks here, under the write
    lock, and they wait.
    """
    if _state(view) != marked.state:
        if patient:
            return None
        marked = _mark(store, limit)
    dead = _dead(view, marked, relied | _relied_on(store), limit)
    if any(not lease.pinned.isdisjoint(dead.commits) for lease in living_leases(store.layout.temporary)):
        return None  # somebody began to read one of them
    for commit in dead.commits:
        view.delete("commits", commit)
    for digest in dead.objects:
        view.delete("objects", digest)
        view.delete("damaged", digest)
    for database, key in dead.rows:
        view.delete(database, key)
    return dead


def _state_of(store: Store) -> bytes:
    with store.catalog.reading() as view:
        return _state(view)


def _mark(store: Store, limit: int) -> _Marked:
    """Everything that is needed, from the refs on."""
    found = _Marked()
    with store.catalog.reading() as view:
        found.state = _state(view)
        waiting, lost = list(_roots(store, view, limit)), known_lost(view)
        while waiting:
            digest = waiting.pop()
            if digest in found.commits or (digest in lost and view.get("commits", digest) is None):
                continue
            try:
                commit = load_commit(view, digest)
            except NotFoundError as error:
                raise DamagedError(
                    f"commit {digest.short} is not there, and what it needs is not known",
                    hint="`mp verify` says what leads to it, and `mp heal --from STORE` can bring it back.",
                ) from error
            found.commits.add(digest)
            waiting += [parent.commit for parent in commit.parents]
            if commit.plan is not None:
                waiting += [onto for onto in _named_in_plan(store, commit.plan) if view.get("commits", onto)]
    for digest in found.commits:
        snapshot = store.snapshot_of(digest)
        found.objects |= object_ids(snapshot)
        found.tensors |= {entry.id for entry in snapshot.tensors.values()}
    with store.catalog.reading() as view:
        rows = [view.object_row(digest) for digest in found.objects]
        found.objects |= {row.base for row in rows if row is not None and row.base is not None}
    return found


def _roots(store: Store, view: Reading, limit: int) -> Iterator[Digest]:
    """Commits that are needed by themselves."""
    for ref in all_refs(view):
        yield ref.commit
    recent: set[Digest] = set()
    for move in reflog(view):
        if _unix_time(move.time) >= limit:
            recent.update(commit for commit in (move.old, move.new) if commit is not None)
    for lease in living_leases(store.layout.temporary):
        recent.update(lease.pinned)
    recent.update(Digest(key) for key, _ in view.items("commits") if _is_young(view, Digest(key), limit))
    for commit in recent:
        if view.get("commits", commit) is not None:  # else it went in an earlier collection
            yield commit


def _is_young(view: Reading, commit: Digest, limit: int) -> bool:
    row = view.object_row(commit)
    return row is not None and row.touched >= limit


def _unix_time(text: str) -> float:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return time.time()  # what cannot be read is kept


def _named_in_plan(store: Store, plan: Digest) -> list[Digest]:
    """Commits that a plan names beside its inputs, which are parents: the models that adapters go onto.

    Raises:
        DamagedError: it cannot be read, so nobody knows.
    """
    try:
        value: Any = load_strict(store.reader.read_record(Kind.PLAN, plan), f"plan {plan.short}")
        inputs = [value["base"], *value["experts"]]
        return [Digest.parse(item["onto"]) for item in inputs if item.get("onto")]
    except (BadInputError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(
            f"plan {plan.short} cannot be read, and what it needs is not known", hint="`mp verify` says more."
        ) from error


def _state(view: Reading) -> bytes:
    """Changes where a commit or a ref comes or goes."""
    from blake3 import blake3

    hasher = blake3()
    for database in ("commits", "refs"):
        for key, value in view.items(database):
            hasher.update(len(key).to_bytes(4, "little") + key)
            if database == "refs":
                hasher.update(value)
    return hasher.digest()


def _relied_on(store: Store) -> set[Digest]:
    """Objects that writers at work rely on, whether anything else needs them or not."""
    found: set[Digest] = set()
    for lease in living_leases(store.layout.temporary):
        found |= lease.relied_on()
    return found


def _dead(view: Reading, marked: _Marked, relied: AbstractSet[Digest], limit: int) -> _Dead:
    commits = {Digest(key) for key, _ in view.items("commits") if key not in marked.commits}
    dead: dict[Digest, ObjectRow] = {}
    young: dict[Digest, ObjectRow] = {}
    bases: set[Digest] = set()
    previews = _needed_previews(view, marked.objects)
    for key, _ in view.items("objects"):
        digest = Digest(key)
        row = view.object_row(digest)
        if row is None:
            continue
        stays = digest in marked.objects or digest in relied or digest in previews
        if not stays:
            (young if row.touched >= limit else dead)[digest] = row
        if row.base is not None and (stays or row.touched >= limit):
            bases.add(row.base)  # also where another encoding came after the marking
    for base in bases & dead.keys():
        young[base] = dead.pop(base)
    rows = [
        ("children", key)
        for key, _ in view.items("children")
        if key[:DIGEST_BYTES] in commits or key[DIGEST_BYTES:] in commits
    ]
    rows += [("results", key) for key, value in view.items("results") if _is_gone(view, value, dead, commits)]
    for database in ("deltas", "previews"):
        for key, value in view.items(database):
            parts = [key[:DIGEST_BYTES], key[DIGEST_BYTES : 2 * DIGEST_BYTES]]
            parts += [value[:DIGEST_BYTES]] if database == "previews" else []
            if any(part in dead for part in parts):
                rows.append((database, key))
    rows += [("tensors", key) for key, _ in view.items("tensors") if _is_pair_of_others(key, marked)]
    return _Dead(commits, dead, rows, young)


def _is_gone(view: Reading, value: bytes, dead: dict[Digest, ObjectRow], commits: set[Digest]) -> bool:
    """Whether what a recipe led to, a block or a commit, is not there, or will not be."""
    if value in dead or value in commits:
        return True
    return view.get("objects", value) is None and view.get("commits", value) is None


def _is_pair_of_others(key: bytes, marked: _Marked) -> bool:
    """Whether a row is about a pair of tensors of which no model that is kept has one."""
    if len(key) != 2 * DIGEST_BYTES:
        return False
    return key[:DIGEST_BYTES] not in marked.tensors and key[DIGEST_BYTES:] not in marked.tensors


def _needed_previews(view: Reading, objects: AbstractSet[Digest]) -> set[Digest]:
    """The previews of pairs of blocks that are both needed."""
    return {
        Digest(value[:DIGEST_BYTES])
        for key, value in view.items("previews")
        if value and key[:DIGEST_BYTES] in objects and key[DIGEST_BYTES : 2 * DIGEST_BYTES] in objects
    }


def _report(dead: _Dead, stray: dict[Path, int]) -> Collection:
    objects: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for row in dead.objects.values():
        kind = row.kind.name.lower()
        objects[kind] = objects.get(kind, 0) + 1
        sizes[kind] = sizes.get(kind, 0) + row.stored_bytes
    return Collection(
        commits=len(dead.commits),
        objects=objects,
        bytes=sizes,
        rows=len(dead.rows),
        stray_files=len(stray),
        stray_bytes=sum(stray.values()),
        kept_young=len(dead.young),
        kept_young_bytes=sum(row.stored_bytes for row in dead.young.values()),
    )


def parse_age(text: str) -> float:
    """Seconds from ``14d``, ``12h``, ``30m``, ``0``; raises UsageError."""
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    unit = units.get(text[-1:], 0.0)
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9 or (not unit and value):
        raise UsageError(f"{text!r} is not an age", hint="Write a number and d, h or m, as in 14d; or 0.")
    return value
