"""The damage grid: every kind of object, harmed in every way. It is never returned as good, and never hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mergepipe.store import Digest, Store
from mergepipe.store.catalog import DATABASES, Writing
from mergepipe.store.check import verify
from mergepipe.store.errors import DamagedError, MergePipeError
from mergepipe.store.frame import HEADER_BYTES, Encoding, Kind
from support.checkpoints import folder_bytes
from support.covered import count
from support.family import write_family
from support.stores import assert_clean, catalog_rows, flip_bit, object_path, rewrite, state_of


@dataclass(frozen=True)
class Subject:
    """One object, and the refs whose content needs it."""

    digest: Digest
    needed_by: tuple[str, ...]


class Patient:
    """A store with a base and an expert, and one object of each kind in it."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.paths = {name: folder / name for name in ("base", "expert0")}
        base, expert = self.store.snapshot("base"), self.store.snapshot("expert0")
        layer = "model.layers.1.self_attn.q_proj.weight"
        both, alone = ("base", "expert0"), ("expert0",)
        nodes = expert.node(expert.node(expert.root.nodes["model"]).nodes["layers"]).nodes
        self.subjects = {
            "planes": Subject(base.entry("lm_head.weight").blocks[1], both),
            "base of a delta": Subject(base.entry(layer).blocks[0], both),
            "delta": Subject(expert.entry(layer).blocks[0], alone),
            "raw": Subject(base.files["noise.bin"].blocks[0], ("base",)),
            "file": Subject(expert.files["tokenizer.json"].blocks[0], both),
            "header of a shard": Subject(expert.shards[0].header.blocks[0], both),
            "node": Subject(nodes["1"], alone),
            "root": Subject(expert.commit.tree, alone),
            "commit": Subject(expert.commit_id, ()),  # the catalog has a copy, from which everything is read
        }

        self.files = {path: path.read_bytes() for path in self._object_files()}
        self.rows = all_rows(self.store)

    def _object_files(self) -> list[Path]:
        return [path for path in self.store.layout.objects.glob("*/*") if path.is_file()]

    def heal(self) -> None:
        """Put back every file and row that a test changed, without the code under test."""
        for path in set(self._object_files()) - set(self.files):
            path.unlink()
        for path, content in self.files.items():
            if not path.exists() or path.read_bytes() != content:
                rewrite(path, content)

        def change(view: Writing) -> None:
            for database, rows in self.rows.items():
                now = dict(view.items(database))
                for key in now.keys() - rows.keys():
                    view.delete(database, key)
                for key, value in rows.items():
                    view.put(database, key, value)

        self.store.catalog.write(change)

    def path(self, kind: str) -> Path:
        return object_path(self.store, self.subjects[kind].digest)

    def ingest_again(self) -> None:
        self.store.ingest([self.paths["base"]])
        self.store.ingest([self.paths["expert0"]], base="base")


KINDS = [
    "planes", "base of a delta", "delta", "raw", "file", "header of a shard", "node", "root", "commit",
]  # fmt: skip


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    folder = tmp_path_factory.mktemp("damage")
    base, (expert, _) = write_family(folder)
    (base / "noise.bin").write_bytes(np.random.default_rng(0).bytes(3000))
    with Store.create(folder / "store", block_bytes=4096) as store:
        store.ingest([base])
        store.ingest([expert], base="base")
        rows = catalog_rows(store, "objects")["objects"]
        assert {Encoding(row[1]) for row in rows.values()} == set(Encoding)
        # test_preview_damage has the previews
        assert {Kind(row[0]) for row in rows.values()} == set(Kind) - {Kind.PLAN, Kind.PREVIEW}
        yield Patient(store, folder)


@pytest.fixture
def patient(ward: Patient) -> Iterator[Patient]:
    """A store with a base and an expert; what a test did to it is undone."""
    yield ward
    ward.heal()


def all_rows(store: Store) -> dict[str, dict[bytes, bytes]]:
    with store.catalog.reading() as view:
        return {database: dict(view.items(database)) for database in DATABASES}


