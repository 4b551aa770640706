"""Work in stages: tasks that may run side by side, and barriers between them, several such streams at once.

A tensor that is read before it is merged has a barrier in the middle. While one stream waits at its barrier the tasks
of the next keep the threads busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

Task = Callable[[], None]


class Barrier:
    """Where a stream waits until all tasks that it handed out before are done."""


Stream = Iterator[Task | Barrier]


@dataclass
class _Running:
    """One stream, and its tasks that are not known to have ended well."""

    stream: Stream
    waiting: set[Future[None]] = field(default_factory=set)


def run_streams(streams: Iterator[Stream | None], workers: int, *, side_by_side: int = 3, name: str = "merge") -> None:
    """Run all streams' tasks on ``workers`` threads; the first error stops everything and is raised.

    ``streams`` gives None where the next stream should not begin before another has ended.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix=name) as pool:
        _Scheduler(pool, 2 * workers, side_by_side).run(streams)


class _Scheduler:
    def __init__(self, pool: ThreadPoolExecutor, ahead: int, side_by_side: int) -> None:
        self._pool = pool
        self._ahead = ahead
        self._side_by_side = side_by_side
        self._waiting: set[Future[None]] = set()

    def run(self, streams: Iterator[Stream | None]) -> None:
        active: deque[_Running] = deque()
        more = True
        try:
            while more or active:
                while more and len(active) < self._side_by_side:
                    found = next(streams, ...)
                    if found is ...:
                        more = False
                    elif found is None:
                        break
                    else:
                        active.append(_Running(found))
                if active:
                    running = active.popleft()
                    self._until_done(running)
                    if self._advance(running):
                        active.append(running)
            while self._waiting:
                self._some_done()
        except BaseException:
            for future in self._waiting:
                future.cancel()
            raise

    def _advance(self, running: _Running) -> bool:
        """Hand out a stream's tasks up to its next barrier; False at its end."""
        for step in running.stream:
            if isinstance(step, Barrier):
                return True
            future = self._pool.submit(step)
            running.waiting.add(future)
            self._waiting.add(future)
            while len(self._waiting) >= self._ahead:
                self._some_done()
            running.waiting &= self._waiting
        return False

    def _until_done(self, running: _Running) -> None:
        """Wait for a stream's tasks, one by one: none that failed is taken for done."""
        while True:
            self._collect()
            running.waiting &= self._waiting
            if not running.waiting:
                return
            wait(running.waiting, 0.5, FIRST_COMPLETED)

    def _collect(self) -> None:
        """Raise what tasks that are done raised."""
        for future in [future for future in self._waiting if future.done()]:
            self._waiting.discard(future)
            future.result()

    def _some_done(self) -> None:
        done, self._waiting = wait(self._waiting, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
