"""The catalog is lost, in every way there is, and comes back: every commit, every ref, every log, byte for byte."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mergepipe.merge import Expert, execute, plan_merge
from mergepipe.store import Digest, Store
from mergepipe.store.catalog import DATABASES
from mergepipe.store.digest import hash_bytes, hash_record
from mergepipe.store.errors import ConflictError, DamagedError, EnvironmentalError
from mergepipe.store.frame import Encoding, Header, Kind, pack_header
from mergepipe.store.gc import collect
from mergepipe.store.journal import MOVE, Entry, _check, _line
from mergepipe.store.layout import read_layout
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.recover import Recovery, recover
from mergepipe.store.refs import Ref, all_refs, encode_ref
from mergepipe.store.staging import Staging
from support.checkpoints import folder_bytes
from support.family import base_weights, fine_tune, write_family, write_model
from support.processes import run_python, start_python
from support.stores import assert_clean, catalog_rows, flip_bit, objects_of, rewrite

Rows = dict[str, dict[bytes, bytes]]
COMPARED = ("objects", "commits", "children", "refs", "reflog", "previews")


def rows_of(root: Path) -> Rows:
    """What must be as before: all but what is derived, and the rows that say that a preview would gain nothing."""
    with Store.open(root) as store:
        rows = catalog_rows(store, *COMPARED)
    rows["previews"] = {key: value for key, value in rows["previews"].items() if value}
    return rows


def move_ref(store: Store, name: str, expected: Digest | None, new: Digest | None, kind: str = "branch") -> None:
    publish(store.catalog, None, Changes(refs=[RefUpdate(name, expected, new, kind, "test", "ada")]))


@dataclass(frozen=True)
class Template:
    """A store with a family, previews, merges, tags, and refs that moved and went; and what was in it."""

    root: Path
    other: Path
    rows: Rows
    exports: dict[str, dict[str, bytes]]
    checkpoints: Path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    top = tmp_path_factory.mktemp("recover")
    base, experts = write_family(top)
    root = top / "store"
    with Store.create(root, block_bytes=16384) as store:
        store.ingest([base])
        store.ingest(experts, base="base", previews=True)
        store.ingest([write_model(top / "again", fine_tune(base_weights(), 7))], ref="expert0", base="base")
        settings = [Expert("expert0", {"weight": 0.6}), Expert("expert1", {"weight": 0.4})]
        execute(store, plan_merge(store, "base", settings, "ties", parameters={"density": 0.3}), "merged/v1")
        merged = store.resolve("merged/v1")
        move_ref(store, "v1", None, merged, "tag")
        move_ref(store, "gone", None, store.resolve("expert0"))
        move_ref(store, "gone", store.resolve("expert0"), None)
        execute(store, plan_merge(store, "base", settings, "task_arithmetic"), "merged/v2")
        move_ref(store, "merged/v2", store.resolve("merged/v2"), None)
        assert objects_of(store, Kind.PREVIEW), "no previews, and the test proves less"
        assert objects_of(store, Kind.BLOCK, Encoding.DELTA)
        assert_clean(store)
    with Store.create(top / "other", block_bytes=16384) as store:
        store.ingest([write_model(top / "stranger", base_weights(99))], ref="base")
    exports = {name: exported(root, name, top / "out" / name) for name in ("base", "expert0", "expert1", "v1")}
    return Template(root, top / "other", rows_of(root), exports, top)


@pytest.fixture
def root(template: Template, tmp_path: Path) -> Path:
    """A copy of the store, to be harmed."""
    return shutil.copytree(template.root, tmp_path / "store")


def exported(root: Path, name: str, folder: Path) -> dict[str, bytes]:
    with Store.open(root) as store:
        store.snapshot(name).export(folder)
    return folder_bytes(folder)


def data_file(root: Path) -> Path:
    return root / "catalog" / "data.mdb"


def recovered(root: Path, **options: bool) -> Recovery:
    return recover(read_layout(root), apply=True, **options)


def assert_as_before(root: Path, template: Template, tmp_path: Path, *, thoroughly: bool = True) -> None:
    assert rows_of(root) == template.rows
    if not thoroughly:
        return
    with Store.open(root) as store:
        assert_clean(store)
        experts = [Expert("expert0", {"weight": 0.6}), Expert("expert1", {"weight": 0.4})]
        result = execute(store, plan_merge(store, "base", experts, "ties", parameters={"density": 0.3}), "again")
        assert store.commit(result.commit).tree == store.snapshot("v1").commit.tree
    for name, files in template.exports.items():
        assert exported(root, name, tmp_path / "exported" / name) == files
    shutil.rmtree(tmp_path / "exported")


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


HARMS: dict[str, Callable[[Path, Template], object]] = {
    "no folder": lambda root, _: shutil.rmtree(root / "catalog"),
    "no file": lambda root, _: data_file(root).unlink(),
    "no lock file": lambda root, _: [data_file(root).unlink(), (root / "catalog" / "lock.mdb").unlink()],
    "empty": lambda root, _: data_file(root).write_bytes(b""),
    "zeros": lambda root, _: data_file(root).write_bytes(bytes(50_000)),
    "noise": lambda root, _: data_file(root).write_bytes(noise(50_000)),
    "noise behind the first pages": lambda root, _: data_file(root).write_bytes(
        data_file(root).read_bytes()[:8192] + noise(100_000)
    ),
    "noise in the lock file too": lambda root, _: [
        data_file(root).write_bytes(noise(9000)), (root / "catalog" / "lock.mdb").write_bytes(noise(9000)),
    ],
    "a file": lambda root, _: [shutil.rmtree(root / "catalog"), (root / "catalog").write_bytes(b"x")],
    "another store's": lambda root, template: shutil.copyfile(
        template.other / "catalog" / "data.mdb", data_file(root)
    ),
}  # fmt: skip


class TestLost:
    @pytest.mark.parametrize("harm", list(HARMS))
    def test_all_is_as_before(self, root: Path, template: Template, tmp_path: Path, harm: str) -> None:
        HARMS[harm](root, template)
        found = recovered(root)
        assert found.is_needed
        assert found.restored.source == "journal"
        assert (found.restored.made, found.restored.lost, found.found.damaged) == ([], {}, {})
        assert_as_before(root, template, tmp_path)
        assert len(list(root.glob("catalog.lost-*"))) == (harm != "no folder")
        assert not (root / "catalog.recovering").exists()

    def test_cut_anywhere(self, root: Path, template: Template, tmp_path: Path) -> None:
        data = data_file(root).read_bytes()
        sizes = [1, 100, 4096, 8191, 8192, *range(12288, len(data), max(4096, len(data) // 12 // 512 * 512))]
        for size in sizes:
            data_file(root).write_bytes(data[:size])
            recovered(root)
            assert_as_before(root, template, tmp_path, thoroughly=False)
        assert_as_before(root, template, tmp_path)

    def test_the_old_one_is_kept(self, root: Path) -> None:
        data_file(root).write_bytes(b"what was there")
        for number in range(1, 4):
            found = recovered(root)
            assert found.kept is not None
            assert (found.kept / "data.mdb").read_bytes() == b"what was there"
            assert len(list(root.glob("catalog.lost-*"))) == number
            data_file(root).write_bytes(b"what was there")

    def test_in_another_folder(self, template: Template, tmp_path: Path) -> None:
        root = tmp_path / "store"
        with Store.create(root, block_bytes=16384, catalog=tmp_path / "fast" / "disk") as store:
            store.ingest([template.checkpoints / "base"])
        before = rows_of(root)
        shutil.rmtree(tmp_path / "fast")
        recovered(root)
        assert rows_of(root) == before
        (tmp_path / "fast" / "disk").rename(tmp_path / "moved")
        (tmp_path / "fast" / "disk").symlink_to(tmp_path / "moved")
        (tmp_path / "moved" / "data.mdb").write_bytes(b"")
        recovered(root)
        assert rows_of(root) == before
        assert (tmp_path / "fast" / "disk").is_symlink()

    def test_refs_move_on_afterwards(self, root: Path, template: Template) -> None:
        data_file(root).unlink()
        recovered(root)
        with Store.open(root) as store:
            move_ref(store, "later", None, store.resolve("base"))
        before = rows_of(root)
        assert before != template.rows
        data_file(root).unlink()
        recovered(root)
        assert rows_of(root) == before

    def test_one_that_the_system_does_not_open(self, root: Path, template: Template, tmp_path: Path) -> None:
        data_file(root).unlink()
        data_file(root).symlink_to("data.mdb")
        assert "cannot be read" in recover(read_layout(root)).catalog
        recovered(root)
        assert_as_before(root, template, tmp_path, thoroughly=False)

    def test_without_a_folder_for_writers(self, root: Path) -> None:
        data_file(root).unlink()
        shutil.rmtree(root / "tmp")
        assert recovered(root).kept

    def test_a_journal_that_is_a_pipe_is_put_aside(self, root: Path, template: Template) -> None:
        (root / "refs.journal").unlink()
        os.mkfifo(root / "refs.journal")
        with Store.open(root) as store:
            store.catalog.write(lambda view: view.delete("objects", next(key for key, _ in view.items("objects"))))
        recovered(root)
        assert (root / "refs.journal").is_file()
        assert [path.is_fifo() for path in root.glob("refs.journal.lost-*")] == [True]
        assert rows_of(root)["refs"] == template.rows["refs"]

    def test_a_filesystem_without_links(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "no links")

        damaged = (root / "refs.journal").read_bytes() + b"torn"
        (root / "refs.journal").write_bytes(damaged)
        data_file(root).unlink()
        with monkeypatch.context() as patched:
            patched.setattr(os, "link", refuse)
            recovered(root)
        assert [path.read_bytes() for path in root.glob("refs.journal.lost-*")] == [damaged]


class TestHealthy:
    def test_nothing_differs_and_nothing_is_done(self, root: Path, template: Template) -> None:
        inode = data_file(root).stat().st_ino
        for apply in (False, True):
            found = recover(read_layout(root), apply=apply)
            assert (found.is_needed, found.differences, found.kept) == (False, {}, None)
        assert data_file(root).stat().st_ino == inode
        assert rows_of(root) == template.rows

    def test_what_differs_is_said(self, root: Path, template: Template, tmp_path: Path) -> None:
        with Store.open(root) as store:
            deltas = objects_of(store, Kind.BLOCK, Encoding.DELTA)

            def harm(view) -> None:  # type: ignore[no-untyped-def]
                view.delete("objects", deltas[0])
                view.put("objects", bytes(32), view.get("objects", deltas[1]))
                view.put("refs", b"base", view.get("refs", b"v1"))
                view.delete("commits", next(key for key, _ in view.items("commits")))

            store.catalog.write(harm)
        found = recover(read_layout(root))
        assert found.differences == {
            "objects": "1 missing, 1 too many", "commits": "1 missing", "refs": "1 different",
        }  # fmt: skip
        recovered(root)
        assert_as_before(root, template, tmp_path)

    @pytest.mark.parametrize("gone", [["v1", "merged"], None])
    def test_logs_of_refs_whose_commits_were_collected(self, root: Path, gone: list[str] | None) -> None:
        """They are no other store's: nothing is to be recovered, and where the catalog is lost they come back."""
        with Store.open(root) as store:
            with store.catalog.reading() as view:
                refs = {ref.name: ref for ref in all_refs(view)}
            for name in refs if gone is None else [name for name in gone if name in refs]:
                move_ref(store, name, refs[name].commit, None, refs[name].kind)
            assert collect(store, apply=True, grace_seconds=0).commits
        before = rows_of(root)
        assert not recovered(root).is_needed
        data_file(root).unlink()
        recovered(root)
        after = rows_of(root)
        assert {name: after[name] for name in ("refs", "reflog", "commits")} == {
            name: before[name] for name in ("refs", "reflog", "commits")
        }

    def test_a_dry_run_writes_nothing(self, root: Path) -> None:
        for harm in (lambda: None, lambda: data_file(root).write_bytes(b"x"), lambda: data_file(root).unlink()):
            harm()
            before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
            recover(read_layout(root))
            assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before

    def test_an_old_copy_of_the_catalog(self, root: Path, template: Template, tmp_path: Path) -> None:
        """The journal goes on where the copy ends."""
        shutil.copytree(root / "catalog", tmp_path / "copy")
        with Store.open(root) as store:
            move_ref(store, "v1", store.resolve("v1"), None, "tag")
            store.ingest([template.checkpoints / "stranger"])
        before = rows_of(root)
        shutil.copyfile(tmp_path / "copy" / "data.mdb", data_file(root))
        assert "refs" in recover(read_layout(root)).differences
        recovered(root)
        assert rows_of(root) == before

    def test_an_empty_store(self, tmp_path: Path) -> None:
        Store.create(tmp_path / "s").close()
        assert not recovered(tmp_path / "s").is_needed
        data_file(tmp_path / "s").unlink()
        assert recovered(tmp_path / "s").kept
        with Store.open(tmp_path / "s") as store:
            assert not any(catalog_rows(store, *(set(DATABASES) - {"meta"})).values())


