"""Methods of other distributions: the example is installed and found, and what is broken is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge.method import Tile
from support.processes import run_python

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "median_method"
FIND = """
    import json, sys
    from mergepipe.merge.methods import find_method, plugins
    from mergepipe.store.errors import MergePipeError
    try:
        found = find_method(sys.argv[1])
        print(json.dumps([found.name, plugins().origins.get(found.name)]))
    except MergePipeError as error:
        print(json.dumps([error.kind, error.message, error.hint]))
"""


def plug(folder: Path, name: str, code: str, *points: str) -> None:
    """A distribution of one module, as an installer would leave it."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[mergepipe.methods]\n" + "\n".join(points) + "\n")


def find(folder: Path, name: str) -> list[str]:
    import json
    import os

    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = json.loads(run_python(FIND, name, PYTHONPATH=path).splitlines()[-1])
    assert isinstance(found, list)
    return found


def test_the_example_is_found_once_it_is_installed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(EXAMPLE, source)  # a build leaves folders behind
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True, timeout=120)
    assert find(target, "median") == ["median", "median-method 1.0"]
    kind, message, hint = find(target, "medain")
    assert (kind, message) == ("usage", "there is no method 'medain'")
    assert "'median'" in hint


def test_the_example_is_small() -> None:
    lines = [line for path in EXAMPLE.iterdir() if path.is_file() for line in path.read_text().splitlines()]
    assert len(lines) <= 60


def test_the_example_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    from median_method import MEDIAN  # type: ignore[import-not-found]

    from support.methods import problem_of, run_method

    generator = np.random.default_rng(0)
    base = generator.standard_normal((40, 30)).astype(np.float32)
    for count in (1, 2, 3, 6):
        experts = [(base + generator.standard_normal(base.shape) * 0.1).astype(np.float32) for _ in range(count)]
        deltas = np.stack([expert - base for expert in experts])
        found = run_method(MEDIAN, base, experts, {"lambda": 0.7})
        assert np.allclose(found, base + 0.7 * np.median(deltas, axis=0), atol=1e-6)
        problem = problem_of(MEDIAN, base, experts, {"lambda": 0.7})
        coefficients = MEDIAN.start(problem)
        factors = MEDIAN.reach(problem, coefficients)
        out = np.empty(base.size, np.float32)
        MEDIAN.apply(Tile(np.zeros(base.size, np.float32), deltas.reshape(count, -1).copy(), 0, 30), coefficients, out)
        norms = np.linalg.norm(deltas.reshape(count, -1).astype(np.float64), axis=1)
        assert np.linalg.norm(out) <= np.sqrt(np.sum((factors * norms) ** 2))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('no such luck')", "importing broken:METHOD failed: ValueError: no such luck"),
        ("import nothing_of_the_kind", "ModuleNotFoundError"),
        ("OTHER = 1", "AttributeError"),
        ("METHOD = 'ties'", "broken:METHOD is str, neither a Method nor a tuple of them"),
        ("METHOD = (1, 2)", "broken:METHOD is int"),
        ("from mergepipe.merge.methods import METHODS\nMETHOD = METHODS['ties']", "mergepipe itself has taken"),
    ],
)
def test_a_broken_plug_in_is_named(tmp_path: Path, code: str, reason: str) -> None:
    plug(tmp_path, "broken", code, "mine = broken:METHOD")
    kind, message, hint = find(tmp_path, "mine")
    assert kind == "environment"
    assert message.startswith("the plug-in broken 2.5 cannot be used: ")
    assert reason in message
    assert "'mine'" in hint
    assert find(tmp_path, "ties") == ["ties", None], "nobody who does not ask for it is stopped"


def test_a_name_can_be_taken_once(tmp_path: Path) -> None:
    code = "from dataclasses import replace\nfrom mergepipe.merge.methods import METHODS\n"
    code += "METHOD = tuple(replace(METHODS['ties'], name=name) for name in ('one', 'two'))\n"
    plug(tmp_path, "first", code, "both = first:METHOD")
    plug(tmp_path, "second", code, "both = second:METHOD")
    assert find(tmp_path, "one") == ["one", "first 2.5"]
    assert find(tmp_path, "two") == ["two", "first 2.5"]
    kind, message, _ = find(tmp_path, "three")
    assert kind == "environment"
    assert "second 2.5" in message and "'one'" in message and "first 2.5 has taken" in message
