"""A plan as a picture: layers down, experts across, and in each cell at which level blocks are read."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from mergepipe.cli.tables import Row, print_table

MOST_ROWS: Final = 40
_WIDEST: Final = 16  # cells of one expert
_NARROWEST: Final = 3
_UNICODE: Final = "·░▒▓█"
_ASCII: Final = ".-+*#"
_NUMBER: Final = re.compile(r"(.*\D|)(\d+)\Z")


@dataclass(frozen=True, slots=True)
class Band:
    """A row of the picture: one layer, or several. ``levels``: for each expert, those of its blocks that differ."""

    name: str
    levels: tuple[bytes, ...]


def can_show(text: str) -> bool:
    """Whether stdout has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def terminal_width() -> int:
    """Columns of the terminal (or ``COLUMNS``); 80 where the output goes elsewhere."""
    return shutil.get_terminal_size((80, 24)).columns


def print_picture(bands: Sequence[Band], experts: Sequence[str], width: int, *, unicode: bool) -> None:
    """Print a row for each band, a group of cells for each expert, and what the cells mean."""
    bands = fold(bands)
    signs = _UNICODE if unicode else _ASCII
    names = max((len(band.name) for band in bands), default=0)
    room = min(_WIDEST, max(_NARROWEST, (width - names) // max(len(experts), 1) - 2))
    rows: list[Row] = [[band.name, *(_cells(levels, room, signs) for levels in band.levels)] for band in bands]
    print_table(["layer", *(_shortened(name, room) for name in experts)], rows)


def legend(*, unicode: bool) -> str:
    """What the signs mean."""
    nothing, some, many, most, exact = _UNICODE if unicode else _ASCII
    return (
        f"{exact} at least half read exactly   {some}{many}{most} less, or previews: of under 1/3, under 2/3, more   "
        f"{nothing} nothing read   blank: the base's own"
    )


def fold(bands: Sequence[Band], most: int = MOST_ROWS) -> list[Band]:
    """At most so many rows: consecutive numbered layers become one, as few as need be; then whatever is left."""
    size = 1
    found = list(bands)
    while len(found) > most and size < len(bands):
        size += 1
        found = _fold_numbered(bands, size)
    if len(found) > most:
        size = -(-len(found) // most)
        found = [_joined(found[first : first + size]) for first in range(0, len(found), size)]
    return found


def _fold_numbered(bands: Sequence[Band], size: int) -> list[Band]:
    groups: list[list[Band]] = []
    stem: str | None = None
    for band in bands:
        match = _NUMBER.match(band.name)
        mine = match[1] if match else None
        if mine is not None and mine == stem and len(groups[-1]) < size:
            groups[-1].append(band)
        else:
            groups.append([band])
        stem = mine
    return [_joined(group) for group in groups]


def _joined(bands: Sequence[Band]) -> Band:
    if len(bands) == 1:
        return bands[0]
    first, last = bands[0].name, bands[-1].name
    match, end = _NUMBER.match(first), _NUMBER.match(last)
    name = f"{first}-{end[2]}" if match and end and match[1] == end[1] else f"{first} to {last}"
    return Band(name, tuple(b"".join(levels) for levels in zip(*(band.levels for band in bands), strict=True)))


def _cells(levels: bytes, count: int, signs: str) -> str:
    """Blocks in their order over so many cells; fewer blocks than cells are a cell each."""
    count = min(count, len(levels))
    cuts = [len(levels) * number // count for number in range(count + 1)] if count else []
    return "".join(_sign(levels[start:end], signs) for start, end in pairwise(cuts))


def _sign(levels: bytes, signs: str) -> str:
    exact = levels.count(2)
    read = exact + levels.count(1)
    if 2 * exact >= len(levels):
        return signs[4]
    return signs[0] if not read else signs[1 + min(3 * read // len(levels), 2)]


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…" if can_show("…") else name[:width]