class TestWithoutJournal:
    def test_tips_get_refs(self, root: Path, template: Template) -> None:
        (root / "refs.journal").unlink()
        data_file(root).unlink()
        found = recovered(root)
        assert found.restored.source == "commits"
        rows = rows_of(root)
        for name in ("objects", "commits", "children", "previews"):
            assert rows[name] == template.rows[name]
        parents = {key[:32] for key in rows["children"]}
        tips = {Digest(key) for key in rows["commits"].keys() - parents}
        assert {f"recovered/{digest.short}".encode() for digest in tips} == set(rows["refs"])
        with Store.open(root) as store:
            assert_clean(store)
        data_file(root).unlink()
        assert recovered(root).restored.source == "journal"
        assert rows_of(root)["refs"] == rows["refs"]

    def test_a_catalog_that_can_be_read_says_where_refs_are(
        self, root: Path, template: Template, tmp_path: Path
    ) -> None:
        (root / "refs.journal").unlink()
        assert not recover(read_layout(root)).differences
        with Store.open(root) as store:
            store.catalog.write(lambda view: view.delete("objects", next(key for key, _ in view.items("objects"))))
        assert recovered(root).restored.source == "catalog"
        assert_as_before(root, template, tmp_path)

    def test_nor_is_another_stores_catalog_believed(self, root: Path, template: Template) -> None:
        (root / "refs.journal").unlink()
        shutil.copyfile(template.other / "catalog" / "data.mdb", data_file(root))
        assert recovered(root).restored.source == "commits"
        with Store.open(root) as store:
            assert_clean(store)

    def test_moves_of_a_release_that_knows_no_journal(self, root: Path) -> None:
        with Store.open(root) as store:
            store.catalog.journal = None
            move_ref(store, "v2", None, store.resolve("base"), "tag")
        before = rows_of(root)
        assert not recover(read_layout(root)).differences
        with Store.open(root) as store:
            store.catalog.write(lambda view: view.delete("objects", next(key for key, _ in view.items("objects"))))
        recovered(root)
        assert rows_of(root) == before

    def test_commits_that_nothing_names(self, root: Path) -> None:
        """They were published without a ref."""
        with Store.open(root) as store, Staging(store.layout, store.catalog) as staging:
            commit = replace(store.commit(store.resolve("base")), message="nobody's")
            staging.add_record(Kind.COMMIT, commit.encode())
            publish(store.catalog, staging, Changes(commits=[commit]))
        assert not recover(read_layout(root)).differences
        data_file(root).unlink()
        (made,) = recovered(root).restored.made
        assert (made.commit, made.name) == (commit.id, f"recovered/{commit.id.short}")

    def test_their_name_is_longer_where_it_is_taken(self, root: Path) -> None:
        with Store.open(root) as store, Staging(store.layout, store.catalog) as staging:
            commit = replace(store.commit(store.resolve("base")), message="nobody's")
            staging.add_record(Kind.COMMIT, commit.encode())
            publish(store.catalog, staging, Changes(commits=[commit]))
            move_ref(store, f"recovered/{commit.id.short}", None, store.resolve("base"))
        data_file(root).unlink()
        (made,) = recovered(root).restored.made
        assert (made.commit, made.name) == (commit.id, f"recovered/{commit.id.hex()[:13]}")

    def test_rows_of_the_old_catalog_that_are_none_are_left_out(
        self, root: Path, template: Template, tmp_path: Path
    ) -> None:
        (root / "refs.journal").unlink()
        with Store.open(root) as store:
            base = store.resolve("base")
            rows = {
                ("refs", b"noise"): b"\xff{",
                ("refs", b"../up"): encode_ref(Ref("../up", base, "branch")),
                ("refs", b"odd"): encode_ref(Ref("odd", base, "oddity")),
                ("reflog", b"base\0" + bytes(7) + b"\x63"): b"no JSON",
                ("reflog", b"../up\0" + bytes(8)): store.catalog.write(lambda view: next(view.items("reflog")))[1],
            }
            store.catalog.write(lambda view: [view.put(*place, value) for place, value in rows.items()])
            store.catalog.write(lambda view: view.delete("objects", next(key for key, _ in view.items("objects"))))
        found = recovered(root).restored
        assert (found.source, found.lost, found.made) == ("catalog", {}, [])
        assert_as_before(root, template, tmp_path, thoroughly=False)


