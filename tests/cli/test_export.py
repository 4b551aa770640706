"""``mp export`` of a merge: with a model card and the plan, generated, and only where they are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mergepipe.store import Store
from support.checkpoints import folder_bytes

MADE = {"README.md", "mergepipe_plan.json"}


@pytest.fixture
def documented(call, merged: Path, family: Path) -> Path:
    """The same, and ``mine``: a merge whose base has a README.md and a plan of its own."""
    folder = merged / "source"
    folder.mkdir()
    for name, data in folder_bytes(family / "base").items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The base's own card\n")
    (folder / "mergepipe_plan.json").write_text("of an earlier merge\n")
    call("ingest", "source", "--base", "base")
    call("plan", "--base", "source", "--expert", "expert0:1", "--method", "task_arithmetic", "-o", "p.json")
    call("merge", "--plan", "p.json", "--as", "mine")
    return merged


def front_matter(text: str) -> dict[str, object]:
    head, _, _ = text.removeprefix("---\n").partition("\n---\n")
    return dict(yaml.safe_load(head))


def test_the_card_and_the_plan(call, merged: Path) -> None:
    answer = call("export", "merged/v1", "out", "--json").json
    assert {path.name for path in (merged / "out").iterdir()} == MADE | {
        "config.json", "tokenizer.json", "model.safetensors",
    }  # fmt: skip
    assert answer["files"] == 5
    assert answer["written_bytes"] == sum(map(len, folder_bytes(merged / "out").values()))
    card = (merged / "out" / "README.md").read_text()
    assert front_matter(card) == {
        "base_model": ["base", "expert0", "expert1"], "library_name": "transformers", "tags": ["merge", "mergepipe"],
    }  # fmt: skip
    shown = call("show", "merged/v1", "--json").json
    for id_ in (shown["commit"], shown["tree"], shown["plan"]["id"], *(each["commit"] for each in shown["parents"])):
        assert id_ in card
    assert (merged / "out" / "mergepipe_plan.json").read_text() == call("show", "merged/v1", "--plan").out
    again = call("merge", "--plan", "out/mergepipe_plan.json", "--as", "again", "--json").json
    assert again["plan"] == shown["plan"]["id"]


def test_without_them(call, merged: Path) -> None:
    call("export", "merged/v1", "out")
    assert call("export", "merged/v1", "plain", "--no-card", "--json").json["files"] == 3
    with_card, without = folder_bytes(merged / "out"), folder_bytes(merged / "plain")
    assert {name: data for name, data in with_card.items() if name not in MADE} == without


def test_the_base_card_is_replaced(call, documented: Path) -> None:
    call("export", "mine", "out")
    card = (documented / "out" / "README.md").read_text()
    assert "expert0" in card
    assert "license" not in card
    assert "own card" not in card
    assert '"method": "task_arithmetic"' in (documented / "out" / "mergepipe_plan.json").read_text()


def test_the_base_card_stays_where_none_is_wanted(call, documented: Path) -> None:
    call("export", "mine", "out", "--no-card")
    for name in MADE:
        assert (documented / "out" / name).read_bytes() == (documented / "source" / name).read_bytes()


def test_nothing_is_added_to_what_was_ingested(call, documented: Path) -> None:
    assert call("export", "source", "out", "--json").json["identical"]
    assert folder_bytes(documented / "out") == folder_bytes(documented / "source")


def test_an_export_goes_in_again(call, merged: Path) -> None:
    """The card is one of its files then, and comes out byte for byte; a merge onto it has its own."""
    call("export", "merged/v1", "out")
    call("ingest", "out", "--ref", "second", "--base", "base")
    call("export", "second", "again")
    assert folder_bytes(merged / "again") == folder_bytes(merged / "out")
    call("plan", "--base", "second", "--expert", "expert0:0.5", "--method", "task_arithmetic", "-o", "p.json")
    call("merge", "--plan", "p.json", "--as", "third")
    call("export", "third", "last")
    assert front_matter((merged / "last" / "README.md").read_text())["base_model"] == ["second", "expert0"]
    with Store.open(merged) as store:
        assert "README.md" in store.snapshot("third").files


def test_a_card_is_not_in_the_way(call, merged: Path) -> None:
    """A folder is replaced whole, or not at all, with a card as without."""
    (merged / "out").mkdir()
    (merged / "out" / "README.md").write_text("mine")
    call("export", "merged/v1", "out", code=6)
    assert folder_bytes(merged / "out") == {"README.md": b"mine"}
    call("export", "merged/v1", "out", "--force", "--dtype", "float32")
    assert "converted to `float32`" in (merged / "out" / "README.md").read_text()


def test_a_folder_of_that_name(call, merged: Path, family: Path) -> None:
    """A base may have anything in it; what is the commit's own is not lost for a card."""
    folder = merged / "odd"
    (folder / "README.md").mkdir(parents=True)
    (folder / "README.md" / "page").write_text("text")
    for name, data in folder_bytes(family / "base").items():
        (folder / name).write_bytes(data)
    call("ingest", "odd", "--base", "base")
    call("plan", "--base", "odd", "--expert", "expert0:1", "--method", "task_arithmetic", "-o", "p.json")
    call("merge", "--plan", "p.json", "--as", "mine")
    assert call("export", "mine", "out", "--json").json["files"] == 5
    assert (merged / "out" / "README.md" / "page").read_text() == "text"