def truncate(path: Path) -> None:
    rewrite(path, path.read_bytes()[: HEADER_BYTES + 5])


def cut_header(path: Path) -> None:
    rewrite(path, path.read_bytes()[: HEADER_BYTES - 1])


def lengthen(path: Path) -> None:
    rewrite(path, path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    rewrite(path, b"")


def zero(path: Path) -> None:
    """What a power cut leaves of a file whose content was not flushed."""
    rewrite(path, bytes(path.stat().st_size))


def flip_last(path: Path) -> None:
    flip_bit(path, path.stat().st_size - 1, 7)


def flip_first(path: Path) -> None:
    flip_bit(path, HEADER_BYTES)


LOSSES: dict[str, Callable[[Path], None]] = {
    "delete": Path.unlink,
    "truncate": truncate,
    "cut the header": cut_header,
    "lengthen": lengthen,
    "empty": empty,
}
CHANGES: dict[str, Callable[[Path], None]] = {
    "zero": zero,
    "flip the last bit": flip_last,
    "flip the first": flip_first,
}


def check_reading(patient: Patient, kind: str, folder: Path) -> None:
    """Whoever needs the object gets an error that names it; everybody else gets the right bytes."""
    subject = patient.subjects[kind]
    for name, path in patient.paths.items():
        target = folder / "read" / name
        if name in subject.needed_by:
            with pytest.raises(DamagedError) as caught:
                patient.store.snapshot(name).export(target)
            assert subject.digest.short in caught.value.message
            assert "mp verify" in (caught.value.hint or "")
            assert not target.exists()
        else:
            patient.store.snapshot(name).export(target)
            assert folder_bytes(target) == folder_bytes(path)


def check_report(patient: Patient, kind: str) -> None:
    """Verify finds it, says what needs it, and remembers it."""
    digest = patient.subjects[kind].digest
    found = {item.id: item for item in verify(patient.store).damaged}
    assert digest in found
    users = " ".join(found[digest].used_by)
    for name in patient.subjects[kind].needed_by or ("expert0",):
        assert name in users
    assert digest in catalog_rows(patient.store, "damaged")["damaged"]


class TestGrid:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("harm", list(LOSSES))
    def test_what_is_lost_is_found_and_repaired_by_ingesting_again(
        self, patient: Patient, tmp_path: Path, kind: str, harm: str
    ) -> None:
        before = state_of(patient.store)
        LOSSES[harm](patient.path(kind))
        count(damages=1)
        check_reading(patient, kind, tmp_path)
        patient.ingest_again()
        assert state_of(patient.store) == before
        assert_clean(patient.store)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("harm", list(CHANGES))
    def test_what_is_changed_is_found_and_repaired_after_verify(
        self, patient: Patient, tmp_path: Path, kind: str, harm: str
    ) -> None:
        before = state_of(patient.store)
        CHANGES[harm](patient.path(kind))
        count(damages=1)
        check_reading(patient, kind, tmp_path)
        check_report(patient, kind)
        patient.ingest_again()
        assert state_of(patient.store) == before
        assert_clean(patient.store)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_lost_is_reported(self, patient: Patient, kind: str) -> None:
        path = patient.path(kind)
        intact = path.read_bytes()
        for harm in LOSSES.values():
            harm(path)
            count(damages=1)
            check_report(patient, kind)
            rewrite(path, intact)
        assert_clean(patient.store)

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_bit_of_a_header_counts_and_none_gives_wrong_bytes(
        self, patient: Patient, tmp_path: Path, kind: str
    ) -> None:
        """A bit of the check or of a field that reading does not need may pass while reading; verify finds it."""
        path = patient.path(kind)
        intact = path.read_bytes()
        name = "base" if kind == "raw" else "expert0"
        original = folder_bytes(patient.paths[name])
        for number, position in enumerate([0, 8, 9, 10, 11, 12, 16, 23, 24, 31, 32, 63, 64, 95]):
            flip_bit(path, position, number % 8)
            count(damages=1)
            damaged = {item.id for item in verify(patient.store).damaged}
            assert patient.subjects[kind].digest in damaged, f"byte {position}"
            target = tmp_path / str(number)
            try:
                patient.store.snapshot(name).export(target)
            except DamagedError:
                assert not target.exists()
            else:
                assert folder_bytes(target) == original, f"byte {position}"
            rewrite(path, intact)
        assert_clean(patient.store)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("planes", "base of a delta"),
            ("delta", "planes"),
            ("delta", "base of a delta"),
            ("raw", "file"),
            ("node", "root"),
            ("commit", "root"),
            ("planes", "node"),
            ("file", "header of a shard"),
        ],
    )
    def test_files_that_were_swapped(self, patient: Patient, tmp_path: Path, one: str, other: str) -> None:
        paths = [patient.path(one), patient.path(other)]
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, reversed(contents), strict=True):
            rewrite(path, content)
        count(damages=2)
        damaged = {item.id for item in verify(patient.store).damaged}
        assert {patient.subjects[one].digest, patient.subjects[other].digest} <= damaged
        for name, path in patient.paths.items():
            needed = {name in patient.subjects[kind].needed_by for kind in (one, other)}
            target = tmp_path / "read" / name
            if True in needed:
                with pytest.raises(MergePipeError):
                    patient.store.snapshot(name).export(target)
                assert not target.exists()
            else:
                patient.store.snapshot(name).export(target)
                assert folder_bytes(target) == folder_bytes(path)
        patient.ingest_again()
        assert_clean(patient.store)


