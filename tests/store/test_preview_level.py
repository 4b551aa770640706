"""How fine a model's previews are: the choice follows from the two models alone, and keeps to the room there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from mergepipe.store import Store
from mergepipe.store.analyze import analyze, lacking, level_for
from mergepipe.store.drop_previews import drop_previews
from mergepipe.store.preview_level import Candidate, choose_level
from mergepipe.store.previews import COARSE, FINE, read_preview, unpack_row
from support.family import write_model
from support.stores import assert_clean, catalog_rows

Weights = dict[str, NDArray[np.generic]]


def candidate(name: str, nbytes: int, changed: float) -> Candidate:
    """A tensor of so many bytes, and a middle block with so much of it changed."""
    old = np.zeros(4096, np.uint16)
    new = old.copy()
    new[: round(changed * 4096)] = 1
    pair = None if changed == 0 else (new.view(np.uint8), old.view(np.uint8))
    return Candidate(name, nbytes, 16, lambda: pair)


@pytest.mark.parametrize(
    ("changed", "still", "level"),
    [
        (1.0, 0.0, COARSE),  # everything changed: fine previews would take a tenth
        (1.0, 0.5, FINE),  # half did: the same room buys more
        (1.0, 0.2, COARSE),
        (0.25, 0.0, FINE),  # sparse deltas have no previews at all
        (0.0, 0.0, FINE),
    ],
)
def test_by_what_changed(changed: float, still: float, level: int) -> None:
    total = 10**9
    layers = [candidate(f"layer.{n:02}", round((1 - still) * total / 40), changed) for n in range(40)]
    assert choose_level([*layers, candidate("embedding", round(still * total), 0.0)], total) == level


@pytest.mark.parametrize(("size", "bits"), [(4096, 16), (8192, 4)])
def test_blocks_that_cannot_be_compared_count_as_changed(size: int, bits: int) -> None:
    """Of another size than the base's, or of elements that are no whole bytes; their bytes are the base's."""
    pair = np.zeros(size, np.uint8), np.zeros(8192, np.uint8)
    same = Candidate("w", 10**9, 16, lambda: (pair[1], pair[1]))
    other = Candidate("w", 10**9, bits, lambda: pair)
    assert (choose_level([same], 10**9), choose_level([other], 10**9)) == (FINE, COARSE)


def test_few_blocks_are_looked_at() -> None:
    looked: list[str] = []

    def look(name: str) -> Callable[[], None]:
        return lambda: looked.append(name)

    small = [Candidate(f"{n:03}", 10, 16, look(f"{n:03}")) for n in range(100)]
    choose_level([*small, Candidate("large", 1000, 16, look("large"))], 2000)
    assert looked[0] == "large"
    assert len(looked) == 26


def model(seed: int, changed: int) -> Weights:
    """Eight matrices, of which the first ``changed`` differ from those of the base."""
    base = np.random.default_rng(0)
    tuned = np.random.default_rng(seed)
    found: Weights = {}
    for number in range(8):
        weight = base.standard_normal((64, 256), np.float32) * 0.02
        step = tuned.standard_normal((64, 256), np.float32) * 1e-3
        found[f"layer.{number}.weight"] = (weight + step * (number < changed)).astype(ml_dtypes.bfloat16)
    return found


def test_blocks_of_another_type_than_the_bases_are_not_looked_at(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    wide = {name: weight.astype(np.float32) for name, weight in model(1, 8).items()}
    first, second = (make_store(block_bytes=16384) for _ in range(2))
    for store in (first, second):
        store.ingest([write_model(tmp_path / "base", model(0, 0))])
        store.ingest([write_model(tmp_path / "tuned", wide)], base="base", previews=store is first)
    rows = catalog_rows(first, "previews")["previews"]
    assert {key[-1] for key in rows} == {FINE}
    models = second.snapshot("base"), second.snapshot("tuned")
    assert level_for(second, *models) == FINE
    analyze(second, lacking(second, *models, previews=True), previews=FINE)
    assert catalog_rows(second, "previews")["previews"] == rows


@pytest.mark.parametrize(("changed", "level"), [(8, COARSE), (4, FINE)])
def test_ingest_and_analyze_choose_alike(
    make_store: Callable[..., Store], tmp_path: Path, changed: int, level: int
) -> None:
    store = make_store(block_bytes=16384)
    store.ingest([write_model(tmp_path / "base", model(0, 0))])
    folder = write_model(tmp_path / "tuned", model(1, changed))
    store.ingest([folder], base="base", previews=True)
    rows = catalog_rows(store, "previews")["previews"]
    assert {key[-1] for key in rows} == {level}
    for row in rows.values():
        found = unpack_row(row)
        content = np.frombuffer(store.reader.read_piece(found.id, 96 + 258 * 8), np.uint8)
        assert read_preview(content).level == level
    drop_previews(store)
    models = store.snapshot("base"), store.snapshot("tuned")
    assert level_for(store, *models) == level
    analyze(store, lacking(store, *models, previews=True), previews=level)
    assert catalog_rows(store, "previews")["previews"] == rows
    assert_clean(store)