class TestJournal:
    def test_torn_at_every_byte_of_its_last_line(self, root: Path) -> None:
        path = root / "refs.journal"
        data = path.read_bytes()
        wanted = recover(read_layout(root)).restored.refs
        with Store.open(root) as store:
            move_ref(store, "expert1", store.resolve("expert1"), store.resolve("base"))
            moved = store.resolve("base")
        longer = path.read_bytes()
        assert longer.startswith(data)
        data_file(root).unlink()
        for size in range(len(data), len(longer)):
            path.write_bytes(longer[:size])
            assert recover(read_layout(root)).restored.refs == wanted
        path.write_bytes(longer)
        assert recover(read_layout(root)).restored.refs["expert1"].commit == moved

    def test_hostile_lines(self, root: Path, template: Template) -> None:
        with Store.open(root) as store:
            block, node = objects_of(store, Kind.BLOCK)[0], objects_of(store, Kind.NODE)[0]
        texts = [b"{" * 200_000, b"[1,2]", b"\xff" * 1000, b"x" * (2 << 20)]
        for name in ("../../evil", "/etc/passwd", "a\0b", "a" * 5000, "-x"):
            entry = _line(Entry(MOVE, name, "branch", None, Digest.parse(os.urandom(32).hex())))
            texts.append(entry.split(b" ", 1)[1][:-1])
        lines = [_check(text).encode() + b" " + text + b"\n" for text in texts]
        for target in (block, node, Digest(b"\7" * 32)):
            lines.append(_line(Entry(MOVE, "evil", "branch", None, target)))
            lines.append(_line(Entry(MOVE, "base", "branch", None, target)))
        with (root / "refs.journal").open("ab") as file:
            file.write(b"".join(lines) + b"no end")
        data_file(root).unlink()
        found = recovered(root)
        assert found.journal is not None
        assert found.journal.unreadable == len(texts) + 1
        rows = rows_of(root)
        assert rows["refs"] == template.rows["refs"]
        assert set(found.restored.lost) == {"evil", "base"}
        assert not [key for key in rows["reflog"] if key.startswith(b"evil")]
        with Store.open(root) as store:
            assert_clean(store)
            assert store.resolve("base@{0}") == store.resolve("base")
        assert len(list(root.glob("refs.journal.lost-*"))) == 1

    def test_one_move_too_many(self, root: Path) -> None:
        """A writer died between its line in the journal and the end of its transaction: all objects are there."""
        run_python(
            """
            import os, sys
            from mergepipe.store import Store, publish
            def die(*arguments):
                original(*arguments)
                os._exit(7)
            original, publish.record_moves = publish.record_moves, die
            with Store.open(sys.argv[1]) as store:
                store.ingest([sys.argv[2]], ref="base")
            """,
            root,
            write_model(root.parent / "new", fine_tune(base_weights(), 50)),
            expect=7,
        )
        with Store.open(root) as store:
            before = store.resolve("base")
            assert_clean(store)
        data_file(root).unlink()
        recovered(root)
        with Store.open(root) as store:
            assert_clean(store)
            assert store.resolve("base~1") == before

    def test_what_a_crash_left_half_done_is_left_out(self, root: Path, template: Template, tmp_path: Path) -> None:
        run_python(
            """
            import os, sys
            from mergepipe.store import Store, publish
            calls = 0
            def replace(source, target):
                global calls
                original(source, target)
                calls += 1
                if calls == 3:
                    os._exit(7)
            with Store.open(sys.argv[1]) as store:
                original, os.replace = os.replace, replace
                move = publish._move_objects
                def last_first(view, staging):
                    staging.rows = dict(reversed(staging.rows.items()))
                    move(view, staging)
                publish._move_objects = last_first
                store.ingest([sys.argv[2]], ref="base")
            """,
            root,
            write_model(tmp_path / "new", fine_tune(base_weights(), 50)),
            expect=7,
        )
        data_file(root).unlink()
        found = recovered(root)
        assert len(found.restored.unfinished) == 1
        rows = rows_of(root)
        for name in ("refs", "commits", "reflog", "children"):
            assert rows[name] == template.rows[name]
        with Store.open(root) as store:
            assert_clean(store)
            store.ingest([tmp_path / "new"], ref="base")
            assert_clean(store)


