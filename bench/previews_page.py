"""docs/budgets-measured.md and its plots, from the reports of bench/previews.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harness import OUT, ROOT, format_bytes
from matplotlib.figure import Figure
from quality import markdown_table, mean, write_page

REPORTS: Final = OUT
PAGE: Final = ROOT / "docs" / "budgets-measured.md"
PICTURES: Final = ROOT / "docs" / "quality"
ARMS: Final = ("hash", "norm", "sketch", "previews")
STYLES: Final = dict(zip(ARMS, ("s:", "^--", "o--", "D-"), strict=True))
MAIN: Final = "task_arithmetic"  # which goals and plots are about
FARTHEST: Final = 18  # percent of the plain bytes, in plots
TITLES: Final = {
    "full": "language model, all weights trained",
    "lora": "language model, low rank",
    "sparse": "language model, a tenth of the tensors",
    "encoder": "sentence encoder, all weights trained",
}
INTRODUCTION: Final = """# Budgets, measured: previews beside block selection

Made by `bench/previews.py` on families that `bench/training.py` and `bench/encoder.py` trained. A budget is a share of
the experts' *plain* bytes; all arms of a line may read the same stored bytes, and what they read was measured. *hash*,
*norm* and *sketch* choose whole blocks, as on [the page about selection](budget-selection.md); *previews* is what
`mp plan --budget` does where there are previews. Deviations are of the update: the L2 distance from the merge that
reads everything, over the length of its update, both before they are rounded to bfloat16. The share of the gain is
`(merge - base) / (full merge - base)` of the held-out scores, with its standard error over the scored texts. A budget
that affords everything is the full merge. DARE is with density 0.5 and divides by it, so that it needs no norms. The
first plan of `karcher` reads all experts once, for their inner products, which the store keeps; that is not counted.
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One report, as it was read; `block_size` as it was asked for."""

    block_size: str
    report: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.report["kind"])

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(point["method"] for point in self.report["points"]))

    def full(self, method: str) -> Mapping[str, Any]:
        return next(point for point in self.of(method) if point["arm"] == "full")

    def of(self, method: str, arm: str = "") -> list[Mapping[str, Any]]:
        found = [point for point in self.report["points"] if point["method"] == method]
        return [point for point in found if point["arm"] == arm] if arm else found

    def shares(self, method: str) -> dict[float, dict[str, Mapping[str, Any]]]:
        """The arms side by side, by their budget."""
        cases: dict[float, dict[str, Mapping[str, Any]]] = {}
        for point in self.of(method):
            if point["arm"] != "full":
                cases.setdefault(point["share"], {})[point["arm"]] = point
        return cases


def read_reports(folder: Path) -> list[Measured]:
    """All that are there, in the order of :data:`TITLES`."""
    paths = sorted(folder.glob("previews-*-*.json"))
    found = [Measured(path.stem.rpartition("-")[2], json.loads(path.read_text())) for path in paths]
    return sorted(found, key=lambda each: list(TITLES).index(each.kind))


def goals(found: Measured) -> list[tuple[str, str, str, bool]]:
    """What was asked of previews, what was measured, what was wanted, and whether that is met."""
    storage, cases = found.report["storage"], found.shares(MAIN)
    kept = storage["preview_bytes"] / storage["raw_bytes"]
    rows = [("previews' storage, of the plain bytes", f"{kept:.1%}", "at most 8%", kept <= 0.08)]
    point = cases.get(0.1, {}).get("previews")
    if point is not None:
        off = point["deviation"]
        rows.append(("deviation of the update at 10%", f"{off:.3f}", "at most 0.40", off <= 0.4))
    for share, wanted in ((0.1, 0.95), (0.05, 0.8)):
        point = cases.get(share, {}).get("previews")
        if point is not None and point["gain"] is not None:
            name = f"share of the gain at {share:.0%}"
            rows.append((name, _gain(point), f"at least {wanted:.0%}", point["gain"] >= wanted))
    return rows


def _gain(point: Mapping[str, Any]) -> str:
    if point["gain"] is None:
        return "none"
    error = point["gain_error"]
    return f"{point['gain']:.0%}" + (f" ± {100 * error:.0f}" if error else "")


def _goals_section(reports: Sequence[Measured]) -> str:
    rows = []
    for found in reports:
        for name, measured, wanted, met in goals(found):
            rows.append([f"`{found.kind}`", name, measured, wanted, "met" if met else "**missed**"])
    return f"## Goals\n\nBy `{MAIN}`.\n\n" + markdown_table(["family", "goal", "measured", "wanted", ""], rows)


def _storage_line(found: Measured) -> str:
    report, storage = found.report, found.report["storage"]
    raw = storage["raw_bytes"]
    return (
        f"{report['experts']} experts of {report['parameters']:,} parameters, bfloat16: {format_bytes(raw)} plain, in "
        f"blocks of {found.block_size}. "
        f"With what they share with the base they take {storage['stored_bytes'] / raw:.1%}. "
        f"A full merge reads {found.full(found.methods[0])['read']:.1%}; previews take "
        f"{storage['preview_bytes'] / raw:.1%} more. Ingest in one thread: {storage['ingest_seconds']:.2f} processor "
        f"seconds, with previews {storage['ingest_seconds_with_previews']:.2f}."
    )


def _scores_table(found: Measured) -> str:
    report = found.report
    rows = [("base", report["base"], report["base_recall"])]
    rows += [
        (f"{method}, all read", found.full(method)["scores"], found.full(method)["recall"]) for method in found.methods
    ]
    lines = [[name, *(f"{score:.4f}" for score in [*each.values(), mean(each)])] for name, each, _ in rows]
    header = [report["title"], *report["base"], "mean"]
    if report["base_recall"] is not None:
        header.append("recall@1")
        lines = [[*line, f"{recall:.4f}"] for line, (_, _, recall) in zip(lines, rows, strict=True)]
    return markdown_table(header, lines)


def _arms_table(found: Measured) -> str:
    rows = []
    for method in found.methods:
        for share, case in found.shares(method).items():
            deviations = [f"{case[arm]['deviation']:.3f}" for arm in ARMS]
            bound = f"{case['previews']['bound']:.2f}"
            rows.append([f"`{method}`", f"{share:.0%}", *deviations, bound, *(_gain(case[arm]) for arm in ARMS)])
    deviations, gains = ([f"{what}: {arm}" for arm in ARMS] for what in ("deviation", "gain"))
    return markdown_table(["method", "budget", *deviations, "its bound", *gains], rows)


def _all_table(found: Measured) -> str:
    """Every merge that did not read everything."""
    rows = []
    for method in found.methods:
        for share, case in found.shares(method).items():
            for arm, point in case.items():
                scores = [*point["scores"].values(), mean(point["scores"])]
                rows.append(
                    [
                        f"`{method}`",
                        f"{share:.0%}",
                        arm,
                        f"{point['bytes_read']:,}",
                        f"{point['read']:.2%}",
                        f"{point['deviation']:.4f}",
                        f"{point['bound']:.3f}",
                        *(f"{score:.4f}" for score in scores),
                        *([f"{point['recall']:.4f}"] if point["recall"] is not None else []),
                        _gain(point),
                    ]
                )
    extra = ["recall@1"] if found.report["base_recall"] is not None else []
    header = ["method", "budget", "arm", "bytes read", "of plain", "deviation", "bound", *found.report["base"], "mean"]
    table = markdown_table([*header, *extra, "gain"], rows)
    return f"<details><summary>Every merge</summary>\n\n{table}\n\n</details>"


def _swaps_table(found: Measured) -> str:
    rows = [[each["name"], f"{each['trimmed']:.3f}", f"{each['untrimmed']:.3f}"] for each in found.report["swaps"]]
    lead = (
        "Methods that trim or vote, where previews stand for all deltas (deviation of the result; thresholds are those "
        "of the exact deltas):"
    )
    return f"{lead}\n\n{markdown_table(['method', 'previews trimmed', 'previews as they are'], rows)}"


def family_section(found: Measured) -> str:
    parts = [f"## `{found.kind}`: {TITLES[found.kind]}", _storage_line(found), _scores_table(found), _arms_table(found)]
    return "\n\n".join([*parts, _all_table(found), _swaps_table(found)])


def _small_blocks_section(reports: Sequence[Measured], block_size: str) -> str:
    parts = [f"## Smaller blocks\n\nThe same with other blocks than {block_size}."]
    for found in reports:
        parts += [
            f"### `{found.kind}`, {found.block_size}",
            _storage_line(found),
            _arms_table(found),
            _all_table(found),
        ]
    return "\n\n".join(parts)


def _draw(reports: Sequence[Measured], value: Callable[[Mapping[str, Any]], float], label: str, whole: float) -> Figure:
    """One panel for each report: a curve for each arm, from nothing read to the full merge, where that is near."""
    columns = min(2, len(reports))
    figure = Figure(figsize=(4.6 * columns, 3.6 * math.ceil(len(reports) / columns)), layout="constrained")
    grid = figure.subplots(math.ceil(len(reports) / columns), columns, squeeze=False)
    for axes, found in zip(grid.flat, reports, strict=False):
        full = found.full(MAIN)["read"]
        for arm, style in STYLES.items():
            points = {0.0: 1 - whole} | {100 * point["read"]: value(point) for point in found.of(MAIN, arm)}
            if 100 * full < FARTHEST:
                points[100 * full] = whole
            axes.plot([*points], [*points.values()], style, label=arm, markersize=4)
        axes.set_title(f"{found.kind}, blocks of {found.block_size}", fontsize="medium")
        axes.set_xlim(0, min(FARTHEST, 105 * full))
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize="small")
    figure.supxlabel("stored bytes read, % of the experts' plain bytes", fontsize="medium")
    figure.supylabel(label, fontsize="medium")
    return figure


def _figure_of(what: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda point: math.nan if point[what] is None else float(point[what])


def draw(reports: Sequence[Measured], name: str) -> list[str]:
    """Both plots of these reports; returns their paths, relative to the page."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    pictures = []
    for what, label, whole in (("deviation", "deviation of the update", 0.0), ("gain", "share of the gain", 1.0)):
        path = PICTURES / f"{name}-{what}.png"
        figure = _draw(reports, _figure_of(what), label, whole)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pictures.append(f"![{label}]({PICTURES.name}/{path.name})")
    return pictures


def write_pages(block_size: str) -> None:
    """Write the page's sections anew from all reports; those with blocks of ``block_size`` are the main ones."""
    reports = read_reports(REPORTS)
    main = [found for found in reports if found.block_size == block_size]
    others = [found for found in reports if found.block_size != block_size]
    if main:
        text = "\n\n".join([_goals_section(main), *draw(main, "budgets")])
        write_page(PAGE, "budgets", text, INTRODUCTION)
    for found in main:
        write_page(PAGE, f"budgets {found.kind}", family_section(found), INTRODUCTION)
    if others:
        text = "\n\n".join([_small_blocks_section(others, block_size), *draw(others, "budgets-small-blocks")])
        write_page(PAGE, "budgets small blocks", text, INTRODUCTION)
    print(f"wrote {PAGE}")
