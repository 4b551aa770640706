"""What each budget would give: a table, a plot in the terminal, and one in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mergepipe.cli.picture import can_show, terminal_width
from mergepipe.cli.show_plan import percent
from mergepipe.cli.tables import print_table
from mergepipe.cli.terminal import note, say, say_json
from mergepipe.store.errors import UsageError
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.merge.curve import Point, Sweep
    from mergepipe.merge.plan import Plan

_HEIGHT: Final = 12  # rows of the plot
_WIDEST: Final = 100
_MARGIN: Final = 6  # "100% ┤"
_TICKS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_UNICODE: Final = ("●", "○", "·", "┤", "└", "─")
_ASCII: Final = ("*", "o", ".", "|", "+", "-")

Curve = tuple["Point", ...]


def check_drawing() -> None:
    """Raises UsageError where there is nothing to draw files with."""
    if find_spec("matplotlib") is None:
        raise UsageError("--png needs matplotlib, which is not installed", hint="pip install 'mergepipe[plot]'")


def show_curve(sweep: Sweep, plan: Plan, png: Path | None, *, json: bool) -> None:
    """Print the sweep, and draw it where that is asked for."""
    from mergepipe.merge.executor import describe

    title = describe(plan)
    if png is not None:
        _draw(sweep, title, png)
    if json:
        say_json({"method": plan.method, "experts": [item.name for item in plan.experts], **sweep.as_json()})
        return
    say(f"{title}: a full read takes {format_size(sweep.full_bytes)}, {format_size(sweep.raw_bytes)} uncompressed")
    say()
    _print_table(sweep)
    say()
    for line in plot_lines(sweep, terminal_width(), unicode=can_show("".join(_UNICODE))):
        say(line)
    if png is not None:
        note(f"drawn into {png}")


def _print_table(sweep: Sweep) -> None:
    rows = [_row(sweep, point) for point in sweep.best]
    if sweep.with_previews:
        for row, alone in zip(rows, sweep.exact_only, strict=True):
            row.append(_share(sweep.relative(alone.absolute)))
    if sweep.certain.expert_bytes < sweep.full_bytes:
        before = sum(point.expert_bytes < sweep.certain.expert_bytes for point in sweep.best)
        rows.insert(before, [*_row(sweep, sweep.certain), *(["0%"] if sweep.with_previews else [])])
    headings = ["budget", "bytes", "of full", "of raw", "bound", "likely", "previews", "exact"]
    if sweep.with_previews:
        headings.append("bound exact-only")
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    aligned = [[text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in (headings, *rows)]
    print_table(aligned[0], aligned[1:])


def _row(sweep: Sweep, point: Point) -> list[str]:
    full, raw = sweep.full_bytes, sweep.raw_bytes
    return [
        percent(point.budget_bytes / full) if full else "",
        format_size(point.expert_bytes),
        percent(point.expert_bytes / full) if full else "",
        percent(point.expert_bytes / raw) if raw else "",
        _share(sweep.relative(point.absolute)),
        _share(sweep.relative(point.estimate)),
        f"{point.preview_blocks:,}",
        f"{point.exact_blocks:,}",
    ]


def _share(value: float | None) -> str:
    return "none" if value is None else percent(value)


def plot_lines(sweep: Sweep, width: int, *, unicode: bool) -> list[str]:
    """The bound over the bytes as text: down is better, and the bytes are on a scale of powers.

    ``width``: of the terminal. ``unicode``: whether it shows more than ASCII.
    """
    coarse, alone, between, wall, corner, floor = _UNICODE if unicode else _ASCII
    columns = max(20, min(width, _WIDEST) - _MARGIN)
    grid = [[" "] * columns for _ in range(_HEIGHT)]
    least = min((_of_full(sweep, point) for point in sweep.best if point.expert_bytes), default=_TICKS[0])
    least = min(max(least, 1e-4), _TICKS[0])

    def column(share: float) -> int:
        return round((math.log(share) - math.log(least)) / -math.log(least) * (columns - 1))

    for curve, mark in ((sweep.exact_only, alone), (sweep.with_previews, coarse)):
        _put(grid, _dots(sweep, curve, column, least), mark, between)
    lines = []
    for number, row in enumerate(grid):
        value = 1 - number / (_HEIGHT - 1)
        label = f"{value:.0%}" if number % 3 == 0 or number == _HEIGHT - 1 else ""
        lines.append(f"{label:>4} {wall}{''.join(row)}".rstrip())
    lines.append(" " * 5 + corner + floor * columns)
    lines.append(_axis([(column(tick), percent(tick)) for tick in _TICKS if tick >= least], columns))
    marks = f"{coarse} with previews   {alone} exact blocks alone" if sweep.with_previews else f"{alone} exact blocks"
    lines.append(" " * _MARGIN + marks)
    lines.append(" " * _MARGIN + "the bound, of the update, over the bytes read, of a full read")
    return lines


def _of_full(sweep: Sweep, point: Point) -> float:
    return point.expert_bytes / sweep.full_bytes if sweep.full_bytes else 1.0


def _dots(sweep: Sweep, curve: Sequence[Point], column: Callable[[float], int], least: float) -> list[tuple[int, int]]:
    """Column and row of each point that has a bound, from left to right."""
    found = []
    for point in curve:
        relative = sweep.relative(point.absolute)
        if relative is not None and relative <= 1:
            found.append((column(max(_of_full(sweep, point), least)), round((1 - relative) * (_HEIGHT - 1))))
    return sorted(set(found))


def _put(grid: list[list[str]], dots: Sequence[tuple[int, int]], mark: str, between: str) -> None:
    """Draw points, and a straight line of small dots from each to the next where nothing else is."""
    for (left, high), (right, low) in pairwise(dots):
        for x in range(left + 1, right):
            y = round(high + (low - high) * (x - left) / (right - left))
            if grid[y][x] == " ":
                grid[y][x] = between
    for x, y in dots:
        grid[y][x] = mark


def _axis(ticks: Sequence[tuple[int, str]], columns: int) -> str:
    """Labels below the columns that they stand for, as many as have room."""
    line = [" "] * (_MARGIN + columns)
    free = 0
    for at, text in ticks:
        start = min(_MARGIN + at, len(line) - len(text))
        if start >= free:
            line[start : start + len(text)] = text
            free = start + len(text) + 1
    return "".join(line).rstrip()


def _draw(sweep: Sweep, title: str, path: Path) -> None:
    """The same with matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from mergepipe.store.filesystem import explain_os_error

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve, label, style in (
        (sweep.exact_only, "exact blocks alone", "o--"),
        (sweep.with_previews, "with previews", "o-"),
    ):
        points = [(_of_full(sweep, point), sweep.relative(point.absolute)) for point in curve]
        points = [(share, bound) for share, bound in points if share and bound is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda share, _: percent(share))
    axes.yaxis.set_major_formatter(lambda bound, _: f"{bound:.0%}")
    axes.set_xlabel(f"bytes read, of the {format_size(sweep.full_bytes)} of a full read")
    axes.set_ylabel("certified bound, of the update")
    axes.set_title(title, parse_math=False, wrap=True, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150, format=None if path.suffix else "png")
    except OSError as error:
        raise explain_os_error(error, f"drawing the curve into {path}") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}", hint="Name a .png, .svg or .pdf.") from error
