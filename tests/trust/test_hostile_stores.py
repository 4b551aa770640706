"""A stranger's store made by hand: bombs, trees, commits, names and objects. Reading it fails soon, and clearly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mergepipe.cli.app import main
from mergepipe.store import Store
from mergepipe.store.check import verify
from mergepipe.store.commits import Parent
from mergepipe.store.diff import diff
from mergepipe.store.digest import hash_bytes, hash_record
from mergepipe.store.errors import DamagedError, MergePipeError
from mergepipe.store.frame import HEADER_BYTES, Encoding, Header, Kind
from mergepipe.store.history import walk
from mergepipe.store.manifest import FileEntry, Node, TensorEntry
from mergepipe.store.refs import load_commit
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.usage import object_ids
from support.checkpoints import random_tensor, write_checkpoint
from support.processes import run_python
from support.stores import object_path, rewrite
from support.strangers import publish_commit, put, put_frame, put_node, with_tree

pytestmark = pytest.mark.usefixtures("soon")


# What a child's memory grew by while it read one object, in MiB.
READ = """
    import resource, sys
    from mergepipe.store import Digest, MergePipeError, Store
    from mergepipe.store.frame import Kind
    import mergepipe.store.codecs, mergepipe.store.manifest
    with Store.open(sys.argv[1]) as store:
        digest = Digest.parse(sys.argv[2])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        def look():
            store.reader.verify(digest)
        def read():
            if sys.argv[3] == "record":
                mergepipe.store.manifest.decode_node(store.reader.read_record(Kind.NODE, digest), "node")
            else:
                store.reader.read_piece(digest, int(sys.argv[3]))
        for way in (look, read):
            try:
                way()
                print("read")
            except MergePipeError as error:
                print("refused", error.kind)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


