"""The journal: in the order of the transactions, durable before they commit, and never believed where it is wrong."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mergepipe.store import Digest, Store
from mergepipe.store import journal as journal_module
from mergepipe.store import publish as publish_module
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.commits import Commit
from mergepipe.store.errors import ConflictError, EnvironmentalError
from mergepipe.store.journal import MOVE, NOW, PAST, Entry, _check, _line, read_journal
from mergepipe.store.publish import Changes, RefUpdate, publish
from support.stores import catalog_rows, state_of


def commit_of(message: str) -> Commit:
    return Commit(Digest(b"\1" * 32), (), "ingest", message, "me", "2026-01-01T00:00:00.000000Z", "test")


COMMITS = [commit_of(text) for text in ("a", "b", "c")]
ONE, TWO, THREE = (commit.id for commit in COMMITS)


@pytest.fixture
def store(hurt_store: Store) -> Store:
    """Its commits have no trees."""
    publish(hurt_store.catalog, None, Changes(commits=COMMITS))
    return hurt_store


def move(store: Store, name: str, expected: Digest | None, new: Digest | None, kind: str = "branch") -> None:
    publish(store.catalog, None, Changes(refs=[RefUpdate(name, expected, new, kind, "test", "me")]))


def entries(store: Store) -> tuple[Entry, ...]:
    found = read_journal(store.layout.journal)
    assert found is not None
    assert (found.unreadable, found.torn) == (0, 0)
    return found.entries


def says(store: Store) -> dict[str, tuple[Digest, str]]:
    """Where the refs are, as the journal says."""
    refs: dict[str, tuple[Digest, str]] = {}
    for entry in entries(store):
        if entry.event in (MOVE, NOW):
            refs.pop(entry.name, None)
            if entry.new is not None:
                refs[entry.name] = (entry.new, entry.kind)
    return refs


def assert_agrees(store: Store) -> None:
    rows = catalog_rows(store, "refs", "reflog")
    refs = {name: json.loads(row) for name, row in rows["refs"].items()}
    assert says(store) == {name.decode(): (Digest.parse(row["commit"]), row["kind"]) for name, row in refs.items()}
    logs: dict[bytes, list[bytes]] = {}
    for entry in entries(store):
        if entry.event in (MOVE, PAST):
            logs.setdefault(entry.name.encode(), []).append(entry.log_row())
    keyed = {
        name + b"\0" + number.to_bytes(8, "big"): row for name, rows in logs.items() for number, row in enumerate(rows)
    }
    assert keyed == rows["reflog"]


class TestWriting:
    def test_each_move_is_a_line_in_its_order(self, store: Store) -> None:
        move(store, "m", None, ONE)
        move(store, "v1", None, ONE, "tag")
        first = store.layout.journal.read_bytes()
        move(store, "m", ONE, TWO)
        move(store, "m", TWO, None)
        publish(store.catalog, None, Changes(refs=[RefUpdate("x", None, ONE), RefUpdate("y", None, TWO)]))
        assert store.layout.journal.read_bytes().startswith(first)
        assert_agrees(store)
        assert [entry.rest for entry in entries(store)[-3:]] == [0, 1, 0]

    def test_a_publication_that_moves_no_ref_writes_nothing(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        move(store, "m", None, ONE)
        before = store.layout.journal.stat().st_mtime_ns
        monkeypatch.setattr(publish_module, "record_moves", lambda *_: pytest.fail("nothing moved"))
        publish(store.catalog, None, Changes(results={bytes(32): ONE}))
        assert store.layout.journal.stat().st_mtime_ns == before

    def test_one_flush_a_publication(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        move(store, "m", None, ONE)
        flushed = []
        original = os.fsync

        def note(descriptor: int) -> None:
            flushed.append(descriptor)
            original(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        publish(store.catalog, None, Changes(refs=[RefUpdate("x", None, ONE), RefUpdate("y", None, TWO)]))
        assert len(flushed) == 1

    def test_it_is_durable_before_the_transaction_is(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        move(store, "m", None, ONE)
        seen: list[object] = []
        original = publish_module.record_moves

        def look(*arguments: object) -> None:
            original(*arguments)  # type: ignore[arg-type]
            with store.catalog.reading() as reader:
                seen.append((says(store)["m"][0], json.loads(reader.get("refs", b"m") or b"")["commit"]))

        monkeypatch.setattr(publish_module, "record_moves", look)
        move(store, "m", ONE, TWO)
        assert seen == [(TWO, ONE.hex())]

    def test_a_conflict_writes_nothing(self, store: Store) -> None:
        move(store, "m", None, ONE)
        before = store.layout.journal.read_bytes()
        with pytest.raises(ConflictError):
            move(store, "m", TWO, THREE)
        assert store.layout.journal.read_bytes() == before


class TestDisagreement:
    def test_what_did_not_commit_is_cut_off(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        move(store, "m", None, ONE)
        original = publish_module.record_moves

        def fail(*arguments: object) -> None:
            original(*arguments)  # type: ignore[arg-type]
            raise RuntimeError("stop")

        with monkeypatch.context() as patched:
            patched.setattr(publish_module, "record_moves", fail)
            with pytest.raises(RuntimeError):
                move(store, "m", ONE, TWO)
        assert says(store)["m"][0] == TWO
        move(store, "other", None, THREE)
        assert says(store)["m"][0] == ONE
        assert_agrees(store)

    @pytest.mark.parametrize("harm", ["gone", "short", "other", "link", "pipe", "noise"])
    def test_a_journal_that_is_not_the_one_is_written_anew(self, store: Store, tmp_path: Path, harm: str) -> None:
        move(store, "m", None, ONE)
        move(store, "m", ONE, TWO)
        path, data = store.layout.journal, store.layout.journal.read_bytes()
        path.unlink()
        outside = tmp_path / "outside"
        outside.write_bytes(data)
        if harm == "link":
            path.symlink_to(outside)
        elif harm == "pipe":
            os.mkfifo(path)
        elif harm != "gone":
            path.write_bytes(
                {"short": data[:-1], "other": data[:-80] + data[:80], "noise": os.urandom(len(data))}[harm]
            )
        move(store, "x", None, THREE)
        assert_agrees(store)
        assert not path.is_symlink()
        assert outside.read_bytes() == data

    def test_a_store_from_before_has_all_of_its_refs_written_first(self, store: Store) -> None:
        path, store.catalog.journal = store.catalog.journal, None
        move(store, "m", None, ONE)
        move(store, "m", ONE, TWO)
        move(store, "v1", None, ONE, "tag")
        assert not store.layout.journal.exists()
        store.catalog.journal = path
        move(store, "x", None, THREE)
        assert_agrees(store)

    def test_moves_of_a_release_that_knows_no_journal(self, store: Store) -> None:
        move(store, "m", None, ONE)
        path, store.catalog.journal = store.catalog.journal, None
        move(store, "m", ONE, TWO)
        store.catalog.journal = path
        move(store, "x", None, THREE)
        assert_agrees(store)

    def test_rows_that_cannot_be_read_do_not_stop_anybody(self, store: Store) -> None:
        store.catalog.write(lambda view: view.put("refs", b"bad", b"{"))
        store.catalog.write(lambda view: view.put("reflog", b"bad\0" + bytes(8), b"{"))
        move(store, "m", None, ONE)
        assert says(store) == {"m": (ONE, "branch")}

    @pytest.mark.parametrize("row", [b"{", b"[]", b"{}", b'{"bytes":-1,"check":"","last":0,"lines":0,"moves":0}'])
    def test_its_own_row_that_cannot_be_read_is_written_anew(self, store: Store, row: bytes) -> None:
        move(store, "m", None, ONE)
        store.catalog.write(lambda view: view.put("meta", b"journal", row))
        move(store, "m", ONE, TWO)
        assert says(store) == {"m": (TWO, "branch")}
        assert_agrees(store)


class TestGrowing:
    def test_a_long_one_is_written_anew(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(journal_module, "MOST_LINES", 20)
        monkeypatch.setattr(journal_module, "KEPT_MOVES", 8)
        move(store, "still", None, THREE)
        most = 0
        for _ in range(30):
            move(store, "m", None, ONE)
            move(store, "m", ONE, None)
            most = max(most, len(entries(store)))
        assert most <= 20
        assert says(store) == {"still": (THREE, "branch")}
        rows = list(catalog_rows(store, "reflog")["reflog"].values())[:60]
        kept = [entry.log_row() for entry in entries(store) if entry.name == "m"]
        assert kept == rows[-len(kept) :]
        assert len(kept) >= 8


class TestFullDisk:
    @pytest.mark.parametrize("call", ["pwrite", "fsync"])
    def test_nothing_moves(self, store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        move(store, "m", None, ONE)
        before, data = state_of(store), store.layout.journal.read_bytes()
        original = getattr(os, call)

        def fail(descriptor: int, *rest: object) -> None:
            if call == "pwrite":
                original(descriptor, bytes(rest[0])[:10], *rest[1:])  # type: ignore[call-overload]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(EnvironmentalError, match="journal"):
                move(store, "m", ONE, TWO)
        assert state_of(store) == before
        assert store.layout.journal.read_bytes() == data
        move(store, "m", ONE, TWO)
        assert_agrees(store)

    def test_nor_where_it_is_written_anew(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            with pytest.raises(EnvironmentalError, match="journal"):
                move(store, "m", None, ONE)
        assert not any(catalog_rows(store, "refs", "reflog", "meta").values())
        assert {path.name for path in store.layout.root.iterdir()} == {"objects", "tmp", "catalog", "store.json"}

    def test_a_folder_in_its_place(self, store: Store) -> None:
        store.layout.journal.mkdir()
        with pytest.raises(EnvironmentalError, match="journal"):
            move(store, "m", None, ONE)
        store.layout.journal.rmdir()
        move(store, "m", None, ONE)


class TestReading:
    def test_torn_at_every_byte(self, store: Store, tmp_path: Path) -> None:
        move(store, "m", None, ONE)
        before = store.layout.journal.read_bytes()
        publish(store.catalog, None, Changes(refs=[RefUpdate("x", None, ONE), RefUpdate("m", ONE, TWO)]))
        data, all_ = store.layout.journal.read_bytes(), entries(store)
        path = tmp_path / "journal"
        for size in range(len(before), len(data)):
            path.write_bytes(data[:size])
            found = read_journal(path)
            assert found is not None
            assert found.entries == all_[:-2], "a publication counts whole or not at all"
            assert bool(found.torn or found.unreadable) == (size > len(before))

    def test_a_flipped_bit_costs_its_line_alone(self, store: Store, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            move(store, name, None, ONE)
        data, all_ = bytearray(store.layout.journal.read_bytes()), entries(store)
        middle = len(data) // 2
        for bit in range(8):
            harmed = bytearray(data)
            harmed[middle] ^= 1 << bit
            (tmp_path / "journal").write_bytes(harmed)
            found = read_journal(tmp_path / "journal")
            assert found is not None
            assert found.unreadable in (1, 2)  # the flip may make a line's end
            assert set(found.entries) < set(all_)
            assert len(found.entries) == len(all_) - 1

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "../../etc/passwd"}, {"name": "/a"}, {"name": ""}, {"name": "a" * 201}, {"name": "a.lock"},
            {"name": 5}, {"name": None}, {"name": ["a"]}, {"name": "a\0b"}, {"new": "xyz"}, {"new": 5},
            {"new": "AB" * 32}, {"old": {}}, {"kind": "other"}, {"kind": None}, {"event": "erase"}, {"rest": -1},
            {"rest": True}, {"rest": "1"}, {"time": 1}, {"author": None}, {"reason": []},
        ],
    )  # fmt: skip
    def test_hostile_fields(self, tmp_path: Path, change: dict[str, object]) -> None:
        value = json.loads(_line(Entry(MOVE, "m", "branch", None, ONE)).split(b" ", 1)[1])
        text = dump_canonical({**value, **change})
        good = _line(Entry(MOVE, "good", "branch", None, ONE))
        (tmp_path / "journal").write_bytes(good + _check(text).encode() + b" " + text + b"\n" + good)
        found = read_journal(tmp_path / "journal")
        assert found is not None
        assert ([entry.name for entry in found.entries], found.unreadable) == (["good", "good"], 1)

    @pytest.mark.parametrize(
        "text",
        [
            b"", b"\0" * 300, b"[]", b"null", b"7", b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"NaN", b"\xff\xfe",
            b"9" * 10_000, b'{"rest":' + b"9" * 5000 + b"}", b'{"a":1,"a":2}', b"x" * (3 << 20),
        ],
    )  # fmt: skip
    def test_hostile_lines(self, tmp_path: Path, text: bytes) -> None:
        good = _line(Entry(MOVE, "good", "branch", None, ONE))
        for line in (text, _check(text).encode() + b" " + text):
            (tmp_path / "journal").write_bytes(good + line + b"\n" + good)
            found = read_journal(tmp_path / "journal")
            assert found is not None
            assert ([entry.name for entry in found.entries], found.unreadable) == (["good", "good"], 1)

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        assert read_journal(tmp_path / "journal") is None
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("/dev/zero")
        (tmp_path / "file").write_bytes(b"")
        for name in ("pipe", "link", ".", "file/journal"):
            found = read_journal(tmp_path / name)
            assert found is not None
            assert (found.entries, found.unreadable) == ((), 1)
