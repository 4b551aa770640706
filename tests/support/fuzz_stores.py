"""Objects and records, fuzzed: what lies under ``objects/`` in a damaged store, or in a stranger's."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mergepipe.store import Digest, Store
from mergepipe.store.commits import decode_commit
from mergepipe.store.digest import hash_record
from mergepipe.store.errors import MergePipeError
from mergepipe.store.export import export_snapshot
from mergepipe.store.frame import HEADER_BYTES, Encoding, Header, Kind, pack_header, unpack_header
from mergepipe.store.history import walk
from mergepipe.store.previews import read_preview
from mergepipe.store.safetensors_file import read_header
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.zarr_hierarchy import Hierarchy
from support.family import write_family
from support.fuzz import Target, mutate_bytes, mutate_json
from support.stores import object_path, objects_of, rewrite

BLOCK_BYTES = 8192  # the least that has previews
_RECORDS = (Kind.NODE, Kind.COMMIT, Kind.PLAN)
REFS = ("base", "expert0", "expert1", "merged")


def make_zoo(folder: Path) -> Path:
    """A store with objects of every kind and encoding, and the checkpoints that it was made of."""
    from mergepipe.merge import Expert, execute, plan_merge

    base, experts = write_family(folder)
    (base / "noise.bin").write_bytes(np.random.default_rng(0).bytes(3000))
    with Store.create(folder / "store", block_bytes=BLOCK_BYTES) as store:
        store.ingest([base])
        store.ingest(experts, base="base", previews=True)
        plan = plan_merge(store, "base", [Expert("expert0", {"weight": 0.5})], "task_arithmetic")
        execute(store, plan, "merged")
        (folder / "plan.json").write_bytes(plan.encode())
        kinds = {(header.kind, header.encoding) for _, header, _ in _objects(store)}
        assert {kind for kind, _ in kinds} == set(Kind) and {encoding for _, encoding in kinds} == set(Encoding)
    return folder


def _objects(store: Store) -> list[tuple[Digest, Header, bytes]]:
    """Every object, with its file's bytes."""
    found = []
    for digest in (digest for kind in Kind for digest in objects_of(store, kind)):
        data = object_path(store, digest).read_bytes()
        found.append((digest, unpack_header(data[:HEADER_BYTES]), data))
    return found


def _content(store: Store, digest: Digest, header: Header) -> bytes:
    if header.kind in _RECORDS:
        return store.reader.read_record(header.kind, digest)
    return store.reader.read_piece(digest, header.raw_bytes)


class OnStore:
    """A target that works on its own copy of the zoo's store."""

    def __init__(self, zoo: Path, work: Path) -> None:
        self.work = work
        shutil.rmtree(work / "store", ignore_errors=True)
        shutil.copytree(zoo / "store", work / "store")
        self.store = Store.open(work / "store")


class Objects(OnStore):
    """An object's file is other bytes. It is refused, or is what its id says; so is every tensor that it is part of."""

    kinds: tuple[Kind, ...] = (Kind.BLOCK, Kind.FILE, Kind.NODE, Kind.COMMIT, Kind.PLAN)

    def __init__(self, zoo: Path, work: Path) -> None:
        super().__init__(zoo, work)
        found = _objects(self.store)
        self.files = [data for *_, data in found]
        self.by_form: dict[tuple[Kind, Encoding], list[tuple[Digest, Header, bytes]]] = {}
        for item in found:
            if item[1].kind in self.kinds:
                self.by_form.setdefault((item[1].kind, item[1].encoding), []).append(item)
        self.raw = {digest: _content(self.store, digest, header) for digest, header, _ in found}
        self.users = {
            block: (ref, name)
            for ref in REFS
            for name, entry in self.store.snapshot(ref).tensors.items()
            for block in entry.blocks
        }
        self.tensors = {
            user: self.store.snapshot(user[0]).read_tensor(user[1]).tobytes() for user in set(self.users.values())
        }
        self.now: tuple[Digest, Header, bytes]

    def mutate(self, dice: random.Random) -> bytes:
        self.now = dice.choice(self.by_form[dice.choice(sorted(self.by_form))])
        _, header, good = self.now
        if dice.random() < 0.4:
            return mutate_bytes(dice, [good, good, *self.files])
        if dice.random() < 0.05:  # no harm at all: another encoding of the same
            raw = self.raw[self.now[0]]
            return pack_header(Header(header.kind, Encoding.RAW, 1, len(raw), len(raw), None), [raw]) + raw
        # A frame that is right about a payload that is not: only then is the payload looked at.
        payload = mutate_bytes(dice, [good[HEADER_BYTES:]])
        if dice.random() < 0.3:
            raw = dice.choice([header.raw_bytes + dice.choice([-1, 1]), 0, 1, 2**26, 2**30, 2**40, 2**64 - 1])
            header = replace(header, raw_bytes=max(raw, 0))
        if dice.random() < 0.3 and header.encoding is not Encoding.DELTA:
            header = replace(header, encoding=dice.choice([Encoding.RAW, Encoding.PLANES, Encoding.DEFLATE]))
        if header.base is not None and dice.random() < 0.3:
            base = dice.choice([*self.raw, self.now[0]])
            header = replace(header, base=base)
        if dice.random() < 0.2:
            header = replace(header, kind=dice.choice(list(Kind)), width=dice.choice([1, 2, 4, 8]))
        return pack_header(replace(header, payload_bytes=len(payload)), [payload]) + payload

    def check(self, data: bytes) -> str | None:
        digest, header, good = self.now
        path = object_path(self.store, digest)
        rewrite(path, data)
        try:
            wrong = [self._read(digest, header)]
            if digest in self.users:
                user = self.users[digest]
                try:
                    found = self.store.snapshot(user[0]).read_tensor(user[1]).tobytes()
                    assert found == self.tensors[user], "a tensor of wrong bytes"
                except MergePipeError as error:
                    wrong.append(error)
            for error in wrong:
                if error is not None:
                    raise error
            return "read right, refused by verify" if self._verify(digest) else None
        finally:
            rewrite(path, good)

    def _read(self, digest: Digest, header: Header) -> MergePipeError | None:
        try:
            assert _content(self.store, digest, header) == self.raw[digest], "wrong bytes"
        except MergePipeError as error:
            return error
        return None

    def _verify(self, digest: Digest) -> MergePipeError | None:
        try:
            self.store.reader.verify(digest)
        except MergePipeError as error:
            return error
        return None


