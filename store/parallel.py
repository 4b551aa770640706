"""Threads over many blocks, a bounded number of them at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, and how many of how many bytes are done; from any thread."""


def default_workers() -> int:
    """Threads for bulk work: one for each processor, and one more to wait for the disk."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


def counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    """A function that any thread tells how many bytes more are done."""
    lock = threading.Lock()
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if progress is not None:
                progress(stage, done, total)

    return advance


def run_bounded(
    pool: ThreadPoolExecutor,
    work: Callable[[Item], None],
    items: Iterable[Item],
    ahead: int,
    prepare: Callable[[Item], None] | None = None,
) -> None:
    """Run ``work`` over ``items`` in order, ``ahead`` at a time; the first error stops it and is raised.

    ``prepare`` is called for each item when it is queued, by the caller's thread: the place to read ahead.
    """
    waiting: set[Future[None]] = set()
    source: Iterator[Item] = iter(items)
    try:
        for item in source:
            if prepare is not None:
                prepare(item)
            waiting.add(pool.submit(work, item))
            if len(waiting) >= ahead:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    except BaseException:
        for future in waiting:
            future.cancel()
        raise
