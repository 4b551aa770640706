"""Passes: statistics of whole tensors that the catalog does not have from ingest, and what is kept of them.

What a pass finds is kept in the catalog under the hash of what it depends on: small states as they are, so that a
sweep over a parameter that a pass does not use pays for it once; large ones (histograms) as the coefficients that
followed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.facts import Settle, TensorFacts
from mergepipe.merge.inputs import Model, virtual_blocks
from mergepipe.merge.job import Job
from mergepipe.merge.loaded import Loaded
from mergepipe.merge.method import Coefficients, Method, Pass, Problem
from mergepipe.merge.tiles import Bench, load, tiles
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.catalog import Reading
from mergepipe.store.digest import Digest, hash_bytes, hash_record
from mergepipe.store.errors import DamagedError
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.publish import Changes, publish
from mergepipe.store.store import Store

_LARGEST_STATE: Final = 64 << 10
_LONGEST_HEAD: Final = 1 << 16


@dataclass
class Totals:
    """A pass's state over one tensor: the sum of its blocks' parts.

    Whole numbers are counted on from block to block, in as many arrays as there are threads; the others wait, each
    block's by itself, and are added in the blocks' order.
    """

    problem: Problem
    step: Pass
    _counts: list[NDArray[Any]] = field(default_factory=list)
    _parts: dict[int, NDArray[Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> NDArray[Any]:
        """An array to add a block's part to; then give it to :meth:`add`."""
        with self._lock:
            if self._counts:
                return self._counts.pop()
        return self.step.state(self.problem)

    def add(self, index: int, part: NDArray[Any]) -> None:
        """Take an array back, with a block's part in it."""
        with self._lock:
            if part.dtype.kind in "iu":
                self._counts.append(part)
            else:
                self._parts[index] = part

    def total(self) -> NDArray[Any]:
        """The sum over all blocks."""
        result = self.step.state(self.problem)
        for part in (*self._counts, *(self._parts[index] for index in sorted(self._parts))):
            result += part
        return result


def measure_place(
    bench: Bench, method: Method, step: Pass, job: Job, index: int, loaded: Loaded, problem: Problem,
    coefficients: Coefficients, state: NDArray[Any],
) -> None:  # fmt: skip
    """Add one block's part to a pass's state."""
    stack = loaded.as_stack()
    if stack is not None and step.add_stack is not None:
        step.add_stack(stack, coefficients, state)
        return
    deltas = method.takes_deltas(based=problem.based)
    for tile, _ in tiles(bench, job, index, loaded, deltas=deltas, whole_rows=method.rows):
        step.add(tile, coefficients, state)


@dataclass(frozen=True, slots=True)
class Kept:
    """Where the outcome of one pass over one tensor is kept: its state, or the coefficients that follow from it."""

    state: bytes
    settled: bytes


def keys_of(method: Method, step: Pass, job: Job, problem: Problem, coefficients: Coefficients) -> Kept:
    """The catalog's keys, from all that the pass depends on."""
    used = {name: _fingerprint(coefficients[name]) for name in step.uses}
    head = {
        "pass": [step.add.__module__, step.name],
        "based": problem.based,
        "tensors": [job.reference.id.hex(), *(entry.id.hex() for entry in job.experts)],
        "uses": used,
    }
    everything = {
        **head,
        "method": [method.name, method.version],
        "parameters": dict(problem.parameters),
        "own": [dict(own) for own in problem.experts],
        "coefficients": {name: _fingerprint(array) for name, array in coefficients.items()},
    }
    return Kept(hash_record("recipe", dump_canonical(head)), hash_record("recipe", dump_canonical(everything)))


def _fingerprint(array: NDArray[Any]) -> str:
    head = f"{array.dtype.str}{array.shape}".encode()
    return hash_bytes(head + np.ascontiguousarray(array).tobytes()).hex()


def fingerprint(coefficients: Coefficients) -> Digest:
    """The hash of all coefficients."""
    return hash_record("recipe", dump_canonical({name: _fingerprint(array) for name, array in coefficients.items()}))


def remember(
    method: Method, step: Pass, job: Job, problem: Problem, before: Coefficients, state: NDArray[Any],
    after: Coefficients,
) -> dict[bytes, bytes]:  # fmt: skip
    """The catalog rows that keep a pass's outcome."""
    keys = keys_of(method, step, job, problem, before)
    if state.nbytes <= _LARGEST_STATE:
        return {keys.state: pack_arrays({"state": state})}
    return {keys.settled: pack_arrays(after)}