class TestDamagedObjects:
    def test_they_are_named_and_come_back(self, root: Path, template: Template) -> None:
        with Store.open(root) as store:
            own = {block for entry in store.snapshot("expert1").tensors.values() for block in entry.blocks}
            blocks = [digest for digest in objects_of(store, Kind.BLOCK, Encoding.DELTA) if digest in own]
            with store.catalog.reading() as view:
                bases = {row.base for row in map(view.object_row, blocks) if row is not None}
            base = next(digest for digest in bases if digest is not None)
            paths = [Path(store.layout.object_path(digest)) for digest in (*blocks[:3], base)]
        flip_bit(paths[0], 3)  # the magic
        rewrite(paths[1], paths[1].read_bytes()[:-1])
        flip_bit(paths[2], 120)  # the content
        paths[3].unlink()
        data_file(root).unlink()
        assert set(recover(read_layout(root)).found.damaged) == {*blocks[:2], base}
        assert {*blocks[:3], base} <= set(recovered(root, full=True).found.damaged)
        with Store.open(root) as store:
            for name in ("base", "expert0", "expert1", "again"):
                ref = "expert0" if name == "again" else name
                store.ingest([template.checkpoints / name], ref=ref, base=None if name == "base" else "base")
            assert_clean(store)
            assert store.catalog.write(lambda view: view.count("damaged")) == 0

    def test_a_damaged_commit(self, root: Path) -> None:
        with Store.open(root) as store:
            now, before = store.resolve("expert0"), store.resolve("expert0@{1}")
            flip_bit(Path(store.layout.object_path(now)), 110)
        data_file(root).unlink()
        found = recovered(root)
        assert found.restored.lost == {"expert0": now}
        with Store.open(root) as store:
            assert store.resolve("expert0") == before == store.resolve("expert0@{0}")
            assert now not in catalog_rows(store, "commits")["commits"]

    def test_files_that_say_what_they_are_not(self, root: Path, template: Template) -> None:
        """Their headers and checks are right, and so are most of their ids."""
        with Store.open(root) as store:
            commit = store.commit(store.resolve("base")).encode()
        loose = commit.replace(b":", b": ", 1)
        odd = {
            place(root, hash_record("commit", b"{}")): framed(Kind.COMMIT, b"{}"),
            place(root, hash_record("commit", loose)): framed(Kind.COMMIT, loose),
            place(root, hash_bytes(b"coarse")): framed(Kind.PREVIEW, b"coarse"),
            place(root, hash_record("node", b"planes")): framed(Kind.NODE, b"planes", Encoding.PLANES),
            place(root, hash_bytes(b"folded")): framed(Kind.BLOCK, b"folded", Encoding.DEFLATE),
            place(root, hash_bytes(b"huge")): framed(Kind.BLOCK, b"huge", raw_bytes=1 << 40),
        }
        for path, content in odd.items():
            path.write_bytes(content)
        data_file(root).unlink()
        found = recovered(root)
        reasons = {place(root, digest): reason for digest, reason in found.found.damaged.items()}
        assert reasons.keys() == odd.keys()
        for reason, said in zip(
            (reasons[path] for path in odd),
            ("not a commit", "not written as", "no preview", "no object has", "no object has", "no object has"),
            strict=True,
        ):
            assert said in reason
        rows = rows_of(root)
        assert {name: rows[name] for name in rows if name != "objects"} == {
            name: template.rows[name] for name in rows if name != "objects"
        }

    def test_folders_of_objects_that_are_missing(self, root: Path, template: Template, tmp_path: Path) -> None:
        fans = [path for path in (root / "objects").iterdir() if not any(path.iterdir())]
        for fan in fans:
            fan.rmdir()
        fans[0].write_bytes(b"in its place")
        data_file(root).unlink()
        recovered(root)
        assert_as_before(root, template, tmp_path, thoroughly=False)

    def test_odd_things_among_the_objects(self, root: Path, template: Template) -> None:
        one = next((root / "objects").glob("*/*")).read_bytes()
        os.mkfifo(root / "objects" / "00" / ("0" * 62))
        (root / "objects" / "01" / ("0" * 62)).symlink_to("/dev/zero")
        (root / "objects" / "02" / ("0" * 62)).mkdir()
        (root / "objects" / "03" / "notes.txt").write_bytes(b"x")
        (root / "objects" / "04" / ("0" * 62)).write_bytes(b"")
        rewrite(root / "objects" / "05" / ("0" * 62), one)
        data_file(root).unlink()
        found = recovered(root)
        assert {digest.hex()[:3] for digest in found.found.damaged} >= {"000", "010", "020", "040"}
        assert rows_of(root)["refs"] == template.rows["refs"]


