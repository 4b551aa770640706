"""Previews from the command line: made at ingest or later, shown, checked, dropped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.family import write_model
from support.stores import flip_bit

TENSORS = 6  # that differ between the base and an expert, each of one block


@pytest.fixture
def filled(here: Path, family: Path, call) -> Path:
    """``here`` with a base and two experts in blocks of the usual size, without previews."""
    call("ingest", family / "base")
    call("ingest", family / "expert0", family / "expert1", "--base", "base")
    return here


@pytest.fixture
def previewed(filled: Path, call) -> Path:
    call("analyze", "expert0", "expert1", "--previews")
    return filled


class TestIngest:
    def test_it_says_what_was_made(self, call, here: Path, family: Path) -> None:
        call("ingest", family / "base")
        answer = call("ingest", family / "expert0", "--base", "base", "--previews")
        assert f"; {TENSORS} previews made, " in answer.out
        (item,) = call("ingest", family / "expert1", "--base", "base", "--previews", "--json").json
        assert item["previews"] == TENSORS
        assert 0 < item["preview_bytes"] < 0.15 * item["raw_bytes"]
        again = call("ingest", family / "expert1", "--base", "base", "--previews")
        assert "as it was, nothing to write\n" in again.out
        call("verify")
        assert (here / ".mp").is_dir()

    def test_not_by_default(self, call, here: Path, family: Path) -> None:
        call("ingest", family / "base")
        for words in ([], ["--no-previews"]):
            (item,) = call("ingest", family / "expert0", "--base", "base", *words, "--json").json
            assert (item["previews"], item["preview_bytes"]) == (0, 0)
        assert here.is_dir()

    def test_a_store_that_has_it_all_but_previews(self, call, filled: Path, family: Path) -> None:
        answer = call("ingest", family / "expert0", "--base", "base", "--previews")
        assert f"as it was, nothing to write; {TENSORS} previews made" in answer.out
        assert filled.is_dir()

    def test_without_a_base(self, call, here: Path, family: Path) -> None:
        answer = call("ingest", family / "base", "--previews", "--json", code=2)
        assert answer.error["error"] == "usage"
        assert "--base" in answer.error["hint"]
        assert not (here / ".mp").exists()

    def test_help_shows_both_forms(self, call) -> None:
        assert "--previews/--no-previews" in call("ingest", "--help").out


@pytest.mark.usefixtures("filled")
class TestAnalyze:
    def test_it_makes_previews_once(self, call) -> None:
        first, second = call("analyze", "expert0", "expert1", "--previews", "--json").json
        assert [(item["ref"], item["base"]) for item in (first, second)] == [("expert0", "base"), ("expert1", "base")]
        for item in (first, second):
            assert item["tensors"] == item["previews"] == TENSORS
            assert 0 < item["read_bytes"] < 2 * item["raw_bytes"]
            assert 0 < item["preview_bytes"] < 0.15 * item["previewed_bytes"]
        for item in call("analyze", "expert0", "expert1", "--previews", "--json").json:
            counts = ("tensors", "raw_bytes", "read_bytes", "previews", "preview_bytes", "previewed_bytes")
            assert [item[name] for name in counts] == [0] * 6
        assert "nothing was missing, nothing was read" in call("analyze", "expert0", "--previews").out

    def test_in_words(self, call) -> None:
        out = call("analyze", "expert0", "--previews").out
        assert out.startswith(f"expert0  against base: {TENSORS} tensors measured, ")
        assert f"{TENSORS} previews made" in out
        assert "% of their blocks" in out

    def test_statistics_alone(self, call, family: Path) -> None:
        call("ingest", family / "expert0", "--ref", "alone/expert0")
        assert "nothing was missing" in call("analyze", "alone/expert0", "--base", "base").out, "blocks are the same"
        answer = call("analyze", "expert0", "--base", "expert1")
        assert f"against expert1: {TENSORS} tensors measured, " in answer.out
        assert "preview" not in answer.out
        assert "nothing was missing" in call("analyze", "expert0", "--base", "expert1").out

    def test_one_without_a_base(self, call) -> None:
        answer = call("analyze", "base", "--json", code=2)
        assert "without a base" in answer.error["message"]
        assert "--base" in answer.error["hint"]
        call("analyze", "expert0", "--base", "nobody", code=3)
        call("analyze", "nobody", code=3)

    def test_all_refs_are_looked_at_first(self, call) -> None:
        call("analyze", "expert0", "base", "--previews", code=2)
        assert call("du", "--json").json["previews"] == 0

    def test_models_that_have_nothing_in_common(self, call, tmp_path: Path) -> None:
        call("ingest", write_model(tmp_path / "other", {"x": np.ones(2, np.float32)}))
        answer = call("analyze", "other", "--base", "base", "--json", code=4)
        assert "none of the 1 tensors" in answer.error["message"]

    def test_an_adapter(self, call, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "lora", {"x.lora_A.weight": np.ones((2, 2), np.float32)})
        (folder / "adapter_config.json").write_text('{"r": 2}')
        call("ingest", folder)
        for words in ([], ["--base", "base"]):
            answer = call("analyze", "lora", *words, "--previews", "--json", code=2)
            assert "is an adapter" in answer.error["message"]


class TestDiskUse:
    def test_previews_have_a_line_and_a_column(self, call, previewed: Path) -> None:
        out = call("du").out
        assert out.splitlines()[0].split() == ["ref", "logical", "stored", "alone", "previews"]
        assert f"of that in {2 * TENSORS} previews, " in out
        assert previewed.is_dir()

    def test_all_adds_up(self, call, previewed: Path) -> None:
        found = call("du", "--json").json
        files = [path.stat().st_size for path in (previewed / ".mp" / "objects").glob("*/*")]
        assert (found["objects"], found["stored_bytes"]) == (len(files), sum(files))
        by_ref = {ref["ref"]: ref for ref in found["refs"]}
        assert (by_ref["base"]["previews"], by_ref["base"]["preview_bytes"]) == (0, 0)
        for name in ("previews", "preview_bytes", "previewed_bytes"):
            assert found[name] == sum(by_ref[ref][name] for ref in ("expert0", "expert1"))
        dropped = call("gc", "--previews", "--apply", "--json").json
        after = call("du", "--json").json
        assert after["stored_bytes"] == found["stored_bytes"] - dropped["freed_bytes"]
        assert after["objects"] == found["objects"] - dropped["previews"]
        for ref in after["refs"]:
            assert {**by_ref[ref["ref"]], "previews": 0, "preview_bytes": 0, "previewed_bytes": 0} == ref

    def test_nothing_is_said_where_there_are_none(self, call, filled: Path) -> None:
        assert "preview" not in call("du").out
        assert filled.is_dir()


@pytest.mark.usefixtures("previewed")
class TestDropping:
    def test_a_dry_run_by_default(self, call) -> None:
        found = call("gc", "--previews", "--json").json
        assert (found["applied"], found["previews"]) == (False, 2 * TENSORS)
        assert found["freed_bytes"] == call("du", "--json").json["preview_bytes"]
        assert f"{2 * TENSORS} previews would go" in call("gc", "--previews").out
        assert call("du", "--json").json["previews"] == 2 * TENSORS

    def test_for_good_and_back(self, call) -> None:
        before = call("du", "--json").json
        assert f"dropped {2 * TENSORS} previews: " in call("gc", "--previews", "--apply").out
        assert "there are no previews" in call("gc", "--previews").out
        call("verify")
        call("analyze", "expert0", "expert1", "--previews")
        assert call("du", "--json").json == before
        call("verify")


def test_verify_says_how_to_repair_them(call, previewed: Path) -> None:
    preview = next(path for path in sorted((previewed / ".mp" / "objects").glob("*/*")) if path.read_bytes()[9] == 6)
    flip_bit(preview, -1)
    answer = call("verify", code=5)
    assert f"damaged  preview {preview.parent.name}{preview.name[:10]}" in answer.out
    assert "needed by expert" in answer.out
    assert "mp analyze REF --previews" in answer.err
    assert "Ingest the same" not in answer.err
    call("analyze", "expert0", "expert1", "--previews")
    call("verify")


def test_a_budget_is_spent_on_them(call, previewed: Path) -> None:
    """The commands are one: what was made here is what a plan reads."""
    words = ("--base", "base", "--expert", "expert0:0.5", "--method", "task_arithmetic", "--budget", "20%")
    coarse = call("plan", *words, "-o", "p.json", "--json").json
    exact = call("plan", *words, "--exact-only", "-o", "q.json", "--json").json
    assert coarse["expert_bytes"] <= coarse["budget_bytes"]
    assert 0 == exact["preview_blocks"] < coarse["preview_blocks"]
    assert coarse["bound"]["absolute"] < exact["bound"]["absolute"]
    call("merge", "--plan", "p.json", "--as", "merged/v1")
    call("gc", "--previews", "--apply")
    call("merge", "--plan", "p.json", "--as", "merged/v2", code=4)
    call("analyze", "expert0", "--previews")
    call("merge", "--plan", "p.json", "--as", "merged/v2")
    assert previewed.is_dir()
