"""Whether refs, commits and trees lead to what is there: the part of ``mp verify`` that follows what records say."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from mergepipe.store.catalog import ObjectRow
from mergepipe.store.commits import decode_commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, DamagedError, MergePipeError
from mergepipe.store.refs import all_refs, known_lost
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.usage import object_ids

if TYPE_CHECKING:
    from mergepipe.store.store import Store

Reasons = dict[Digest, tuple[str, str]]
"""Of each damaged object its kind, and what is wrong."""


def damaged_records(store: Store, rows: Mapping[Digest, ObjectRow]) -> Reasons:
    """Refs point at commits, commits at parents and trees, trees at objects that have rows; what does not is damaged.

    Parents that a recovery did not find are no news. ``rows``: of all objects, as of a moment ago; what came or was
    collected since is no damage either.
    """
    with store.catalog.reading() as view:
        commits = [(Digest(key), value) for key, value in view.items("commits")]
        refs, lost = all_refs(view), known_lost(view)
    there = {digest for digest, _ in commits}
    reasons: Reasons = {}
    for ref in refs:
        if ref.commit not in there:
            reasons[ref.commit] = ("commit", f"ref {ref.name!r} points at a commit that is not there")
    for digest, value in commits:
        found = _of_commit(store, digest, value, rows, there | lost)
        if found and _is_there(store, "commits", digest):
            reasons.update(found)
    return reasons


def lost_record(store: Store, rows: Mapping[Digest, ObjectRow], error: DamagedError, commit: Digest) -> Reasons:
    """What cannot be read and has no row: nobody looks at it for itself."""
    lost = error.object_id
    if lost is None or lost in rows or _is_there(store, "objects", lost):
        return {}
    return {lost: ("unknown", f"commit {commit.short} needs it, and it is not there")}


def _of_commit(
    store: Store, digest: Digest, value: bytes, rows: Mapping[Digest, ObjectRow], known: AbstractSet[Digest]
) -> Reasons:
    reasons: Reasons = {}
    try:
        commit = decode_commit(value, f"commit {digest.short}")
        if commit.id != digest:
            raise BadInputError(f"the catalog's copy of commit {digest.short} is not that commit")
        for parent in commit.parents:
            if parent.commit not in known:
                reasons[parent.commit] = ("commit", f"commit {digest.short} was made from it, and it is not there")
        snapshot = Snapshot(store.reader, digest, commit)
        reasons |= _wrong_sizes(snapshot, rows)
        for needed in object_ids(snapshot):
            if needed not in rows and not _is_there(store, "objects", needed):
                reasons[needed] = ("unknown", f"commit {digest.short} needs it, and it is not there")
    except DamagedError as error:
        if isinstance(error.__cause__, BadInputError):  # what its id says, and no node: its own check finds nothing
            return reasons | {digest: ("commit", error.message)}
        return reasons | lost_record(store, rows, error, digest)  # a node that has a row is checked for itself
    except MergePipeError as error:
        return reasons | {digest: ("commit", error.message)}
    return reasons


def _wrong_sizes(snapshot: Snapshot, rows: Mapping[Digest, ObjectRow]) -> Reasons:
    """A tensor's blocks have the sizes that its shape gives them."""
    reasons: Reasons = {}
    for name, entry in snapshot.tensors.items():
        for index, block in enumerate(entry.blocks):
            row, size = rows.get(block), entry.block_span(index)[1]
            if row is not None and row.raw_bytes != size:
                reason = f"tensor {name!r} needs {size} bytes as block {index}, and {block.short} has {row.raw_bytes}"
                reasons[snapshot.commit_id] = ("commit", reason)
    return reasons


def _is_there(store: Store, database: str, digest: Digest) -> bool:
    with store.catalog.reading() as view:
        return view.get(database, digest) is not None