def recall(
    view: Reading, method: Method, step: Pass, job: Job, problem: Problem, before: Coefficients
) -> Coefficients | None:
    """The coefficients after a pass, where its outcome was kept."""
    keys = keys_of(method, step, job, problem, before)
    row = view.get("tensors", keys.state)
    if row is not None:
        return step.settle(problem, before, _kept_state(row, step, problem))
    row = view.get("tensors", keys.settled)
    return None if row is None else unpack_arrays(row)


def _kept_state(row: bytes, step: Pass, problem: Problem) -> NDArray[Any]:
    state, wanted = unpack_arrays(row).get("state"), step.state(problem)
    if state is None or state.dtype != wanted.dtype or state.shape != wanted.shape:
        raise DamagedError(f"what is kept of a pass is no state of {step.name!r}", hint="Run `mp verify`.")
    return state


def recall_all(view: Reading, method: Method, job: Job, problem: Problem, start: Coefficients) -> Coefficients | None:
    """The coefficients after all passes over a tensor, where every outcome was kept."""
    coefficients: Coefficients | None = start
    for step in method.passes(problem):
        if coefficients is None:
            return None
        coefficients = recall(view, method, step, job, problem, coefficients)
    return coefficients


def kept_settle(store: Store, method: Method) -> Settle:
    """A function that settles from what the catalog keeps."""

    def settle(job: Job, problem: Problem, start: Coefficients) -> Coefficients | None:
        with store.catalog.reading() as view:
            return recall_all(view, method, job, problem, start)

    return settle


def settle_all(
    store: Store,
    models: Sequence[Model],
    unsettled: Sequence[TensorFacts],
    method: Method,
    progress: Progress | None = None,
) -> int:
    """Run all passes over these tensors and keep what they find; returns the expert bytes that were read."""
    from mergepipe.merge.bench import open_bench

    reader = ObjectReader(store.layout)
    bench = open_bench(store, reader, virtual_blocks(models))
    total = sum(facts.entry.nbytes * len(method.passes(facts.problem)) for facts in unsettled)
    advance = counter(progress, "analyze", total)
    workers = default_workers()
    rows: dict[bytes, bytes] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="analyze") as pool:
        for facts in unsettled:
            coefficients = facts.coefficients
            for step in method.passes(facts.problem):
                totals = Totals(facts.problem, step)

                def work(index: int, facts: TensorFacts = facts, step: Pass = step, totals: Totals = totals,
                         coefficients: Coefficients = coefficients) -> None:  # fmt: skip
                    blocks = tuple(entry.blocks[index] for entry in facts.job.experts)
                    loaded = load(bench, facts.job, index, blocks)
                    part = totals.begin()
                    measure_place(bench, method, step, facts.job, index, loaded, facts.problem, coefficients, part)
                    totals.add(index, part)
                    advance(facts.entry.block_span(index)[1])

                run_bounded(pool, work, range(len(facts.entry.blocks)), ahead=2 * workers)
                state = totals.total()
                after = step.settle(facts.problem, coefficients, state)
                rows.update(remember(method, step, facts.job, facts.problem, coefficients, state, after))
                coefficients = after
    publish(store.catalog, None, Changes(tensors=rows))
    return reader.counters.stored[Role.EXPERT]


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Named arrays as one row: the length of a JSON head, the head, and the arrays' bytes."""
    head = json.dumps([[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    return len(head).to_bytes(4, "little") + head + body


def unpack_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """Inverse of :func:`pack_arrays`; raises DamagedError."""
    try:
        length = int.from_bytes(data[:4], "little")
        if length > _LONGEST_HEAD:
            raise ValueError("the head is too long")
        place = 4 + length
        found = {}
        for name, kind, shape in json.loads(data[4:place]):
            dtype = np.dtype(kind)
            if dtype.hasobject:
                raise ValueError("an array of objects")
            count = int(np.prod(shape, dtype=np.int64))
            found[name] = np.frombuffer(data, dtype, count, place).reshape(shape)
            place += count * dtype.itemsize
        if place != len(data):
            raise ValueError("its length is wrong")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"what is kept of a pass cannot be read ({error})", hint="Run `mp verify`.") from error
    return found
