"""Work in stages: each in its order, none past a barrier too early, and the first error ends it all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.streams import Barrier, Stream, Task, run_streams


class FailedError(Exception):
    """What a task raises in these tests."""


def nothing() -> None:
    """A task."""


def fail() -> None:
    raise FailedError


class Book:
    """What happened, in order: ("begin" | "stage" | "task" | "end", stream, stage)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def write(self, *line: Any) -> None:
        with self._lock:
            self.lines.append(line)

    def stream(self, number: int, stages: Sequence[int]) -> Stream:
        self.write("begin", number, 0)
        for stage, tasks in enumerate(stages):
            if stage:
                yield Barrier()
            self.write("stage", number, stage)
            for _ in range(tasks):
                yield partial(self.write, "task", number, stage)
        self.write("end", number, 0)


plans = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=5)


@given(plans, st.integers(1, 4), st.integers(1, 4))
def test_all_is_done_once_and_no_stage_before_the_last_is_over(
    stages: list[list[int]], workers: int, side_by_side: int
) -> None:
    book = Book()
    streams: Iterator[Stream] = (book.stream(number, sizes) for number, sizes in enumerate(stages))
    run_streams(streams, workers, side_by_side=side_by_side)
    open_streams = 0
    for kind, number, stage in book.lines:
        open_streams += (kind == "begin") - (kind == "end")
        assert open_streams <= side_by_side
        if kind == "stage":
            before = sum(stages[number][:stage])
            done = [line for line in book.lines[: book.lines.index((kind, number, stage))] if line[0] == "task"]
            assert sum(line[1] == number for line in done) == before
    tasks = [line[1:] for line in book.lines if line[0] == "task"]
    assert sorted(tasks) == sorted(
        (number, stage) for number, sizes in enumerate(stages) for stage, size in enumerate(sizes) for _ in range(size)
    )
    begun = [line[1] for line in book.lines if line[0] == "begin"]
    assert begun == list(range(len(stages)))


def test_one_thread_does_tasks_in_their_order() -> None:
    done: list[int] = []
    tasks: list[Task | Barrier] = [partial(done.append, number) for number in range(100)]
    run_streams(iter([iter(tasks)]), 1)
    assert done == list(range(100))


def test_while_one_waits_at_its_barrier_another_works() -> None:
    """The first stream's task ends when the second's has run: one by one they would never end."""
    met = threading.Event()

    def wait() -> None:
        assert met.wait(20)

    def first() -> Stream:
        yield wait
        yield Barrier()

    run_streams(iter([first(), iter([met.set])]), 2, side_by_side=2)
    assert met.is_set()


def test_none_holds_the_next_stream_back_until_another_ends() -> None:
    book = Book()

    def streams() -> Iterator[Stream | None]:
        for number in range(4):
            while sum(line[0] == "end" for line in book.lines) < number:
                yield None
            yield book.stream(number, [3, 3])

    run_streams(streams(), 2, side_by_side=4)
    kinds = [line for line in book.lines if line[0] in ("begin", "end")]
    assert kinds == [(kind, number, 0) for number in range(4) for kind in ("begin", "end")]


def test_tasks_are_handed_out_a_few_at_a_time() -> None:
    """Their inputs are read ahead: a stream that ran away would fill memory."""
    running, handed, most = threading.Lock(), 0, 0
    done = 0

    def task() -> None:
        nonlocal done
        with running:
            done += 1

    def stream() -> Stream:
        nonlocal handed, most
        for _ in range(200):
            handed += 1
            with running:
                most = max(most, handed - done)
            yield task

    run_streams(iter([stream()]), 3)
    assert done == 200
    assert most <= 2 * 3 + 1


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("place", [0, 1, 7])
def test_an_error_ends_all_streams_and_is_raised_once(workers: int, place: int) -> None:
    """Neither what comes after a barrier, nor another stream's later stages, nor streams that did not begin."""
    book = Book()
    raised: list[BaseException] = []

    def failing() -> Stream:
        for number in range(8):
            yield fail if number == place else nothing
        yield Barrier()
        book.write("passed", 0, 0)

    def endless() -> Stream:
        while True:
            yield nothing
            yield Barrier()

    started = threading.active_count()
    try:
        run_streams(iter([failing(), endless(), endless(), book.stream(9, [1])]), workers, side_by_side=3)
    except FailedError as error:
        raised.append(error)
    assert len(raised) == 1
    assert book.lines == []
    assert threading.active_count() == started


def test_a_failed_task_is_never_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that has ended may not have said how yet: what follows its barrier would believe in half a sum."""
    slow = Future.set_exception

    def set_exception(future: Future[None], error: BaseException | None) -> None:
        time.sleep(0.2)
        slow(future, error)

    monkeypatch.setattr(Future, "set_exception", set_exception)
    passed: list[int] = []

    def stream() -> Stream:
        yield fail
        yield Barrier()
        passed.append(1)

    with pytest.raises(FailedError):
        run_streams(iter([stream()]), 2)
    assert passed == []


@pytest.mark.parametrize("many", [1, 20])
def test_of_many_errors_the_first_is_raised(many: int) -> None:
    def number(value: int) -> None:
        raise FailedError(value)

    tasks: list[Task | Barrier] = [partial(number, value) for value in range(many)]
    with pytest.raises(FailedError) as caught:
        run_streams(iter([iter(tasks)]), 1)
    assert caught.value.args == (0,)


def broken_stream() -> Stream:
    yield nothing
    raise FailedError


def broken_streams() -> Iterator[Stream]:
    yield iter([nothing])
    raise FailedError


@pytest.mark.parametrize("streams", [lambda: iter([broken_stream()]), broken_streams])
def test_an_error_of_a_stream_itself_is_raised_too(streams: Callable[[], Iterator[Stream]]) -> None:
    with pytest.raises(FailedError):
        run_streams(streams(), 2)


def test_tasks_that_did_not_begin_are_dropped() -> None:
    """After the error nothing new begins; what runs is waited for."""
    done: list[int] = []
    entered = threading.Event()

    def long() -> None:
        entered.set()
        time.sleep(0.2)
        done.append(-1)

    def failing() -> None:
        entered.wait(20)
        raise FailedError

    later: list[Task | Barrier] = [partial(done.append, number) for number in range(2)]
    with pytest.raises(FailedError):
        run_streams(iter([iter([long, failing, *later])]), 2)
    assert -1 in done
    assert len(done) <= 2, "one may have begun while the error was raised"


def test_nothing_to_do() -> None:
    run_streams(iter([]), 2)
    run_streams(iter([iter([]), iter([Barrier(), Barrier()])]), 2)
