"""Walking the history: children before parents, newest first, and no further than asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergepipe.store import Store
from mergepipe.store.commits import Commit, Parent
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.errors import NotFoundError
from mergepipe.store.history import children, reflog, refs_by_commit, short_length, walk
from mergepipe.store.publish import Changes, RefUpdate, publish

TREE = hash_bytes(b"no tree is read here")


def commit(minute: int, *parents: Digest, role: str = "previous") -> Commit:
    time = f"2030-01-01T00:{minute:02}:00.000000Z"
    return Commit(TREE, tuple(Parent(parent, role) for parent in parents), "ingest", str(minute), "ada", time, "test")


@pytest.fixture
def bare(tmp_path: Path) -> Store:
    """A store whose commits have no trees."""
    return Store.create(tmp_path / "bare", block_bytes=4096)


def put(store: Store, *commits: Commit, ref: str | None = None) -> None:
    updates = [RefUpdate(ref, None, commits[-1].id)] if ref else []
    publish(store.catalog, None, Changes(list(commits), updates))


def messages(store: Store, *starts: Commit, limit: int | None = None) -> list[str]:
    with store.catalog.reading() as view:
        return [entry.commit.message for entry in walk(view, [start.id for start in starts], limit)]


def test_newest_first_across_branches(bare: Store) -> None:
    root = commit(0)
    left, right = commit(1, root.id), commit(2, root.id)
    left2 = commit(3, left.id)
    merge = commit(4, left2.id, right.id, role="expert")
    put(bare, root, left, right, left2, merge)
    assert messages(bare, merge) == ["4", "3", "2", "1", "0"]
    assert messages(bare, left, right) == ["2", "1", "0"]
    assert messages(bare, merge, left, merge) == ["4", "3", "2", "1", "0"], "each once"


def test_a_parent_whose_clock_ran_ahead(bare: Store) -> None:
    ahead = commit(50)
    child = commit(10, ahead.id)
    other = commit(20)
    put(bare, ahead, child, other)
    assert messages(bare, child, other) == ["20", "10", "50"]


def test_reads_no_further_than_asked(bare: Store) -> None:
    lost = commit(0)
    first = commit(1, lost.id)
    second = commit(2, first.id)
    third = commit(3, second.id)
    put(bare, lost, first, second, third)
    bare.catalog.write(lambda view: view.delete("commits", lost.id))
    assert messages(bare, third, limit=2) == ["3", "2"]
    with pytest.raises(NotFoundError):
        messages(bare, third)


def test_children(bare: Store) -> None:
    root = commit(0)
    one, two = commit(1, root.id), commit(2, root.id, role="base")
    put(bare, root, one, two)
    with bare.catalog.reading() as view:
        assert dict(children(view, root.id)) == {one.id: "previous", two.id: "base"}
        assert children(view, one.id) == []


def test_refs_by_commit(bare: Store) -> None:
    only = commit(0)
    put(bare, only, ref="b")
    publish(bare.catalog, None, Changes(refs=[RefUpdate("a", None, only.id, "tag")]))
    with bare.catalog.reading() as view:
        assert [(ref.name, ref.kind) for ref in refs_by_commit(view)[only.id]] == [("a", "tag"), ("b", "branch")]


def test_reflog(bare: Store) -> None:
    one, two = commit(1), commit(2)
    put(bare, one, two)
    moves = [("x", None, one.id), ("x", one.id, two.id), ("xy", None, one.id), ("x", two.id, None)]
    for name, old, new in moves:
        publish(bare.catalog, None, Changes(refs=[RefUpdate(name, old, new, reason="test", author="ada")]))
    with bare.catalog.reading() as view:
        assert [(move.ago, move.old, move.new) for move in reflog(view, "x")] == [
            (0, two.id, None), (1, one.id, two.id), (2, None, one.id),
        ]  # fmt: skip
        assert [(move.ref, move.ago) for move in reflog(view)] == [("x", 0), ("xy", 0), ("x", 1), ("x", 2)]
        assert reflog(view, "y") == []


def test_short_length(bare: Store) -> None:
    commits = [commit(number % 60) for number in range(3)]
    put(bare, *commits)
    ids = [each.id for each in commits]
    with bare.catalog.reading() as view:
        assert short_length(view, ids) == 8
    twin = Digest(ids[0][:7] + bytes(25))
    bare.catalog.write(lambda view: view.put("commits", twin, commits[0].encode()))
    with bare.catalog.reading() as view:
        assert short_length(view, ids) == 16
        assert short_length(view, ids[1:]) == 8