class TestBombs:
    def memory(self, store: Store, digest: bytes, size: object) -> tuple[list[str], int]:
        *said, grown = run_python(READ, store.layout.root, digest.hex(), size).splitlines()
        return said, int(grown)

    @pytest.mark.parametrize("claims", [4096, 1 << 26, 1 << 30, 1 << 40, (1 << 64) - 1])
    def test_zstd(self, evil: Store, claims: int) -> None:
        """A frame of a gigabyte of zeros in an object that claims little, or much."""
        huge = zstandard.ZstdCompressor().compressobj()  # declares no size
        stream = b"".join([*(huge.compress(bytes(1 << 24)) for _ in range(64)), huge.flush()])
        honest = zstandard.ZstdCompressor().compress(bytes(1 << 26))  # declares 64 MiB
        for frame in (stream, honest):
            payload = (1 << 56 | len(frame)).to_bytes(8, "little") + frame
            digest = hash_bytes(b"anything")
            put_frame(evil, digest, Header(Kind.BLOCK, Encoding.PLANES, 1, claims, len(payload), None), payload)
            said, grown = self.memory(evil, digest, 4096)
            assert said == ["refused damaged"] * 2
            assert grown < 160, f"{grown} MiB for {len(payload)} bytes"  # a block may have 64 MiB

    @pytest.mark.parametrize("unfolded", [8 << 20, 1 << 30])
    @pytest.mark.parametrize("content", ["blanks", "lists"])
    def test_records(self, evil: Store, content: str, unfolded: int) -> None:
        """A record that is what its id says, and unfolds to a thousand times its size."""
        count = min(unfolded, 64 << 20)
        data = b" " * count if content == "blanks" else b"[" + b"[]," * (count // 3) + b"[]]"
        payload = zlib.compress(data, 9)
        digest = hash_record("node", data)
        for claims in (len(data), unfolded):
            put_frame(evil, digest, Header(Kind.NODE, Encoding.DEFLATE, 1, claims, len(payload), None), payload)
            said, grown = self.memory(evil, digest, "record")
            assert said == ["refused damaged"] * 2
            assert grown < 40, f"{grown} MiB for {len(payload)} bytes"

    def test_records_that_claim_little(self, evil: Store) -> None:
        payload = zlib.compress(bytes(64 << 20), 9)
        digest = hash_record("node", b"{}")
        put_frame(evil, digest, Header(Kind.NODE, Encoding.DEFLATE, 1, 2, len(payload), None), payload)
        said, grown = self.memory(evil, digest, "record")
        assert said == ["refused damaged"] * 2
        assert grown < 10

    def test_what_a_writer_folds_can_be_read(self, store: Store) -> None:
        """However well a record of its own folds."""
        from mergepipe.store.publish import Changes, publish
        from mergepipe.store.staging import Staging

        block = hash_bytes(bytes(4096))
        with Staging(store.layout, store.catalog) as staging:
            entry = TensorEntry("U8", (4096 * 70_000,), (4096,), (block,) * 70_000)
            digest = staging.add_record(Kind.NODE, Node(tensors={"zeros": entry}).encode())
            publish(store.catalog, staging, Changes())
        assert store.reader.verify(digest).encoding is Encoding.RAW
        assert len(store.reader.read_record(Kind.NODE, digest)) > 4 << 20


class TestTrees:
    def dag(self, store: Store, bottom: Node, depth: int = 60, tag: str = "") -> Any:
        """Nodes that all name the next one twice."""
        digest = put_node(store, bottom)
        for at in range(depth):
            digest = put_node(store, Node(nodes={f"a{tag if at == 0 else ''}": digest, "b": digest}))
        return digest

    @pytest.mark.parametrize("tensors", [0, 1, 50])
    def test_nodes_that_share_their_children(self, evil: Store, tmp_path: Path, tensors: int) -> None:
        """Two to the sixtieth places in a few kilobytes."""
        weight = evil.snapshot("m").entry("model.norm.weight")
        tree = self.dag(evil, Node(tensors={f"w{at}": weight for at in range(tensors)}))
        snapshot = with_tree(evil, tree, "m")
        for use in (lambda: snapshot.tensors, lambda: snapshot.export(tmp_path / "out"), lambda: object_ids(snapshot)):
            with pytest.raises(MergePipeError, match="again and again"):
                use()
        assert not (tmp_path / "out").exists()

    def test_two_of_them_are_not_compared_for_ever(self, evil: Store) -> None:
        weight = evil.snapshot("m").entry("model.norm.weight")
        one, other = (
            with_tree(evil, self.dag(evil, Node(tensors={name: weight}), 60, name), "m") for name in ("v", "w")
        )
        for left, right in ((one, other), (other, one), (one, evil.snapshot("m")), (evil.snapshot("m"), one)):
            with pytest.raises(MergePipeError, match="again and again"):
                diff(evil, left, right)

    def test_two_deep_ones_are_not_compared(self, evil: Store) -> None:
        ends = [put_node(evil, Node(files={name: FileEntry(0, ())})) for name in "vw"]
        for _ in range(3000):
            ends = [put_node(evil, Node(nodes={"a": end})) for end in ends]
        with pytest.raises(MergePipeError, match="deeper than any"):
            diff(evil, *(with_tree(evil, end, "m") for end in ends))

    def test_equal_layers_are_still_shared(self, store: Store, tmp_path: Path) -> None:
        """As many as any model has: what is shared is no attack."""
        tensor = random_tensor("U8", (2,))
        names = [f"layers.{layer}.expert{at}.weight" for layer in range(200) for at in range(100)]
        store.ingest([write_checkpoint(tmp_path / "m", dict.fromkeys(names, tensor))], ref="m")
        assert len(store.snapshot("m").tensors) == len(names)

    def test_a_node_inside_itself(self, evil: Store) -> None:
        """No node can name its own id; one that claims to is not what its id says."""
        claimed = hash_record("node", b"a circle")
        data = Node(nodes={"a": claimed}).encode()
        put_frame(evil, claimed, Header(Kind.NODE, Encoding.RAW, 1, len(data), len(data), None), data)
        with pytest.raises(DamagedError, match="content that its id names"):
            _ = with_tree(evil, claimed, "m").tensors

    @pytest.mark.parametrize("data", [b"[]", b'{"nodes": []}', b'{"tensors": {"w": {}}}', b"{", b'{"a": 1e999}'])
    def test_a_node_that_is_none_is_reported(self, evil: Store, data: bytes) -> None:
        """Its object is whole: it is the commit that is wrong."""
        snapshot = with_tree(evil, put(evil, Kind.NODE, data), "m")
        publish_commit(evil, "evil", snapshot.commit)
        assert (snapshot.commit_id, "commit") in [(item.id, item.kind) for item in verify(evil).damaged]

    def test_names_of_very_many_digits(self, evil: Store) -> None:
        node = put_node(evil, Node(nodes={"9" * 5000: put_node(evil, Node()), "8" * 30: put_node(evil, Node())}))
        assert with_tree(evil, node, "m").tensors == {}

    def test_blocks_larger_than_any(self, evil: Store) -> None:
        """A tensor that claims a terabyte takes no memory before its first block is looked at."""
        block = evil.snapshot("m").entry("model.norm.weight").blocks[0]
        for shape in ((1 << 40,), (1 << 20, 1 << 20), ((1 << 26) + 1,)):
            tree = put_node(evil, Node(tensors={"w": TensorEntry("U8", shape, shape, (block,))}))
            with pytest.raises(DamagedError, match="larger than any"):
                with_tree(evil, tree, "m").read_tensor("w")

    def test_files_in_each_others_way(self, evil: Store, tmp_path: Path) -> None:
        files = {name: FileEntry(0, ()) for name in ("a", "a/b", "a/b/c")}
        with pytest.raises(MergePipeError):
            with_tree(evil, put_node(evil, Node(files=files)), "m").export(tmp_path / "top" / "out")
        assert list((tmp_path / "top").iterdir()) == []

    def test_a_configuration_that_nests_deeply(self, evil: Store) -> None:
        for data in (b"[" * 100_000, b'{"a":' * 990, b'{"a": ' + b"9" * 5000 + b"}"):
            piece = put(evil, Kind.FILE, data)
            tree = put_node(evil, Node(files={"config.json": FileEntry(len(data), (piece,))}))
            assert with_tree(evil, tree, "m").config() == {}


class TestCommits:
    def test_very_many_parents(self, evil: Store, deep: bool, capfd: pytest.CaptureFixture[str]) -> None:
        count = 200_000 if deep else 30_000
        commit = evil.snapshot("m").commit
        parents = tuple(Parent(hash_bytes(b"%d" % at), "expert", "x") for at in range(count))
        digest = publish_commit(evil, "evil", replace(commit, parents=parents))
        with evil.catalog.reading() as view:
            assert len(load_commit(view, digest).parents) == count
            with pytest.raises(MergePipeError, match="there is no commit"):
                list(walk(view, [digest]))
        for words in (["log", "evil"], ["log", "evil", "--graph"], ["show", "evil"], ["ls", "evil"]):
            assert main([*words, "--store", str(evil.layout.root)]) in (0, 3, 5)
            assert "Traceback" not in capfd.readouterr().err

    def test_diamonds_are_walked_once(self, evil: Store) -> None:
        """Two to the five-hundredth paths."""
        commit = evil.snapshot("m").commit
        tips = [publish_commit(evil, "evil", replace(commit, message=side)) for side in "ab"]
        for at in range(500):
            parents = tuple(Parent(tip, "expert") for tip in tips)
            tips = [
                publish_commit(evil, "evil", replace(commit, message=f"{side}{at}", parents=parents)) for side in "ab"
            ]
        with evil.catalog.reading() as view:
            assert len(list(walk(view, tips))) == 1002

    def test_counters_that_are_infinite(self, evil: Store) -> None:
        commit = evil.snapshot("m").commit
        data = commit.encode().replace(b'"measured":{', b'"measured":{"a":1e999,')
        digest = hash_record("commit", data)
        evil.catalog.write(lambda view: view.put("commits", digest, data))
        with pytest.raises(DamagedError):
            evil.snapshot_of(digest)


class TestRefs:
    @pytest.mark.parametrize("name", ["../../x", "/etc/x", "\x1b[2J", "a\0b", "auto", "x" * 400, "m~1", "-rf", "a\nb"])
    def test_odd_names_of_a_strangers_refs(
        self, evil: Store, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are shown without moving the cursor, and lead nowhere."""
        publish_commit(evil, name, evil.snapshot("m").commit)
        monkeypatch.chdir(tmp_path)
        before = sorted(path for path in tmp_path.parent.rglob("*") if evil.layout.root not in path.parents)
        commands = (
            ["ls"],
            ["branch"],
            ["log"],
            ["du"],
            ["verify"],
            ["show", name],
            ["export", name, "out"],
            ["ls", name],
        )
        for words in commands:
            if "\0" in "".join(words):
                continue
            code = main([*words, "--store", str(evil.layout.root)])
            out, err = capfd.readouterr()
            assert code == 0 or 2 <= code <= 8, f"{words}: {code}\n{err}"
            assert "\x1b[2J" not in out + err
            assert "Traceback" not in err
        after = sorted(path for path in tmp_path.parent.rglob("*") if evil.layout.root not in path.parents)
        assert {path.relative_to(tmp_path).parts[0] for path in set(after) - set(before)} <= {"out"}

    def test_a_log_that_is_none(self, evil: Store) -> None:
        for row in (b"[]", b"{", b'{"new": 5}', b'{"new": "abc"}', b"{}", b'"x"', b"\xff"):
            evil.catalog.write(lambda view, row=row: view.put("reflog", b"m\0" + (9).to_bytes(8, "big"), row))
            with pytest.raises(MergePipeError):
                evil.resolve("m@{0}")


class TestObjects:
    def test_pipes_in_the_place_of_objects(self, evil: Store, tmp_path: Path) -> None:
        """Nobody writes into them: whoever waited would wait for ever."""
        snapshot = evil.snapshot("m")
        block = snapshot.entry("lm_head.weight").blocks[0]
        node = snapshot.root.nodes["model"]
        for digest in (block, node):
            object_path(evil, digest).unlink()
            os.mkfifo(object_path(evil, digest))
        fresh = Snapshot(evil.reader, snapshot.commit_id, snapshot.commit)
        for use in (lambda: evil.reader.verify(block), lambda: fresh.tensors, lambda: fresh.export(tmp_path / "out")):
            with pytest.raises(DamagedError):
                use()
        assert {block, node} <= {item.id for item in verify(evil).damaged}

    @pytest.mark.parametrize("target", ["/dev/zero", "/dev/null", "/etc/hostname", "nowhere", "."])
    def test_links_in_the_place_of_objects(self, evil: Store, target: str) -> None:
        """What they lead to is no object; it is never returned."""
        block = evil.snapshot("m").entry("lm_head.weight").blocks[0]
        object_path(evil, block).unlink()
        object_path(evil, block).symlink_to(target)
        with pytest.raises(DamagedError):
            evil.snapshot("m").read_tensor("lm_head.weight")
        assert block in {item.id for item in verify(evil).damaged}

    def test_ids_that_objects_do_not_have(self, evil: Store) -> None:
        """Every object in the place of every other one of its size and kind."""
        blocks = [block for entry in evil.snapshot("m").tensors.values() for block in entry.blocks]
        files = {block: object_path(evil, block).read_bytes() for block in dict.fromkeys(blocks)}
        for block, other in zip(files, [*files][1:], strict=False):
            rewrite(object_path(evil, block), files[other])
            with pytest.raises(DamagedError):
                evil.reader.read_piece(block, int.from_bytes(files[other][16:24], "little"))
            rewrite(object_path(evil, block), files[block])

    def test_a_sparse_file_of_a_terabyte(self, evil: Store) -> None:
        block = evil.snapshot("m").entry("lm_head.weight").blocks[0]
        path = object_path(evil, block)
        data = path.read_bytes()
        rewrite(path, data[:HEADER_BYTES])
        os.truncate(path, 1 << 40)
        with pytest.raises(DamagedError, match="more than an object can have"):
            evil.reader.verify(block)


class TestPipes:
    PLACES = (
        "store.json", "refs.journal", "catalog/data.mdb", "catalog/lock.mdb", "tmp/1-1-a/lease.json", "tmp/1-1-a/pins",
        "tmp/1-1-a/relied-on",
    )  # fmt: skip

    @pytest.mark.parametrize("place", PLACES)
    def test_anywhere_in_the_store(self, evil: Store, tmp_path: Path, deep: bool, place: str) -> None:
        """Commands end, with an exit code of theirs: nobody waits for who never writes."""
        evil.close()
        path = evil.layout.root / place
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        more = (["log"], ["gc"], ["recover"], ["du"]) if deep else ()
        for words in (["ls"], ["ingest", str(tmp_path / "m")], ["verify"], ["doctor"], *more):
            done = subprocess.run(
                [sys.executable, "-m", "mergepipe.cli.app", *words, "--store", str(evil.layout.root)],
                capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            assert done.returncode == 0 or 2 <= done.returncode <= 8, f"{words}: {done.stderr}"
            assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 100_000,
            "[]",
            "5",
            '"x"',
            '{"pid": 1e999}',
            '{"pid": ' + "9" * 30 + "}",
            '{"pid": -1}',
            "\ud800",
            "NaN",
        ],
        ids=lambda text: text[:20],
    )
    def test_leases_that_are_none(self, evil: Store, tmp_path: Path, text: str) -> None:
        """Whoever writes judges what other writers left; what cannot be judged stays."""
        from mergepipe.store import leases
        from mergepipe.store.writers import writers

        folder = evil.layout.temporary / "1-1-a"
        folder.mkdir()
        if text.startswith('{"pid"'):  # from this very machine
            text = json.dumps(leases._surroundings())[:-1] + ", " + text[1:]
        (folder / "lease.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        evil.ingest([tmp_path / "m"])
        assert [writer.folder for writer in writers(evil.layout)] == [folder]