class PreviewObjects(Objects):
    """The same with previews."""

    kinds = (Kind.PREVIEW,)


class PreviewContents(OnStore):
    """A preview whose content is anything."""

    def __init__(self, zoo: Path, work: Path) -> None:
        super().__init__(zoo, work)
        self.contents = [
            _content(self.store, digest, header)
            for digest, header, _ in _objects(self.store)
            if header.kind is Kind.PREVIEW
        ]

    def mutate(self, dice: random.Random) -> bytes:
        return mutate_bytes(dice, self.contents)

    def check(self, data: bytes) -> str | None:
        try:
            preview = read_preview(np.frombuffer(data, np.uint8))
        except ValueError as error:  # whoever reads one makes a DamagedError of it
            assert str(error)
            return "damaged"
        out = np.empty(min(preview.elements, 1 << 20), np.float32)
        preview.delta_into(0, out)
        assert np.isfinite(out).all() and np.isfinite(preview.residual)
        return None


class Records(OnStore):
    """A node or a commit that is what its id says, and says anything at all: a stranger's store, read and exported."""

    def __init__(self, zoo: Path, work: Path) -> None:
        super().__init__(zoo, work)
        snapshot = self.store.snapshot("expert0")
        self.commit = snapshot.commit
        self.nodes = [
            json.loads(self.store.reader.read_record(Kind.NODE, d)) for d in objects_of(self.store, Kind.NODE)
        ]
        self.nodes += [json.loads(snapshot.root.encode())] * len(self.nodes)
        self.commits = [json.loads(self.store.snapshot(ref).commit.encode()) for ref in REFS]
        self.count = 0

    def mutate(self, dice: random.Random) -> bytes:
        return mutate_json(dice, dice.choice(self.commits if dice.random() < 0.3 else self.nodes))

    def check(self, data: bytes) -> str | None:
        kind = Kind.COMMIT if b'"tree"' in data[:4000] else Kind.NODE
        digest = hash_record(kind.name.lower(), data)
        path = object_path(self.store, digest)
        existed = path.exists()
        if not existed:
            header = Header(kind, Encoding.RAW, 1, len(data), len(data), None)
            path.write_bytes(pack_header(header, [data]) + data)
        try:
            commit = replace(self.commit, tree=digest) if kind is Kind.NODE else self._commit(data, digest)
            return self._use(Snapshot(self.store.reader, commit.id, commit))
        finally:
            if not existed:
                path.unlink()

    def _commit(self, data: bytes, digest: Digest) -> Any:
        commit = decode_commit(self.store.reader.read_record(Kind.COMMIT, digest), "commit")
        self.store.catalog.write(lambda view: view.put("commits", digest, data))
        try:
            with self.store.catalog.reading() as view:
                list(islice(walk(view, [digest]), 100))
        finally:
            self.store.catalog.write(lambda view: view.delete("commits", digest))
        return commit

    def _use(self, snapshot: Snapshot) -> None:
        for key in islice(Hierarchy(snapshot).keys(), 2000):
            assert not {"..", ""} & set(key.split("/")), f"a key that leads elsewhere: {key!r}"
        snapshot.config()
        self.count += 1
        top = self.work / f"out{self.count}"
        try:
            try:
                export_snapshot(snapshot, top / "model", workers=1)
            finally:
                left = {path.name for path in top.iterdir()} if top.exists() else set()
                assert left <= {"model"}, f"left behind: {left}"
            for shard in snapshot.shards:
                header = read_header(top / "model" / shard.path)
                for item in header.entries:  # what was written is what the blocks say
                    entry = snapshot.entry(item.name)
                    assert (entry.dtype, entry.shape) == (item.dtype.name, item.shape)
        finally:
            shutil.rmtree(top, ignore_errors=True)


TARGETS: dict[str, Callable[[Path, Path], Target]] = {
    "objects": Objects,
    "preview objects": PreviewObjects,
    "previews": PreviewContents,
    "records": Records,
}
