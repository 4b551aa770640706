"""What a user may ask of a plan: a number of bytes, a share of the experts' bytes, or a largest error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mergepipe.store.errors import UsageError
from mergepipe.store.sizes import parse_size


@dataclass(frozen=True, slots=True)
class Budget:
    """Exactly one of them is set; none means that everything is read.

    ``size_bytes``: stored expert bytes. ``share``: of what a full read takes. ``relative_error``: the largest relative
    bound.
    """

    size_bytes: int | None = None
    share: float | None = None
    relative_error: float | None = None

    def in_bytes(self, full_bytes: int) -> int | None:
        """The most expert bytes that may be read, given what a full read takes; None where bytes are not limited."""
        if self.size_bytes is not None:
            return self.size_bytes
        return None if self.share is None else int(full_bytes * self.share)

    def covers(self, full_bytes: int) -> bool:
        """Whether everything may be read."""
        limit = self.in_bytes(full_bytes)
        return limit >= full_bytes if limit is not None else self.relative_error is None


def parse_budget(text: str | None, max_error: float | None = None) -> Budget:
    """``"2GiB"``, ``"10%"``, or a largest relative error; raises UsageError."""
    if text is not None and max_error is not None:
        raise UsageError("--budget and --max-error exclude each other", hint="Give one of them.")
    if max_error is not None:
        if not math.isfinite(max_error) or max_error < 0:
            raise UsageError(f"--max-error must be a number of at least 0, not {max_error}")
        return Budget(relative_error=max_error)
    if text is None:
        return Budget()
    if text.strip().endswith("%"):
        try:
            share = float(text.strip()[:-1]) / 100
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise UsageError(f"{text!r} is not a share", hint="Write a number from 0% to 100%, as in 10%.")
        return Budget(share=share)
    return Budget(size_bytes=parse_size(text))
