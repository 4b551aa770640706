"""``mp repack``, ``mp heal`` and ``mp doctor`` as people and scripts see them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.checkpoints import folder_bytes


@pytest.fixture
def unbased(call, here: Path, family: Path) -> Path:
    """``here`` with a store in which the expert came in without its base."""
    call("init", "--block-size", "4KiB")
    call("ingest", family / "base")
    call("ingest", family / "expert0")
    return here


class TestRepack:
    def test_it_says_what_and_then_does_it(self, call, unbased: Path, family: Path) -> None:
        before = call("du", "--json").json["stored_bytes"]
        said = call("repack").out
        assert "expert0 against base" in said
        assert "would be saved" in said
        assert "--apply" in said
        assert call("du", "--json").json["stored_bytes"] == before
        done = call("repack", "expert0", "--base", "base", "--apply").out
        assert "became" in done
        assert call("du", "--json").json["stored_bytes"] < before
        call("verify")
        call("export", "expert0", "out")
        assert folder_bytes(unbased / "out") == folder_bytes(family / "expert0")
        assert "nothing to gain" in call("repack", "--apply").out

    @pytest.mark.usefixtures("unbased")
    def test_json(self, call) -> None:
        planned = call("repack", "--json").json
        assert (planned["applied"], [model["ref"] for model in planned["models"]]) == (False, ["base", "expert0"])
        assert set(planned["models"][0]) == {
            "ref", "commit", "base", "blocks", "measured", "replaced", "before_bytes", "after_bytes", "saved_bytes",
            "estimate", "unreadable", "left",
        }  # fmt: skip
        done = call("repack", "--apply", "--json").json
        assert done["applied"]
        assert done["saved_bytes"] == planned["saved_bytes"] > 0
        assert done["models"][1]["base"] == "base"

    @pytest.mark.usefixtures("unbased")
    def test_mistakes(self, call) -> None:
        call("repack", "nobody", code=3)
        call("repack", "expert0", "--base", "nobody", code=3)
        assert "REF" in call("repack", "--base", "base", code=2).err

    def test_while_somebody_writes(self, call, unbased: Path) -> None:
        (unbased / ".mp" / "tmp" / "1-1-0").mkdir()
        answer = call("repack", "--apply", "--json", code=6)
        assert answer.error["error"] == "conflict"
        assert "goes on where it stopped" in answer.error["hint"]


class TestHeal:
    def harm(self, store: Path) -> None:
        for path in sorted(store.glob("objects/a*/*")):
            path.unlink()

    def test_from_a_copy(self, call, filled: Path) -> None:
        shutil.copytree(filled / ".mp", filled / "copy")
        self.harm(filled / ".mp")
        report = call("heal", "--from", "copy", "--json").json
        assert report["source"] == "store"
        assert report["healed"]
        assert (report["missing"], report["refused"]) == ([], [])
        assert set(report["healed"][0]) == {"id", "kind", "stored_bytes"}
        call("verify")
        assert "nothing is damaged or missing" in call("heal", "--from", "copy").out

    def test_what_is_still_missing(self, call, filled: Path, family: Path) -> None:
        self.harm(filled / ".mp")
        answer = call("heal", "--from", family / "base", code=5)
        assert "missing" in answer.out
        assert "another --from" in answer.err
        missing = call("heal", "--from", family / "base", "--json", code=5).json["missing"]
        assert set(missing[0]) == {"id", "kind", "reason"}
        call("heal", "--from", family / "expert0", code=5)
        call("heal", "--from", family / "expert1", "--verify")
        call("verify")

    def test_mistakes(self, call, filled: Path) -> None:
        call("heal", code=2)
        call("heal", "--from", "nowhere", code=3)
        call("heal", "--from", filled, code=2)


class TestDoctor:
    @pytest.mark.usefixtures("filled")
    def test_words(self, call) -> None:
        text = call("doctor").out
        assert "objects have their files, of the right size" in text
        assert text.splitlines()[-1].startswith("0 problems, ")

    def test_json_and_exit_codes(self, call, filled: Path) -> None:
        found = call("doctor", "--json").json
        assert found["store"] == str(filled / ".mp")
        assert set(found["findings"][0]) == {"check", "level", "text", "advice"}
        assert {each["level"] for each in found["findings"]} <= {"ok", "warning", "problem"}
        next((filled / ".mp" / "objects").glob("*/*")).unlink()
        found = call("doctor", "--json", code=5).json
        assert "problem" in {each["level"] for each in found["findings"]}

    def test_without_a_store(self, call) -> None:
        assert json.loads(call("doctor", "--json", code=3).out)["store"] is None

    def test_without_a_catalog(self, call, filled: Path) -> None:
        shutil.rmtree(filled / ".mp" / "catalog")
        assert "mp recover" in call("doctor", code=5).out
