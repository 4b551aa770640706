"""Which store a command line asks for, before anything is imported that could open one."""

from __future__ import annotations

import os
from pathlib import Path


class _Default:
    """What ``mp --store DIR COMMAND`` said, for commands that were not told themselves."""

    store: Path | None = None


def set_default_store(path: Path | None) -> None:
    """Remember the store that stood before the command's name; None where there was none."""
    _Default.store = path


def chosen_store(option: Path | None) -> Path | None:
    """The store that was asked for: after the command, before it, or by ``MP_STORE``; None where nothing was said."""
    if option is not None:
        return option
    if _Default.store is not None:
        return _Default.store
    named = os.environ.get("MP_STORE")
    return Path(named) if named else None
