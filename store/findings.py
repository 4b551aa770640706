"""One line of what ``mp doctor`` says: what was looked at, how it is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mergepipe.store.errors import EnvironmentalError


class Level(StrEnum):
    """How it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``exit_code`` is 0 for what is no problem."""

    check: str
    level: Level
    text: str
    advice: str = ""
    exit_code: int = 0


def well(check: str, text: str) -> Finding:
    """As it should be."""
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, advice: str) -> Finding:
    """Works, but may go wrong, or goes less well than it could."""
    return Finding(check, Level.WARNING, text, advice)


def problem(check: str, text: str, advice: str, exit_code: int = EnvironmentalError.exit_code) -> Finding:
    """Something does not work, or is damaged."""
    return Finding(check, Level.PROBLEM, text, advice, exit_code)
