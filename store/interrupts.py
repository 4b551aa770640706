"""Ctrl-C, and the one moment in which it comes too late."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def too_late_to_interrupt() -> Iterator[None]:
    """Drops a Ctrl-C that comes inside the block, which is short and makes finished work visible.

    Raised there, KeyboardInterrupt would say that nothing was done when all of it was. Only the main thread is ever
    interrupted, so elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is None:  # not Python's to restore
        yield
        return

    def drop(_number: int, _frame: FrameType | None) -> None:
        return

    signal.signal(signal.SIGINT, drop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
