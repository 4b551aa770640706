"""Ingest against a base: what is stored as a delta to what, and what the catalog then knows of the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from mergepipe.store import Digest, Store
from mergepipe.store.analyze import analyze
from mergepipe.store.catalog import ObjectRow
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.frame import Encoding
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.norms import HISTOGRAM_BINS
from mergepipe.store.objects import Role
from mergepipe.store.statistics import block_statistics, pack_histogram, unpack_histogram, unpack_statistics
from support.checkpoints import RawTensor, folder_bytes, raw, write_checkpoint
from support.family import Weights, base_weights, fine_tune, write_family, write_model
from support.stores import assert_clean, catalog_rows, object_path, state_of

KINDS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def rows_of(store: Store) -> dict[Digest, ObjectRow]:
    rows = {}
    with store.catalog.reading() as view:
        for key, _ in view.items("objects"):
            row = view.object_row(Digest(key))
            assert row is not None
            rows[Digest(key)] = row
    return rows


def pairs(store: Store, base: str, ref: str) -> Iterator[tuple[str, TensorEntry, TensorEntry]]:
    """Tensors of two commits that have the same grid and differ."""
    entries = store.snapshot(base).tensors
    for name, entry in store.snapshot(ref).tensors.items():
        if name in entries and entries[name].same_grid(entry) and entries[name].blocks != entry.blocks:
            yield name, entries[name], entry


def values(store: Store, ref: str, name: str) -> NDArray[np.float64]:
    snapshot = store.snapshot(ref)
    return snapshot.read_tensor(name).view(KINDS[snapshot.entry(name).dtype]).astype(np.float64)


def expected_rows(store: Store, base: str, ref: str) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """The rows of ``deltas`` and of ``tensors`` that the catalog should have, from the tensors themselves."""
    deltas: dict[bytes, bytes] = {}
    histograms: dict[bytes, NDArray[np.int64]] = {}
    for name, old, new in pairs(store, base, ref):
        if not DTYPES[new.dtype].has_statistics:
            continue
        before, after = store.snapshot(base).read_tensor(name), store.snapshot(ref).read_tensor(name)
        histogram = np.zeros(HISTOGRAM_BINS, np.int64)
        for index, (one, other) in enumerate(zip(old.blocks, new.blocks, strict=True)):
            (start, size), (old_start, old_size) = new.block_span(index), old.block_span(index)
            row = block_statistics(
                after[start : start + size],
                before[old_start : old_start + old_size],
                new.element_type,
                old.element_type,
                histogram,
            )
            if one != other:
                deltas[one + other] = row.pack()
        histograms[old.id + new.id] = histogram
    return deltas, {key: pack_histogram(histogram) for key, histogram in histograms.items()}


def check_statistics(store: Store, base: str, *refs: str) -> None:
    deltas: dict[bytes, bytes] = {}
    tensors: dict[bytes, bytes] = {}
    for ref in refs:
        more = expected_rows(store, base, ref)
        deltas.update(more[0])
        tensors.update(more[1])
    found = catalog_rows(store, "deltas", "tensors")
    assert found["deltas"] == deltas
    assert found["tensors"] == tensors


def check_content(store: Store, folder: Path, *paths: Path) -> None:
    for path in paths:
        store.snapshot(path.name).export(folder.with_name(f"{folder.name}-out") / path.name)
        assert folder_bytes(folder.with_name(f"{folder.name}-out") / path.name) == folder_bytes(path)


class TestEncodings:
    def test_a_fine_tune_is_stored_as_deltas_and_is_smaller(
        self, make_store: Callable[..., Store], tmp_path: Path
    ) -> None:
        base, (expert, _) = write_family(tmp_path)
        plain, delta = make_store(), make_store()
        for store in (plain, delta):
            store.ingest([base])
        (without,) = plain.ingest([expert])
        (against,) = delta.ingest([expert], base="base")
        # 0.001 on weights of 0.02 moves bfloat16 numbers by many steps: real fine-tunes are smaller still.
        assert against.written_bytes < 0.85 * without.written_bytes
        assert any(row.encoding is Encoding.DELTA for row in rows_of(delta).values())
        assert not any(row.encoding is Encoding.DELTA for row in rows_of(plain).values())
        check_content(delta, tmp_path, base, expert)

    def test_a_deltas_base_is_never_a_delta(self, store: Store, tmp_path: Path) -> None:
        """Each model is ingested against the one before it."""
        weights = base_weights()
        paths = [write_model(tmp_path / "m0", weights)]
        store.ingest(paths)
        for number in range(1, 5):
            weights = fine_tune(weights, number, scale=1e-4)
            paths.append(write_model(tmp_path / f"m{number}", weights))
            store.ingest(paths[-1:], base=f"m{number - 1}")
            check_statistics_of_step(store, number)
        rows = rows_of(store)
        deltas = [row for row in rows.values() if row.encoding is Encoding.DELTA]
        assert len(deltas) > 20
        assert all(row.base is not None and rows[row.base].encoding is not Encoding.DELTA for row in deltas)
        check_content(store, tmp_path, *paths)

    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "I8", "I32", "C64"])
    def test_only_floats_are_worth_a_delta(self, store: Store, tmp_path: Path, dtype: str) -> None:
        generator = np.random.default_rng(0)
        before = generator.integers(0, 256, 4096, np.uint8)
        after = before.copy()
        after[:: DTYPES[dtype].bits // 8] ^= 1
        for name, data in (("base", before), ("m", after)):
            shape = (4096 * 8 // DTYPES[dtype].bits,)
            write_checkpoint(tmp_path / name, {"w": RawTensor(dtype, shape, data.tobytes())})
        store.ingest([tmp_path / "base"])
        store.ingest([tmp_path / "m"], base="base")
        (block,) = store.snapshot("m").entry("w").blocks
        is_delta = rows_of(store)[block].encoding is Encoding.DELTA
        assert is_delta is (dtype in ("BF16", "F16", "F32", "F8_E4M3"))

    def test_another_type_than_the_bases(self, store: Store, tmp_path: Path) -> None:
        weights = base_weights()
        wide: Weights = {name: weight.astype(np.float32) * np.float32(1.001) for name, weight in weights.items()}
        base, expert = write_model(tmp_path / "base", weights), write_model(tmp_path / "expert", wide)
        store.ingest([base])
        store.ingest([expert], base="base")
        assert not any(row.encoding is Encoding.DELTA for row in rows_of(store).values())
        check_statistics(store, "base", "expert")
        check_content(store, tmp_path, expert)

    def test_rows_that_were_added(self, store: Store, tmp_path: Path) -> None:
        weights = base_weights()
        longer = dict(fine_tune(weights, 1))
        longer["lm_head.weight"] = np.concatenate([weights["lm_head.weight"], weights["lm_head.weight"][:9]])
        base, expert = write_model(tmp_path / "base", weights), write_model(tmp_path / "expert", longer)
        store.ingest([base])
        store.ingest([expert], base="base")
        before, after = (store.snapshot(ref).entry("lm_head.weight").blocks for ref in ("base", "expert"))
        assert after[: len(before)] == before
        check_content(store, tmp_path, expert)


def check_statistics_of_step(store: Store, number: int) -> None:
    deltas, tensors = expected_rows(store, f"m{number - 1}", f"m{number}")
    found = catalog_rows(store, "deltas", "tensors")
    assert deltas.items() <= found["deltas"].items()
    assert tensors.items() <= found["tensors"].items()


class TestStatistics:
    def test_every_changed_block_has_a_row_and_no_other(self, store: Store, tmp_path: Path) -> None:
        base, experts = write_family(tmp_path)
        store.ingest([base])
        store.ingest(experts, base="base")
        check_statistics(store, "base", "expert0", "expert1")

    def test_the_numbers_are_those_of_the_difference(self, store: Store, tmp_path: Path) -> None:
        base, (expert, _) = write_family(tmp_path)
        store.ingest([base])
        store.ingest([expert], base="base")
        name = "model.layers.1.mlp.up_proj.weight"
        delta = values(store, "expert0", name) - values(store, "base", name)
        ((_, old, new),) = [pair for pair in pairs(store, "base", "expert0") if pair[0] == name]
        rows = catalog_rows(store, "deltas", "tensors")
        squares = 0.0
        for index, (one, other) in enumerate(zip(old.blocks, new.blocks, strict=True)):
            start, size = new.block_span(index)
            piece = delta[start // 2 : (start + size) // 2]
            found = unpack_statistics(rows["deltas"][one + other])
            assert (found.elements, found.changed) == (piece.size, np.count_nonzero(piece))
            assert found.largest == abs(piece).max()
            np.testing.assert_allclose([found.l2, found.l1], [np.linalg.norm(piece), abs(piece).sum()], rtol=1e-5)
            squares += found.l2**2
        np.testing.assert_allclose(squares, np.sum(delta**2), rtol=1e-5)
        histogram = unpack_histogram(rows["tensors"][old.id + new.id])
        bins = abs(delta).astype(np.float32).view(np.uint32) >> 16
        assert np.array_equal(histogram, np.bincount(bins, minlength=HISTOGRAM_BINS))

    @pytest.mark.parametrize("workers", [1, 2, 5])
    def test_experts_that_share_blocks_share_their_rows(self, store: Store, tmp_path: Path, workers: int) -> None:
        base, experts = write_mixed_family(tmp_path)
        store.ingest([base])
        store.ingest(experts, base="base", workers=workers)
        check_statistics(store, "base", *(path.name for path in experts))
        check_content(store, tmp_path, *experts)

    @pytest.mark.parametrize("workers", [1, 3])
    def test_in_any_order_and_number_at_a_time(
        self, make_store: Callable[..., Store], tmp_path: Path, workers: int
    ) -> None:
        base, experts = write_mixed_family(tmp_path)
        found = []
        for groups in ([experts], [experts[::-1]], [[path] for path in experts], [experts[:2], experts[2:]]):
            store = make_store()
            store.ingest([base])
            for group in groups:
                store.ingest(group, base="base", workers=workers)
            found.append(catalog_rows(store, "deltas", "tensors"))
            check_content(store, tmp_path / store.layout.root.name, *experts)
        assert all(rows == found[0] for rows in found)

    def test_nothing_is_measured_twice(self, store: Store, tmp_path: Path) -> None:
        base, (expert, _) = write_family(tmp_path)
        store.ingest([base])
        store.ingest([expert], base="base")
        before = catalog_rows(store, "deltas", "tensors")
        read = store.reader.counters.decoded[Role.BASE]
        store.ingest([expert], base="base", ref="copy")
        assert catalog_rows(store, "deltas", "tensors") == before
        assert store.reader.counters.decoded[Role.BASE] == read, "the base's blocks were read again"

    def test_only_changed_blocks_of_the_base_are_read(self, store: Store, tmp_path: Path) -> None:
        matrix = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
        changed = matrix.copy()
        changed[2] *= np.float32(1.0001)
        for name, values in (("base", matrix), ("m", changed)):
            write_checkpoint(tmp_path / name, {"w": raw(values)})
        store.ingest([tmp_path / "base"])
        store.ingest([tmp_path / "m"], base="base")
        assert store.reader.counters.decoded[Role.BASE] == 4096
        check_statistics(store, "base", "m")

    def test_infinities_and_nans_are_kept(self, store: Store, tmp_path: Path) -> None:
        weights = base_weights()
        broken = dict(weights)
        broken["lm_head.weight"] = weights["lm_head.weight"].copy()
        broken["lm_head.weight"][0, :3] = [np.nan, np.inf, -np.inf]
        base, expert = write_model(tmp_path / "base", weights), write_model(tmp_path / "expert", broken)
        store.ingest([base])
        store.ingest([expert], base="base")
        check_statistics(store, "base", "expert")
        check_content(store, tmp_path, expert)


def write_mixed_family(folder: Path) -> tuple[Path, list[Path]]:
    """Experts that have some changed blocks in common: each row block of a tensor has three versions.

    Neighbouring blocks of the base are nearly alike, so that a delta taken to the wrong one would be kept.
    """
    generator = np.random.default_rng(0)
    row = generator.standard_normal(1024, np.float32)
    base = np.stack([row * np.float32(1 + number * 1e-6) for number in range(4)])
    versions = [base] + [base + generator.standard_normal(base.shape, np.float32) * np.float32(1e-5) for _ in range(2)]
    choices = [(0, 1, 0, 0), (1, 1, 0, 1), (1, 2, 0, 2), (2, 1, 0, 1), (1, 1, 2, 2)]

    def write(name: str, choice: tuple[int, ...]) -> Path:
        matrix = np.stack([versions[version][number] for number, version in enumerate(choice)])
        return write_checkpoint(folder / name, {"w": raw(matrix), "v": raw(matrix * np.float32(2))})

    return write("base", (0, 0, 0, 0)), [write(f"expert{number}", choice) for number, choice in enumerate(choices)]


class TestSeveralAtOnce:
    def test_a_base_block_is_not_lost_while_another_is_counted(self, store: Store, tmp_path: Path) -> None:
        """The last block of one expert makes its histogram whole, and for that reads blocks of the base again;
        the next expert's delta at the same place is still taken to the right block."""
        base, experts = write_mixed_family(tmp_path)
        store.ingest([base])
        store.ingest(experts[:1], base="base", workers=1)
        store.ingest(experts[1:], base="base", workers=1)
        assert_clean(store)
        check_content(store, tmp_path, *experts)
        check_statistics(store, "base", *(path.name for path in experts))

    def test_together_costs_the_base_once(self, make_store: Callable[..., Store], tmp_path: Path) -> None:
        base, experts = write_family(tmp_path, experts=4)
        read = []
        for groups in ([experts], [[path] for path in experts]):
            store = make_store()
            store.ingest([base])
            before = dict(store.reader.counters.decoded)
            for group in groups:
                store.ingest(group, base="base")
            read.append(sum(store.reader.counters.decoded.values()) - sum(before.values()))
        changed = sum(weight.nbytes for name, weight in base_weights().items() if "proj" in name)
        nodes = read[1] - 4 * changed
        assert 0 < nodes < changed
        assert read[0] < 2 * changed

    def test_a_lost_block_that_the_base_shares_is_repaired(self, store: Store, tmp_path: Path) -> None:
        base, (expert, _) = write_family(tmp_path)
        store.ingest([base])
        store.ingest([expert], base="base")
        lost = store.snapshot("base").entry("lm_head.weight").blocks[1]
        before = state_of(store)
        object_path(store, lost).unlink()
        (again,) = store.ingest([expert], base="base")
        assert again.written_bytes == object_path(store, lost).stat().st_size
        assert state_of(store) == before


class TestAnalyze:
    def test_it_makes_up_for_what_ingest_did_not_know(self, make_store: Callable[..., Store], tmp_path: Path) -> None:
        base, experts = write_mixed_family(tmp_path)
        first, second = make_store(), make_store()
        for store in (first, second):
            store.ingest([base])
        first.ingest(experts, base="base")
        second.ingest(experts)
        for path in experts:
            work = [(old, new) for _, old, new in pairs(second, "base", path.name)]
            assert analyze(second, work).read_bytes == sum(new.nbytes for _, new in work)
        for database in ("deltas", "tensors"):
            assert catalog_rows(first, database) == catalog_rows(second, database)
