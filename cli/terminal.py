"""The one place that writes to the terminal: answers to stdout, all else to stderr; colour only where it is wanted."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, Final, TextIO

_CODES: Final = {
    "bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35", "cyan": "36",
}  # fmt: skip
_COLOUR = re.compile(r"(\033\[[0-9;]*m)")


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colour. ``NO_COLOR`` and ``FORCE_COLOR`` are heeded."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, stream: TextIO | None = None) -> str:
    """The text in a style (``bold``, ``dim``, a colour, or '' for none), if the stream (default: stdout) shows it."""
    if not style or not text or not wants_colour(stream or sys.stdout):
        return text
    return f"\033[{_CODES[style]}m{text}\033[0m"


def say(text: str = "") -> None:
    """A line of the answer. Control characters that came in with names cannot move the cursor."""
    print(harmless(text))


def note(text: str) -> None:
    """A line beside the answer: progress, suggestions, warnings."""
    print(harmless(text), file=sys.stderr, flush=True)


def say_json(value: Any) -> None:
    """The answer as one JSON value."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def harmless(text: str) -> str:
    """The text with control characters written out, all but line ends and our own colours."""
    if text.isprintable():
        return text
    return "".join(part if _COLOUR.fullmatch(part) else _spell_out(part) for part in _COLOUR.split(text))


def _spell_out(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