def place(root: Path, digest: Digest) -> Path:
    return root / "objects" / digest.hex()[:2] / digest.hex()[2:]


def framed(kind: Kind, data: bytes, encoding: Encoding = Encoding.RAW, raw_bytes: int | None = None) -> bytes:
    """An object's file whose header says this."""
    header = Header(kind, encoding, 1, len(data) if raw_bytes is None else raw_bytes, len(data), None)
    return pack_header(header, [data]) + data


# Where the process dies: before the call of that number of this function.
STEPS = {
    "before the folder": ("pathlib.Path.mkdir", 1),
    "before the mark": ("pathlib.Path.touch", 1),
    "before the catalog": ("mergepipe.store.recover.open_catalog", 1),
    "before the rows": ("mergepipe.store.catalog.Catalog.write", 1),
    "within the rows": ("mergepipe.store.catalog.Catalog.write", 3),
    "before the journal's row": ("mergepipe.store.recover.describe", 1),
    "before it is whole": ("pathlib.Path.unlink", 1),
    "after it is whole": ("mergepipe.store.recover.flush_directory", 2),
    "before the journal is kept": ("mergepipe.store.recover._keep_journal", 1),
    "before the exchange": ("mergepipe.store.recover.exchange", 1),
    "after the exchange": ("pathlib.Path.replace", 1),
    "after the old one is kept": ("mergepipe.store.recover.flush_directory", 4),
    "before the journal": ("mergepipe.store.recover.replace_journal", 1),
}
DYING = """
    import importlib, json, os, sys
    from pathlib import Path
    from mergepipe.store.layout import read_layout
    import mergepipe.store.recover, mergepipe.store.catalog
    from mergepipe.store import Store

    def die_at(name, number):
        module, *attributes = name.split(".")
        for split in range(name.count("."), 0, -1):
            try:
                owner = importlib.import_module(".".join(name.split(".")[:split]))
            except ImportError:
                continue
            attributes = name.split(".")[split:]
            break
        for each in attributes[:-1]:
            owner = getattr(owner, each)
        original, calls = getattr(owner, attributes[-1]), 0
        def dying(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == number:
                os._exit(77)
            return original(*arguments, **named)
        setattr(owner, attributes[-1], dying)

    for step, root in zip(json.loads(sys.argv[1]), sys.argv[2:], strict=True):
        child = os.fork()
        if child == 0:
            try:
                die_at(*step)
                mergepipe.store.recover.recover(read_layout(Path(root)), apply=True)
            except BaseException as error:
                print(error)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 77, (step, code)
"""


