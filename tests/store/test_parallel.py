"""Many items, a bounded number at a time, and the first error stops it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mergepipe.store.parallel import default_workers, run_bounded


def test_every_item_is_worked_on_once() -> None:
    done: list[int] = []
    prepared: list[int] = []
    with ThreadPoolExecutor(3) as pool:
        run_bounded(pool, done.append, range(100), 4, prepared.append)
    assert sorted(done) == list(range(100))
    assert set(prepared) <= set(range(100)), "nobody waits for all of it"
    assert len(prepared) == len(set(prepared)) > 0


def test_preparing_goes_no_further_ahead_than_its_window() -> None:
    prepared: list[int] = []

    def work(number: int) -> None:
        if number == 20:
            raise ValueError("twenty")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="twenty"):
        run_bounded(pool, work, itertools.count(), 4, prepared.append)
    assert max(prepared) < 20 + 4 + 4 + 48


def test_no_more_than_so_many_wait() -> None:
    taken = 0
    worst = 0
    finished = 0
    lock = threading.Lock()

    def items() -> Iterator[int]:
        nonlocal taken, worst
        for number in range(200):
            with lock:
                taken += 1
                worst = max(worst, taken - finished)
            yield number

    def work(_: int) -> None:
        nonlocal finished
        with lock:
            finished += 1

    with ThreadPoolExecutor(2) as pool:
        run_bounded(pool, work, items(), 5)
    assert worst <= 6


def test_the_first_error_stops_an_endless_run() -> None:
    seen: list[int] = []

    def work(number: int) -> None:
        seen.append(number)
        if number == 7:
            raise ValueError("seven")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="seven"):
        run_bounded(pool, work, itertools.count(), 4)
    assert max(seen) < 7 + 8


def test_an_error_of_the_source_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("source")

    with ThreadPoolExecutor(2) as pool, pytest.raises(KeyError, match="source"):
        run_bounded(pool, lambda _: None, items(), 4)


def test_there_is_a_worker_more_than_processors() -> None:
    assert default_workers() >= 2
