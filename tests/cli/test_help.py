"""Help teaches: groups, an example session, examples for each command; and docs/cli.md is the same text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mergepipe.cli.commands import COMMANDS
from mergepipe.store.version import VERSION

GENERATOR = Path(__file__).resolve().parents[2] / "docs" / "generate.py"


def test_overview(call) -> None:
    text = call("--help").out
    assert text == call().out == call("-h").out
    for heading in ("Start here:", "Look:", "Merge:", "Keep house:", "An example:"):
        assert heading in text
    for entry in COMMANDS:
        assert f"  {entry.name} " in text
    assert "mp merge --plan p.json --as merged/v1" in text


@pytest.mark.parametrize("name", [entry.name for entry in COMMANDS])
def test_each_command(call, name: str) -> None:
    text = call(name, "--help").out
    assert text.startswith(f"Usage: mp {name} [OPTIONS]")
    assert "Examples:" in text
    assert "--json" in text
    assert "--store DIR" in text


def test_version(call) -> None:
    assert call("--version").out == f"mp (mergepipe) {VERSION}\n"


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    spec = importlib.util.spec_from_file_location("generate_docs", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `make docs`"