class TestKilled:
    @pytest.mark.parametrize("harm", ["noise", "another store's"])
    def test_at_every_step_and_run_again(self, template: Template, tmp_path: Path, harm: str) -> None:
        roots = [shutil.copytree(template.root, tmp_path / f"{number}") for number in range(len(STEPS))]
        for root in roots:
            HARMS[harm](root, template)
        lost = data_file(roots[0]).read_bytes()
        run_python(DYING, json.dumps(list(STEPS.values())), *roots)
        for step, root in zip(STEPS, roots, strict=True):
            kept = [path.read_bytes() for path in root.glob("catalog*/data.mdb")]
            assert lost in kept, step
            recovered(root)
            assert_as_before(root, template, tmp_path, thoroughly=False)
            assert lost in [path.read_bytes() for path in root.glob("catalog.lost-*/data.mdb")], step
            assert not (root / "catalog.recovering").exists()

    def test_without_the_exchange_of_names(
        self, root: Path, template: Template, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mergepipe.store import filesystem

        data_file(root).write_bytes(b"lost")
        monkeypatch.setattr(filesystem, "_libc", object)
        monkeypatch.setattr("mergepipe.store.publish.flush_filesystem", lambda _: True)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", fail_second_time())
            with pytest.raises(EnvironmentalError):
                recovered(root)
        assert data_file(root).read_bytes() == b"lost"
        recovered(root)
        assert rows_of(root) == template.rows
        assert len(list(root.glob("catalog.lost-*"))) == 2


def fail_second_time() -> Callable[[Path, Path], Path]:
    original, calls = Path.rename, 0

    def rename(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "no")
        return original(path, target)

    return rename


class TestOthers:
    def test_a_process_that_has_it_open(self, root: Path) -> None:
        child = start_python(
            """
            import sys
            from mergepipe.store import Store
            with Store.open(sys.argv[1]):
                print("open", flush=True)
                sys.stdin.readline()
            """,
            root,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(ConflictError, match="open"):
            recovered(root)
        recover(read_layout(root))
        child.communicate("\n", timeout=60)
        recovered(root)

    def test_this_process(self, root: Path) -> None:
        with Store.open(root), pytest.raises(ConflictError, match="this process"):
            recovered(root)

    def test_a_writer_somewhere(self, root: Path) -> None:
        data_file(root).unlink()
        folder = root / "tmp" / "1-1-abcd"
        folder.mkdir()
        (folder / "lease.json").write_text('{"pid": 1, "host": "elsewhere", "boot": "", "namespace": 0}')
        with pytest.raises(ConflictError) as caught:
            recovered(root)
        assert str(folder) in (caught.value.hint or "")
        shutil.rmtree(folder)
        recovered(root)

    def test_another_recovery(self, root: Path) -> None:
        descriptor = os.open(root, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match="another"):
            recovered(root)
        os.close(descriptor)
        recovered(root)

    def test_who_comes_meanwhile_waits_and_gets_the_new_one(self, root: Path, template: Template) -> None:
        """It waits at LMDB's lock file while the folder that this lies in is put aside."""
        with Store.open(root) as store:
            store.catalog.write(lambda view: view.delete("refs", b"v1"))
        code = """
            import os, sys
            from pathlib import Path
            from mergepipe.store import recover as module
            from mergepipe.store.layout import read_layout
            original = module._put_in_place
            def wait(*arguments):
                print("locked", flush=True)
                sys.stdin.readline()
                return original(*arguments)
            module._put_in_place = wait
            module.recover(read_layout(Path(sys.argv[1])), apply=True)
        """
        newcomer = """
            import sys
            from mergepipe.store import Store
            print("begin", flush=True)
            with Store.open(sys.argv[1]) as store:
                with store.catalog.reading() as view:
                    print(view.count("refs"), flush=True)
                store.catalog.write(lambda view: view.put("meta", b"newcomer", sys.argv[2].encode()))
        """
        recovering = start_python(code, root)
        assert recovering.stdout is not None
        assert recovering.stdin is not None
        assert recovering.stdout.readline() == "locked\n"
        waiting = [start_python(newcomer, root, number) for number in range(3)]
        for each in waiting:
            assert each.stdout is not None
            assert each.stdout.readline() == "begin\n"
        _wait_until_blocked(root, 3)
        recovering.communicate("\n", timeout=60)
        assert recovering.returncode == 0
        for each in waiting:
            output, errors = each.communicate(timeout=60)
            assert (each.returncode, output) == (0, f"{len(template.rows['refs'])}\n"), errors
        with Store.open(root) as store:
            assert catalog_rows(store, "meta")["meta"][b"newcomer"] in (b"0", b"1", b"2")
            assert_clean(store)

    @pytest.mark.parametrize("harm", [name for name in HARMS if name != "another store's"])
    def test_whoever_opens_a_lost_catalog_is_told(self, root: Path, template: Template, harm: str) -> None:
        HARMS[harm](root, template)
        with pytest.raises(DamagedError) as caught:
            Store.open(root)
        assert "mp recover" in (caught.value.hint or "")

    def test_objects_that_are_not_there(self, root: Path, template: Template) -> None:
        (root / "objects").rename(root / "elsewhere")
        for apply in (False, True):
            with pytest.raises(DamagedError, match="no objects"):
                recover(read_layout(root), apply=apply)
        (root / "elsewhere").rename(root / "objects")
        assert rows_of(root) == template.rows

    def test_a_folder_that_cannot_be_written(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data_file(root).unlink()

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "no", "catalog.recovering")

        with monkeypatch.context() as patched:
            patched.setattr(Path, "mkdir", refuse)
            with pytest.raises(EnvironmentalError, match="permission"):
                recovered(root)
        recovered(root)


def _wait_until_blocked(root: Path, count: int) -> None:
    """Until so many processes wait for LMDB's lock file, as the kernel's table says."""
    inode = (root / "catalog" / "lock.mdb").stat().st_ino
    for _ in range(100_000):
        table = Path("/proc/locks").read_text(encoding="ascii")
        if sum("->" in line and f":{inode} " in line for line in table.splitlines()) >= count:
            return
        os.sched_yield()
    pytest.skip("the system does not say who waits for a lock")
