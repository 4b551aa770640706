"""Block indices as text: ``0-2,5``. Sorted, without repeats, and one form for each list."""

from __future__ import annotations

from typing import Final

MAXIMUM_READS: Final = 1 << 22  # block indices, each distinct list once; a line of text could ask for billions


def format_ranges(indices: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` as ``0-2,5``: sorted, without repeats."""
    parts = []
    start = previous = -2
    for index in [*indices, -2]:
        if index != previous + 1 or index < 0:
            if start >= 0:
                parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = index
        previous = index
    return ",".join(parts)


def parse_ranges(text: str, most: int = MAXIMUM_READS) -> tuple[int, ...]:
    """Inverse of :func:`format_ranges`; raises ValueError for anything it does not write, and over ``most`` indices."""
    indices: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        begin, end = int(first), int(last or first)
        if not 0 <= begin <= end or (indices and begin <= indices[-1]):
            raise ValueError(f"{part[:80]!r} is not a range of blocks")
        if end - begin >= most - len(indices):
            raise ValueError(f"{text[:80]!r} has more blocks than a plan can read")
        indices.extend(range(begin, end + 1))
    if format_ranges(tuple(indices)) != text:
        raise ValueError(f"{text[:80]!r} is not a list of ranges")
    return tuple(indices)


class Ranges:
    """The lists of ranges of one plan: equal ones become one tuple, and all together have a limit."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, ...]] = {}
        self._left = MAXIMUM_READS

    def parse(self, text: str) -> tuple[int, ...]:
        if text not in self._known:
            self._known[text] = parse_ranges(text, self._left)
            self._left -= len(self._known[text])
        return self._known[text]
