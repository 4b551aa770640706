"""Threads over many blocks, a bounded number of them at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")
_PREPARERS: Final = 4  # small files from a cold disk: four waiting threads read twice as fast as one, eight no faster
_WINDOW: Final = 48
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

    ``prepare`` is called for each item some places before its turn, by threads of its own: it may wait for the disk,
    must not fail, and nobody waits for it.
    """
    waiting: set[Future[None]] = set()
    with _Preparing(prepare) as prepared:
        try:
            for item in prepared(items):
                waiting.add(pool.submit(work, item))
                if len(waiting) >= ahead:
                    waiting = _some_done(waiting)
            while waiting:
                waiting = _some_done(waiting)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


def _some_done(waiting: set[Future[None]]) -> set[Future[None]]:
    """Wait for one at least; returns those that are not done. Raises what the done ones raised."""
    done, left = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return left


class _Preparing(Generic[Item]):
    """Hands items on in order, and has each prepared ``_WINDOW`` items earlier."""

    def __init__(self, prepare: Callable[[Item], None] | None) -> None:
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(_PREPARERS, thread_name_prefix="read-ahead") if prepare else None

    def __enter__(self) -> Callable[[Iterable[Item]], Iterator[Item]]:
        return self._items

    def _items(self, items: Iterable[Item]) -> Iterator[Item]:
        if self._pool is None or self._prepare is None:
            yield from items
            return
        held: deque[Item] = deque()
        for item in items:
            self._pool.submit(self._prepare, item)
            held.append(item)
            if len(held) > _WINDOW:
                yield held.popleft()
        yield from held

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
