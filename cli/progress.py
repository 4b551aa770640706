"""Progress bars: bytes, rate and time left, on stderr, only where somebody is watching."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.store.parallel import Progress

_INTERVAL_SECONDS: Final = 0.1


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress | None]:
    """A callback ``(stage, done, total)`` in bytes that draws a bar for each stage; None where stderr is no terminal.

    The callback may be called from several threads, as often as one likes. The bars vanish at the end.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bars:
        yield _Throttle(bars)


class _Throttle:
    """Hands on no more updates than an eye can follow."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, float] = {}
        self._next = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            if now < self._next and done < total and stage in self._tasks:
                return
            self._next = now + _INTERVAL_SECONDS
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, rate="")
                self._began[stage] = now
            task, elapsed = self._tasks[stage], now - self._began[stage]
        rate = f"{format_size(round(done / elapsed))}/s" if elapsed > _INTERVAL_SECONDS else ""
        self._bars.update(task, completed=done, total=total, rate=rate)
