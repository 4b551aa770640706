"""The error tree: what can go wrong, by who can mend it.

::

    MergePipeError
    ├── UsageError         exit 2   the command was asked for something it does not take
    ├── NotFoundError      exit 3   a ref, commit, tensor or object that is not in the store
    ├── BadInputError      exit 4   a checkpoint, plan or recipe that cannot be trusted or understood
    ├── DamagedError       exit 5   the store's own bytes are not what they were
    ├── ConflictError      exit 6   somebody else moved what was about to be moved
    ├── BudgetError        exit 7   a budget that cannot be met
    └── EnvironmentalError exit 8   disk full, wrong filesystem, no permission

Every error carries a stable ``kind`` for scripts, an ``exit_code``, a message that names the file or tensor,
and a ``hint`` that says what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from mergepipe.store.digest import Digest


class MergePipeError(Exception):
    """Base of every error that MergePipe raises on purpose."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def as_json(self) -> dict[str, object]:
        """The error as the ``--json`` output shows it."""
        return {"error": self.kind, "message": self.message, "hint": self.hint}


class UsageError(MergePipeError):
    kind = "usage"
    exit_code = 2


class NotFoundError(MergePipeError):
    kind = "not_found"
    exit_code = 3


class BadInputError(MergePipeError):
    kind = "bad_input"
    exit_code = 4


class DamagedError(MergePipeError):
    """``object_id``: the object that is damaged, where that is one."""

    kind = "damaged"
    exit_code = 5

    def __init__(self, message: str, *, hint: str | None = None, object_id: Digest | None = None) -> None:
        super().__init__(message, hint=hint)
        self.object_id = object_id


class ConflictError(MergePipeError):
    kind = "conflict"
    exit_code = 6


class BudgetError(MergePipeError):
    kind = "budget"
    exit_code = 7


class EnvironmentalError(MergePipeError):
    kind = "environment"
    exit_code = 8


def nearest(wanted: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest known names, or an empty string."""
    close = difflib.get_close_matches(wanted, list(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
