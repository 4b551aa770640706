"""``mp plan --curve`` and ``--exact-only``, the picture of ``mp explain``, and what merges say of previews."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergepipe.cli.curve as module
from mergepipe.cli.curve import plot_lines
from mergepipe.cli.picture import MOST_ROWS, Band, fold, legend, print_picture
from mergepipe.merge.curve import Point, Sweep
from mergepipe.store import Store
from support.levels import BLOCK_BYTES, fixed_family, ingest_levels

QUESTION = ["--base", "base", "--expert", "expert0:0.6", "--expert", "expert1:0.4", "--method"]
RECIPE = """\
models:
  - model: expert0
    parameters: {weight: 0.6}
  - model: expert1
    parameters: {weight: 0.4}
merge_method: task_arithmetic
base_model: base
"""


@pytest.fixture(scope="session")
def levels_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels")
    with Store.create(folder / ".mp", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, folder, fixed_family())
    return folder / ".mp"


@pytest.fixture
def levels(levels_template: Path, here: Path) -> Path:
    """``here`` with a store of a family that has previews, and a recipe for it."""
    shutil.copytree(levels_template, here / ".mp")
    (here / "recipe.yml").write_text(RECIPE)
    return here


@pytest.fixture(params=["options", "recipe"])
def question(request: pytest.FixtureRequest) -> list[str]:
    return ["recipe.yml"] if request.param == "recipe" else [*QUESTION, "task_arithmetic"]


@pytest.mark.usefixtures("levels")
def test_exact_only(call: Any, question: list[str]) -> None:
    coarse = call("plan", *question, "--budget", "40%", "--json").json
    exact = call("plan", *question, "--budget", "40%", "--exact-only", "--json").json
    assert coarse["preview_blocks"] > 0
    assert coarse["preview_bytes"] + coarse["exact_bytes"] == coarse["expert_bytes"]
    assert (exact["preview_blocks"], exact["preview_bytes"]) == (0, 0)
    assert exact["exact_bytes"] == exact["expert_bytes"]
    assert coarse["bound"]["relative"] < exact["bound"]["relative"]
    said = call("plan", *question, "--budget", "40%").out
    assert f" as previews of {coarse['preview_blocks']} blocks, " in said
    assert f" as {coarse['exact_blocks']} exact block" in said
    assert "preview" not in call("plan", *question, "--budget", "40%", "--exact-only").out


@pytest.mark.usefixtures("levels")
def test_exact_only_merges(call: Any) -> None:
    call("merge", "recipe.yml", "--as", "coarse", "--budget", "40%")
    call("merge", "recipe.yml", "--as", "exact", "--budget", "40%", "--exact-only")
    assert call("show", "coarse", "--json").json["plan"]["preview_blocks"] > 0
    assert call("show", "exact", "--json").json["plan"]["preview_blocks"] == 0
    assert " as previews, " in call("show", "coarse").out
    assert "preview" not in call("show", "exact").out
    planned = call("merge", "recipe.yml", "--dry-run", "--budget", "40%", "--exact-only", "--json").json
    assert planned["preview_blocks"] == 0
    call("plan", "recipe.yml", "-o", "p.json")
    answer = call("merge", "--plan", "p.json", "--as", "x", "--exact-only", code=2)
    assert "--exact-only belongs to `mp plan`" in answer.err


@pytest.mark.usefixtures("levels")
def test_notes(call: Any, levels: Path) -> None:
    ties = [*QUESTION, "ties", "--density", "0.3"]
    assert "ties reads exact blocks alone, no previews: " in call("plan", *ties, "--budget", "20%").err
    assert "no previews" not in call("plan", *ties).err
    assert "no previews" not in call("plan", *ties, "--budget", "20%", "--exact-only").err
    with Store.create(levels / "plain", block_bytes=BLOCK_BYTES) as plain:
        ingest_levels(plain, levels / "models", fixed_family(), previews=False)
    for words in ([*QUESTION, "task_arithmetic"], ["recipe.yml"]):
        answer = call("plan", *words, "--budget", "20%", "--store", levels / "plain")
        assert "mp analyze EXPERT --previews" in answer.err
        answer = call("plan", *words, "--store", levels / "plain")
        assert "mp analyze" not in answer.err
    merged = call("merge", "recipe.yml", "--as", "m", "--max-error", "0.5", "--store", levels / "plain")
    assert "mp analyze EXPERT --previews" in merged.err


@pytest.mark.usefixtures("levels")
def test_a_curve(call: Any, question: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = call("plan", *question, "--curve", "--json").json
    assert [len(found[name]) for name in ("with_previews", "exact_only")] == [13, 13]
    for point in found["with_previews"]:
        share = point["budget_bytes"] / found["expert_bytes_full"]
        plan = call("plan", *question, "--budget", str(point["budget_bytes"]), "--json").json
        assert (plan["expert_bytes"], plan["preview_blocks"]) == (point["expert_bytes"], point["preview_blocks"])
        assert plan["bound"]["relative"] == pytest.approx(point["relative"], rel=1e-12), share
    monkeypatch.setenv("COLUMNS", "90")
    lines = call("plan", *question, "--curve").out.splitlines()
    assert lines[0].startswith("task_arithmetic of expert0:0.6 and expert1:0.4 on base: a full read takes ")
    headings = "budget  bytes  of full  of raw  bound  likely  previews  exact  bound exact-only"
    assert lines[2].split() == headings.split()
    assert lines[3].split()[0] == "0.5%"
    assert max(map(len, lines[1:])) <= 90
    assert sum("●" in line for line in lines) > 4
    assert "○" in lines[-2]
    assert "with previews" in lines[-2]
    alone = call("plan", *question, "--curve", "--exact-only", "--json").json
    assert (alone["with_previews"], alone["exact_only"]) == ([], found["exact_only"])
    assert not (Path.cwd() / "p.json").exists()


@pytest.mark.usefixtures("levels")
def test_a_curve_in_plain_text(mp: Any) -> None:
    """Where the output shows no more than ASCII."""
    words = ["plan", *QUESTION, "task_arithmetic", "--curve"]
    out = mp(*words, PYTHONIOENCODING="ascii", COLUMNS="70").out
    assert out.isascii()
    assert "* with previews" in out
    mp("plan", "recipe.yml", "--budget", "40%", "-o", "p.json")
    out = mp("explain", "p.json", PYTHONIOENCODING="ascii", COLUMNS="70").out
    assert out.isascii()
    assert "# at least half read exactly" in out


@pytest.mark.usefixtures("levels")
def test_a_curve_in_a_file(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    words = ["plan", *QUESTION, "task_arithmetic", "--curve", "--png"]
    answer = call(*words, "curve.png")
    assert "drawn into curve.png" in answer.err
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    call(*words, "curve.svg", "--json")
    assert b"<svg" in Path("curve.svg").read_bytes()
    assert "curve.odd" in call(*words, "curve.odd", code=2).err
    assert "drawing the curve" in call(*words, "nowhere/curve.png", code=8).err
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    answer = call(*words, "other.png", code=2)
    assert "needs matplotlib" in answer.err
    assert "mergepipe[plot]" in answer.err
    call(*words[:-1])


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--curve", "--budget", "10%"], "--budget and --curve exclude each other"),
        (["--curve", "--max-error", "0.1"], "--max-error and --curve exclude each other"),
        (["--curve", "-o", "p.json"], "--output and --curve exclude each other"),
        (["--png", "c.png"], "--png draws a curve, and needs --curve"),
    ],
)
def test_what_a_curve_cannot_be_asked(call: Any, question: list[str], words: list[str], message: str) -> None:
    assert message in call("plan", *question, *words, code=2).err


def sweep_of(points: list[tuple[int, float]], coarse: list[tuple[int, float]] = []) -> Sweep:  # noqa: B006
    def made(pairs: list[tuple[int, float]]) -> tuple[Point, ...]:
        return tuple(Point(size, size, bound, bound / 2, 0, 0, 1) for size, bound in pairs)

    return Sweep(1000, 2000, made([(1000, 0.0)])[0], 1.0, made(coarse), made(points))


@pytest.mark.parametrize("width", [1, 20, 40, 80, 300])
@pytest.mark.parametrize("unicode", [True, False])
def test_a_plot_keeps_to_its_width(width: int, unicode: bool) -> None:
    inf = float("inf")
    for sweep in (
        sweep_of([(5, 1.0), (100, 0.5), (1000, 0.0)], [(5, 0.8), (100, 0.2), (1000, 0.0)]),
        sweep_of([(0, inf), (0, 1.0), (1000, 0.0)]),
        sweep_of([(0, inf)]),
        sweep_of([]),
    ):
        lines = plot_lines(sweep, width, unicode=unicode)
        assert all(len(line) <= max(26, min(width, 100)) for line in lines[:-2])
        assert unicode or "".join(lines).isascii()
        assert lines[0].startswith("100%")


@pytest.mark.usefixtures("levels")
def test_the_picture(call: Any) -> None:
    call("plan", "recipe.yml", "--budget", "40%", "-o", "p.json")
    lines = call("explain", "p.json").out.splitlines()
    top = next(number for number, line in enumerate(lines) if line.startswith("layer"))
    assert lines[top].split() == ["layer", "expert0", "expert1"]
    found = call("explain", "p.json", "--json").json
    assert (found["preview_blocks"] > 0, found["exact_blocks"] > 0) == (True, True)
    for line, tensor in zip(lines[top + 1 :], found["tensors"], strict=False):
        name, *cells = line.split()
        assert name == tensor["layer"] == tensor["name"].removesuffix(".weight")
        for group, part in zip(cells, tensor["experts"], strict=True):
            levels = part["levels"]
            assert [group.count(sign) for sign in "·▓█"] == [
                levels[level]["blocks"] for level in ("nothing", "preview", "exact")
            ]
    assert lines[top + 4] == legend(unicode=True)
    total = sum(
        part["levels"][level]["stored_bytes"]
        for tensor in found["tensors"]
        for part in tensor["experts"]
        for level in ("preview", "exact")
    )
    assert total == found["expert_bytes"]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_COLOR", "1")
    yield


def test_long_models_are_folded() -> None:
    layers = [Band(f"model.layers.{n}", (bytes([2]), b"")) for n in range(100)]
    bands = [Band("model.embed", (b"\0", b"\1")), *layers, Band("lm_head", (b"", b""))]
    found = fold(bands)
    assert len(found) <= MOST_ROWS
    assert [band.name for band in found[:3]] == ["model.embed", "model.layers.0-2", "model.layers.3-5"]
    assert found[-2].name == "model.layers.99"
    assert b"".join(band.levels[0] for band in found) == b"".join(band.levels[0] for band in bands)
    assert fold(bands[:40]) == bands[:40]
    odd = fold([Band(f"part{n}.x", (b"\1",)) for n in range(100)])
    assert (len(odd), odd[0].name) == (34, "part0.x to part2.x")
    assert fold([]) == []


@pytest.mark.usefixtures("wide")
def test_cells(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing, parts, previews, a half exact; more blocks than cells; and none."""
    levels = bytes([0] * 4 + [1, 0, 0, 0] + [1, 1, 0, 0] + [1] * 4 + [2, 2, 0, 0] + [2] * 4)
    print_picture([Band("a", (levels, b"")), Band("b", (b"\2", b"\1\0"))], ["first", "a long name"], 18, unicode=True)
    assert capsys.readouterr().out.splitlines() == ["layer  first   a lon…", "a      ·░▒▓██", "b      █       ▓·"]
    print_picture([Band("a", (levels, levels))], ["1", "2"], 18, unicode=False)
    assert capsys.readouterr().out.splitlines()[1] == "a      .-+*##  .-+*##"


@pytest.mark.usefixtures("levels")
def test_blame_names_previews(call: Any) -> None:
    call("merge", "recipe.yml", "--as", "m", "--budget", "40%")
    tensors = call("blame", "m", "*", "--json").json["tensors"]
    coarse = sum((run["last"] - run["first"] + 1) * len(run["coarse"]) for tensor in tensors for run in tensor["runs"])
    assert coarse == call("show", "m", "--json").json["plan"]["preview_blocks"]
    assert " preview" in call("blame", "m", "*").out
    name = next(tensor["name"] for tensor in tensors for run in tensor["runs"] if run["coarse"])
    assert "by previews of" in call("blame", "m", name).out
    call("export", "m", "out")
    assert ": previews of " in Path("out/README.md").read_text()