class TestTheBaseOfADelta:
    def test_it_is_named_when_the_delta_is_read(self, patient: Patient) -> None:
        """The delta's own file is whole: what is to be repaired is the base's."""
        flip_last(patient.path("base of a delta"))
        with pytest.raises(DamagedError) as caught:
            patient.store.snapshot("expert0").read_tensor("model.layers.1.self_attn.q_proj.weight")
        assert patient.subjects["base of a delta"].digest.short in caught.value.message

    def test_an_expert_is_not_stored_against_it(self, patient: Patient) -> None:
        flip_last(patient.path("base of a delta"))
        before = state_of(patient.store)
        with pytest.raises(DamagedError):
            patient.store.ingest([patient.folder / "expert1"], base="base")
        assert state_of(patient.store) == before
        patient.store.ingest([patient.folder / "expert1"])
        verify(patient.store)
        patient.ingest_again()
        patient.store.ingest([patient.folder / "expert1"], base="base")
        assert_clean(patient.store)


class TestTheCatalogsCopies:
    def test_a_commits_row(self, patient: Patient) -> None:
        digest = patient.subjects["commit"].digest
        patient.store.catalog.write(lambda view: view.put("commits", digest, b"{}"))
        with pytest.raises(DamagedError, match=digest.short):
            patient.store.snapshot("expert0")

    def test_an_objects_row_that_says_something_else(self, patient: Patient) -> None:
        digest = patient.subjects["planes"].digest
        row = bytearray(catalog_rows(patient.store, "objects")["objects"][digest])
        row[16] ^= 1  # its stored size
        whole = bytes(row[:24]) + bytes(8) + bytes(row[24:])
        patient.store.catalog.write(lambda view: view.put("objects", digest, whole))
        (found,) = verify(patient.store).damaged
        assert found.id == digest
        assert "catalog row" in found.reason
        patient.ingest_again()
        assert_clean(patient.store)

    def test_an_objects_row_that_is_gone(self, patient: Patient) -> None:
        """An object exists if and only if the catalog has its row: it is missing, and is written anew."""
        before = state_of(patient.store)
        digest = patient.subjects["planes"].digest
        patient.store.catalog.write(lambda view: view.delete("objects", digest))
        found = {item.id: item for item in verify(patient.store).damaged}
        assert digest in found
        patient.ingest_again()
        assert state_of(patient.store) == before
        assert_clean(patient.store)
