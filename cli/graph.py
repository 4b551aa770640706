"""Lanes for ``mp log --graph``: which column each commit stands in, and the lines between them, in plain ASCII.

::

    *  merged/v1             a commit
    +-+-.                    its parents: one goes on below it, two get lanes of their own
    | | *  code
    +---'                    code's parent is what the first lane leads to as well
    | *  math
    +-'
    *  base
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mergepipe.store.digest import Digest


@dataclass
class Lanes:
    """Columns from left to right: each waits for one commit, or is free (None)."""

    _waiting: list[Digest | None] = field(default_factory=list)

    def place(self, commit: Digest, parents: Sequence[Digest]) -> tuple[str, str, str]:
        """Draw the next commit: ``(its own line, the line to its parents or '', the line that goes on below)``."""
        column = self._column(commit)
        own = "".join("* " if i == column else "| " if each else "  " for i, each in enumerate(self._waiting))
        before = [each is not None for each in self._waiting]
        self._waiting[column] = None
        targets: dict[int, bool] = {}  # column -> whether a lane was there already
        for parent in dict.fromkeys(parents):
            known = parent in self._waiting
            first_free = column if self._waiting[column] is None else None
            target = self._waiting.index(parent) if known else self._take(parent, first_free)
            targets[target] = known
        links = self._links(column, targets, before)
        while self._waiting and self._waiting[-1] is None:
            self._waiting.pop()
        return own.rstrip(), links.rstrip(), self.below()

    def below(self) -> str:
        """The lanes that go on, as one line."""
        return "".join("| " if each else "  " for each in self._waiting).rstrip()

    def _column(self, commit: Digest) -> int:
        return self._waiting.index(commit) if commit in self._waiting else self._take(commit, None)

    def _take(self, commit: Digest, column: int | None) -> int:
        if column is None:
            column = self._waiting.index(None) if None in self._waiting else len(self._waiting)
        if column == len(self._waiting):
            self._waiting.append(None)
        self._waiting[column] = commit
        return column

    def _links(self, column: int, targets: dict[int, bool], before: list[bool]) -> str:
        """The line that joins ``column`` to its targets; '' where the lane only goes straight on."""
        if set(targets) <= {column}:
            return ""
        left, right = min(column, *targets), max(column, *targets)
        line = []
        for i in range(max(len(self._waiting), len(before))):
            goes_on = i < len(self._waiting) and self._waiting[i] is not None
            if i == column:
                mark = "+" if i in targets else "'"
            elif i in targets:
                mark = "+" if targets[i] else "."
            else:
                mark = "|" if goes_on else "-" if left < i < right else " "
            line.append(mark + ("-" if left <= i < right else " "))
        return "".join(line)
