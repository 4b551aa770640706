"""Plain aligned columns, and how ids, times and counts are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from mergepipe.cli.terminal import paint, say


@dataclass(frozen=True, slots=True)
class Cell:
    """A text with a style; a plain ``str`` stands for one without."""

    text: str
    style: str = ""


Row: TypeAlias = Sequence[str | Cell]


def print_table(headings: Sequence[str], rows: Sequence[Row], right: str = "") -> None:
    """Print rows in columns, without those that are empty throughout.

    ``right``: the headings of columns whose text ends at the right edge, with spaces between.
    """
    if not rows:
        return
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    table = [[Cell(heading, "dim") for heading in headings], *cells] if any(headings) else cells
    used = [i for i in range(len(headings)) if any(row[i].text for row in cells)]
    widths = {i: max(len(row[i].text) for row in table) for i in used}
    for row in table:
        say("  ".join(_aligned(row[i], widths[i], to_right=headings[i] in right.split()) for i in used).rstrip())


def _aligned(cell: Cell, width: int, *, to_right: bool) -> str:
    space = " " * (width - len(cell.text))
    shown = paint(cell.text, cell.style)
    return space + shown if to_right else shown + space


def local_time(text: str) -> str:
    """A commit's time in the reader's own zone, to the minute."""
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return text


def first_line(text: str) -> str:
    """A message's first line; empty for an empty one."""
    return text.splitlines()[0] if text else ""


def plural(count: int, singular: str, several: str = "") -> str:
    """``1 block``, ``1,234 blocks``."""
    return f"{count:,} {singular if count == 1 else several or singular + 's'}"


def shape_text(shape: Sequence[int]) -> str:
    """``2048 × 1024``, ``scalar``."""
    return " × ".join(str(extent) for extent in shape) if shape else "scalar"  # noqa: RUF001  # meant


def share(part: int, whole: int) -> str:
    """A part as a percentage; empty for nothing of nothing."""
    return f"{part / whole:.0%}" if whole else ""


def seconds_text(seconds: float) -> str:
    """``0.8 s``, ``12 s``, ``3 min 20 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
