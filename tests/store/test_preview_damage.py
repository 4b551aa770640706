"""Previews that are harmed in every way, and rows that lie about them: found, named, and made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mergepipe.store import Digest, Store
from mergepipe.store.analyze import Analysis, analyze, lacking, level_for
from mergepipe.store.check import verify
from mergepipe.store.digest import hash_bytes
from mergepipe.store.frame import HEADER_BYTES, Kind
from mergepipe.store.previews import PreviewRow, unpack_row
from mergepipe.store.publish import Changes, publish
from mergepipe.store.staging import Staging
from support.covered import count
from support.family import write_family
from support.stores import assert_clean, catalog_rows, flip_bit, object_path, objects_of, rewrite, state_of

TENSOR = "model.layers.1.self_attn.q_proj.weight"


class Patient:
    """A store with a base and two experts, and one preview of ``expert0`` in it."""

    def __init__(self, store: Store, folder: Path) -> None:
        base, experts = write_family(folder)
        store.ingest([base])
        store.ingest(experts, base="base", previews=True)
        self.store, self.before, self.experts = store, state_of(store), experts
        self.key, self.row = self.find("expert0", TENSOR)
        self.id = self.row.id
        self.path = object_path(store, self.id)

    def find(self, ref: str, tensor: str) -> tuple[bytes, PreviewRow]:
        (old,), (new,) = (self.store.snapshot(name).entry(tensor).blocks for name in ("base", ref))
        rows = catalog_rows(self.store, "previews")["previews"]
        (key,) = (key for key in rows if key[:-1] == old + new)
        return key, unpack_row(rows[key])

    def put(self, database: str, key: bytes, value: bytes) -> None:
        self.store.catalog.write(lambda view: view.put(database, key, value))

    def repair(self) -> Analysis:
        models = self.store.snapshot("base"), self.store.snapshot("expert0")
        pairs = lacking(self.store, *models, previews=True)
        return analyze(self.store, pairs, previews=level_for(self.store, *models))

    def check_repair(self, count: int = 1) -> None:
        assert self.repair().previews == count
        assert state_of(self.store) == self.before
        assert_clean(self.store)
        assert self.repair() == Analysis()


@pytest.fixture
def patient(make_store: Callable[..., Store], tmp_path: Path) -> Patient:
    return Patient(make_store(block_bytes=8192), tmp_path)


def cut(path: Path) -> None:
    rewrite(path, path.read_bytes()[:-5])


def lengthen(path: Path) -> None:
    rewrite(path, path.read_bytes() + b"\0")


HARMS: dict[str, Callable[[Path], None]] = {
    "delete": Path.unlink,
    "cut": cut,
    "cut the header": lambda path: rewrite(path, path.read_bytes()[: HEADER_BYTES - 1]),
    "lengthen": lengthen,
    "empty": lambda path: rewrite(path, b""),
    "zero": lambda path: rewrite(path, bytes(path.stat().st_size)),
    "flip the kind": lambda path: flip_bit(path, 9),
    "flip the first bit": lambda path: flip_bit(path, HEADER_BYTES),
    "flip one in the middle": lambda path: flip_bit(path, path.stat().st_size // 2, 3),
    "flip the last": lambda path: flip_bit(path, path.stat().st_size - 1, 7),
}


@pytest.mark.parametrize("harm", list(HARMS))
def test_harm_is_found_named_and_made_good(patient: Patient, harm: str) -> None:
    HARMS[harm](patient.path)
    count(damages=1)
    for ref in (None, "expert0"):
        (found,) = verify(patient.store, ref).damaged
        assert (found.id, found.kind, found.used_by) == (patient.id, "preview", (f"expert0:{TENSOR}",))
    assert verify(patient.store, "expert1").damaged == ()
    assert catalog_rows(patient.store, "damaged")["damaged"].keys() == {patient.id}
    patient.check_repair()


@pytest.mark.parametrize("harm", ["delete", "cut", "lengthen", "empty"])
def test_what_is_lost_needs_no_verify(patient: Patient, harm: str) -> None:
    HARMS[harm](patient.path)
    count(damages=1)
    assert verify(patient.store, fast=True).damaged[0].id == patient.id
    patient.check_repair()


def test_an_ingest_with_previews_repairs_too(patient: Patient) -> None:
    flip_bit(patient.path, 300)
    verify(patient.store)
    (result,) = patient.store.ingest([patient.experts[0]], base="base", previews=True)
    assert (result.unchanged, result.previews, result.preview_bytes) == (True, 1, patient.row.stored_bytes)
    assert state_of(patient.store) == patient.before


def test_every_bit_of_the_header_counts(patient: Patient) -> None:
    intact = patient.path.read_bytes()
    for number, position in enumerate([0, 8, 9, 10, 11, 12, 16, 23, 24, 31, 32, 63, 64, 95]):
        flip_bit(patient.path, position, number % 8)
        assert {item.id for item in verify(patient.store).damaged} == {patient.id}, f"byte {position}"
        rewrite(patient.path, intact)
    assert_clean(patient.store)


@pytest.mark.parametrize("kind", [Kind.PREVIEW, Kind.BLOCK, Kind.NODE])
def test_files_that_were_swapped(patient: Patient, kind: Kind) -> None:
    other = next(digest for digest in objects_of(patient.store, kind) if digest != patient.id)
    where = object_path(patient.store, other)
    mine, theirs = patient.path.read_bytes(), where.read_bytes()
    rewrite(patient.path, theirs)
    rewrite(where, mine)
    assert {patient.id, other} <= {item.id for item in verify(patient.store).damaged}
    rewrite(where, theirs)
    verify(patient.store)
    patient.check_repair()


def test_another_previews_content_under_a_fitting_id(patient: Patient) -> None:
    """A whole object of the right kind that is no preview at all."""
    content = np.frombuffer(b"MPPV" * 500, np.uint8)
    digest = hash_bytes(content.data)
    with Staging(patient.store.layout, patient.store.catalog) as staging:
        assert staging.claim(digest)
        row = staging.add_preview(digest, content, 10**6)
        assert row is not None
        changed = PreviewRow(digest, row.stored_bytes, patient.row.residual).pack()
        publish(patient.store.catalog, staging, Changes(previews={patient.key: changed}))
    (found,) = verify(patient.store).damaged
    assert (found.id, found.kind, found.used_by) == (digest, "preview", (f"expert0:{TENSOR}",))
    assert "no preview" in found.reason
    assert patient.repair().previews == 1
    assert patient.find("expert0", TENSOR) == (patient.key, patient.row)
    object_path(patient.store, digest).unlink()
    patient.store.catalog.write(lambda view: [view.delete(name, digest) for name in ("objects", "damaged")])
    assert state_of(patient.store) == patient.before


class TestRows:
    def test_another_norm(self, patient: Patient) -> None:
        row = PreviewRow(patient.id, patient.row.stored_bytes, patient.row.residual / 2)
        patient.put("previews", patient.key, row.pack())
        assert verify(patient.store, fast=True).damaged == ()
        (found,) = verify(patient.store).damaged
        assert (found.id, found.kind, found.used_by) == (patient.id, "preview", (f"expert0:{TENSOR}",))
        patient.check_repair()

    def test_another_size(self, patient: Patient) -> None:
        row = PreviewRow(patient.id, patient.row.stored_bytes - 1, patient.row.residual)
        patient.put("previews", patient.key, row.pack())
        for fast in (True, False):
            (found,) = verify(patient.store, fast=fast).damaged
            assert (found.id, found.kind) == (patient.id, "preview")
        patient.check_repair()

    def test_the_preview_of_another_block(self, patient: Patient) -> None:
        key, row = patient.find("expert0", "model.layers.2.self_attn.q_proj.weight")
        patient.put("previews", patient.key, row.pack())
        (found,) = verify(patient.store).damaged
        assert found.id == row.id
        assert set(found.used_by) == {f"expert0:{TENSOR}", "expert0:model.layers.2.self_attn.q_proj.weight"}
        patient.check_repair(2)
        assert patient.find("expert0", "model.layers.2.self_attn.q_proj.weight") == (key, row)

    def test_no_preview_at_all(self, patient: Patient) -> None:
        """The block that the row names is well: it gets no mark."""
        block = Digest(patient.key[32:64])
        patient.put("previews", patient.key, PreviewRow(block, patient.row.stored_bytes, 0.5).pack())
        for fast in (True, False):
            (found,) = verify(patient.store, fast=fast).damaged
            assert (found.id, found.kind) == (block, "preview")
            assert "no preview" in found.reason
        assert catalog_rows(patient.store, "damaged") == {"damaged": {}}
        patient.check_repair()

    def test_an_object_that_is_not_there(self, patient: Patient) -> None:
        nowhere = hash_bytes(b"nowhere")
        patient.put("previews", patient.key, PreviewRow(nowhere, 100, 0.5).pack())
        for fast in (True, False):
            (found,) = verify(patient.store, fast=fast).damaged
            assert (found.id, found.kind, found.used_by) == (nowhere, "preview", (f"expert0:{TENSOR}",))
        patient.check_repair()

    @pytest.mark.parametrize("row", [b"x", bytes(47), bytes(46) + b"\xf0\x7f"])
    def test_one_that_cannot_be_read(self, patient: Patient, row: bytes) -> None:
        patient.put("previews", patient.key, row)
        for ref in (None, "expert0"):
            (found,) = verify(patient.store, ref).damaged
            assert (found.id, found.kind) == (patient.key[32:64], "preview")
            assert f"expert0:{TENSOR}" in found.used_by
        assert verify(patient.store, "expert1").damaged == ()
        assert catalog_rows(patient.store, "damaged") == {"damaged": {}}
        patient.check_repair()

    def test_the_objects_own_row(self, patient: Patient) -> None:
        before = catalog_rows(patient.store, "objects")["objects"][patient.id]
        changed = bytearray(before[:24] + bytes(8) + before[24:])
        changed[16] ^= 1
        patient.put("objects", patient.id, bytes(changed))
        assert {item.id for item in verify(patient.store).damaged} == {patient.id}
        patient.check_repair()
        patient.store.catalog.write(lambda view: view.delete("objects", patient.id))
        (found,) = verify(patient.store).damaged
        assert (found.id, found.kind) == (patient.id, "preview")
        patient.check_repair()

    def test_none_is_no_damage(self, patient: Patient) -> None:
        patient.store.catalog.write(lambda view: view.delete("previews", patient.key))
        assert_clean(patient.store)
        patient.check_repair()
