"""``mp methods``: every method and every parameter is told, examples can be run, plug-ins are named."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import mergepipe.merge.methods as registry
from mergepipe.merge.methods import METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.usefixtures("here")
def test_the_list_has_all_methods(call) -> None:
    lines = call("methods").out.splitlines()
    assert lines[0].split() == ["method", "what", "it", "does", "base", "experts", "source"]
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)
    for line, method in zip(lines[1:], METHODS.values(), strict=True):
        assert method.summary in line and method.source in line


@pytest.mark.parametrize("name", METHODS)
def test_a_description_has_all_parameters(call, name: str) -> None:
    method = METHODS[name]
    text = call("methods", name).out
    assert method.summary in text and method.source in text
    for parameter in method.parameters:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [parameter.name]]
        assert parameter.help in line and parameter.describe_range() in line
        assert ("each expert" in line) == parameter.per_expert
        assert ("required" in line) == (parameter.default is None)


@pytest.mark.parametrize("name", METHODS)
def test_json(call, name: str) -> None:
    found = call("methods", name, "--json").json
    assert found in call("methods", "--json").json
    assert found["plugin"] is None
    assert [each["name"] for each in found["parameters"]] == [each.name for each in METHODS[name].parameters]
    assert found["experts"]["least"] == METHODS[name].experts[0]


@pytest.mark.parametrize("name", METHODS)
def test_the_example_is_a_command_that_the_method_takes(call, name: str) -> None:
    method = METHODS[name]
    words = shlex.split(call("methods", name, "--json").json["example"])
    assert words[:2] == ["mp", "plan"] and words[words.index("--method") + 1] == name
    method.check_inputs(words.count("--expert"), based="--base" in words)
    given = dict(word.split("=") for before, word in pairwise(words) if before == "--param")
    method.settle({key: float(value) for key, value in given.items()}, "the example", per_expert=False)


def test_an_unknown_one(call) -> None:
    answer = call("methods", "slurp", code=2)
    assert "there is no method 'slurp'" in answer.err and "'slerp'" in answer.err


def test_plug_ins_are_listed_and_broken_ones_noted(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_module.py").write_text(
        "from dataclasses import replace\nfrom mergepipe.merge.methods import METHODS\n"
        "MINE = replace(METHODS['ties'], name='mine', summary='one of my own')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("mine", "its_module:MINE", registry.ENTRY_POINTS),
        EntryPoint("bad", "not_there:BAD", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints(points).select(group=group))
    registry.plugins.cache_clear()
    try:
        answer = call("methods")
        assert re.search(r"^mine +one of my own .*its_module:MINE$", answer.out, re.MULTILINE)
        assert "the plug-in not_there:BAD cannot be used" in answer.err
        assert "plug-in" in call("methods", "mine").out
        assert call("methods", "mine", "--json").json["plugin"] == "its_module:MINE"
        assert call("methods", "theirs", code=8)
    finally:
        registry.plugins.cache_clear()


@pytest.mark.parametrize("words", [["methods"], ["methods", "slerp"], ["plan", "--help"]], ids=" ".join)
def test_no_compiler_is_loaded(words: list[str]) -> None:
    code = "import sys; from mergepipe.cli.app import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert not {"numba", "torch"} & set(done.stdout.splitlines()[-1].split())


def test_the_tables_of_the_page_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert text == module.methods_page(text), "run `make docs`"
    assert "<!-- parity: begin -->" in text
