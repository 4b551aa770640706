"""All blocks of a merge, streaming: the base's own, known from before, or computed.

A *place* (one block index of one tensor) is one task. The base's block and the planned experts' blocks are decoded into
a thread's own buffers, merged tile by tile, rounded, hashed, and stored as a delta to the base's block. A place's
*recipe* (method, coefficients, types and input ids, hashed) leads to its result where it was computed before; then
nothing is read. The thread that hands out places looks that up, and reads ahead for those that are computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mergepipe.merge.method import Coefficients, Method
from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Plan, TensorPlan
from mergepipe.merge.planner import coefficients_of, keeps_base
from mergepipe.merge.tiles import PlaceWork, merge_place
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.chunking import block_elements
from mergepipe.store.digest import DIGEST_BYTES, Digest, hash_record
from mergepipe.store.dtypes import DTYPES, DType
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.objects import ObjectReader
from mergepipe.store.parallel import Progress, counter, run_bounded
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.staging import Staging, is_stored
from mergepipe.store.store import Store


@dataclass
class Run:
    """The state of one execution, shared by its threads. ``results`` maps new recipes to their blocks.

    ``deltas``: statistics rows of the new blocks, so that a result can be compared, and merged again, unread.
    """

    store: Store
    plan: Plan
    reader: ObjectReader
    staging: Staging
    use_cache: bool
    results: dict[bytes, Digest] = field(default_factory=dict)
    deltas: dict[bytes, bytes] = field(default_factory=dict)
    relied_on: set[Digest] = field(default_factory=set)
    computed: int = 0
    cached: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor that the plan speaks of. ``reads``: for each expert the indices of its blocks that are read."""

    plan: TensorPlan
    base: TensorEntry
    experts: tuple[TensorEntry, ...]
    reads: tuple[frozenset[int], ...]
    coefficients: Coefficients
    out_type: DType
    blocks: list[Digest]


@dataclass(frozen=True, slots=True)
class _Place:
    """One block to compute. ``experts``: the block of each that is read, the base's for the others."""

    tensor: _Tensor
    index: int
    experts: tuple[Digest, ...]
    recipe: Digest


def compute(
    run: Run, base: Snapshot, experts: list[Snapshot], workers: int, progress: Progress | None
) -> dict[str, TensorEntry]:
    """All tensors of the result; those that the plan leaves alone are the base's own entries."""
    method = find_method(run.plan.method)
    everywhere = run.plan.dtype is not None or not keeps_base(method, run.plan.experts, run.plan.parameters)
    tensors = {
        name: _tensor(run.plan, method, planned, base.tensors[name], [expert.tensors[name] for expert in experts])
        for name, planned in run.plan.tensors.items()
    }
    advance = counter(progress, "merge", sum(tensor.base.nbytes for tensor in tensors.values()))

    def finished(tensor: _Tensor, index: int, digest: Digest) -> None:
        tensor.blocks[index] = digest
        advance(tensor.base.block_span(index)[1])

    def places() -> Iterator[_Place]:
        for tensor in tensors.values():
            for index in range(len(tensor.base.blocks)):
                place = _look_up(run, tensor, index, everywhere=everywhere)
                if isinstance(place, Digest):
                    finished(tensor, index, place)
                else:
                    yield place

    def work(place: _Place) -> None:
        finished(place.tensor, place.index, _compute_place(run, method, place))

    def prefetch(place: _Place) -> None:
        for digest in {place.tensor.base.blocks[place.index], *place.experts}:
            run.reader.prefetch(digest)

    with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
        run_bounded(pool, work, places(), ahead=2 * workers, prepare=prefetch)
    return {
        name: _entry(tensors[name]) if name in tensors else _untouched(entry, run.plan.dtype)
        for name, entry in base.tensors.items()
    }


def _tensor(plan: Plan, method: Method, planned: TensorPlan, base: TensorEntry, experts: list[TensorEntry]) -> _Tensor:
    return _Tensor(
        plan=planned,
        base=base,
        experts=tuple(experts),
        reads=tuple(frozenset(indices) for indices in planned.reads),
        coefficients=coefficients_of(method, plan.experts, plan.parameters, planned.thresholds),
        out_type=DTYPES[plan.dtype] if plan.dtype is not None else base.element_type,
        blocks=list(base.blocks),
    )


def _entry(tensor: _Tensor) -> TensorEntry:
    return TensorEntry(tensor.out_type.name, tensor.base.shape, tensor.base.chunks, tuple(tensor.blocks))


def _untouched(entry: TensorEntry, dtype: str | None) -> TensorEntry:
    """The base's own tensor; an empty one, which has nothing to compute, gets the result's type all the same."""
    if dtype is None or not entry.element_type.has_statistics:
        return entry
    return TensorEntry(dtype, entry.shape, entry.chunks, entry.blocks)


def _look_up(run: Run, tensor: _Tensor, index: int, *, everywhere: bool) -> Digest | _Place:
    """The block's id where it is the base's own or known from before, else what computing it takes."""
    base = tensor.base.blocks[index]
    if not everywhere and not any(index in indices for indices in tensor.reads):
        run.relied_on.add(base)
        return base
    experts = tuple(
        entry.blocks[index] if index in indices else base
        for entry, indices in zip(tensor.experts, tensor.reads, strict=True)
    )
    place = _Place(tensor, index, experts, recipe_id(run.plan, tensor.plan, base, experts, tensor))
    size = tensor.out_type.nbytes(block_elements(tensor.base.shape, tensor.base.chunks, index)[1])
    known = _known_result(run, place.recipe, size) if run.use_cache else None
    return known if known is not None else place


def _compute_place(run: Run, method: Method, place: _Place) -> Digest:
    tensor = place.tensor
    work = PlaceWork(
        method=method,
        coefficients=tensor.coefficients,
        base=tensor.base.blocks[place.index],
        experts=place.experts,
        base_type=tensor.base.element_type,
        expert_types=tuple(entry.element_type for entry in tensor.experts),
        out_type=tensor.out_type,
        size_bytes=tensor.base.block_span(place.index)[1],
    )
    digest, statistics = merge_place(run.store.catalog, run.reader, run.staging, work)
    with run.lock:
        run.relied_on.add(digest)  # it may have been in the store before
        run.computed += 1
        if digest != work.base:
            run.deltas[work.base + digest] = statistics.pack()
        run.results[place.recipe] = digest
    return digest


def _known_result(run: Run, recipe: Digest, size: int) -> Digest | None:
    with run.store.catalog.reading() as view:
        found = view.get("results", recipe)
        row = view.object_row(Digest(found)) if found is not None and len(found) == DIGEST_BYTES else None
    if (
        found is None
        or row is None
        or row.raw_bytes != size
        or not is_stored(run.store.layout, run.store.catalog, Digest(found))
    ):
        return None
    run.cached += 1
    run.relied_on.add(Digest(found))
    return Digest(found)


def recipe_id(plan: Plan, planned: TensorPlan, base: Digest, experts: tuple[Digest, ...], tensor: _Tensor) -> Digest:
    """What a block's result depends on, and nothing else: a change of another layer leaves it as it is."""
    recipe = {
        "method": [plan.method, plan.method_version],
        "parameters": dict(plan.parameters),
        "experts": [
            [block.hex(), entry.dtype, {k: v for k, v in sorted(item.parameters.items()) if k != "density"}, bits]
            for block, entry, item, bits in zip(experts, tensor.experts, plan.experts, planned.thresholds, strict=True)
        ],
        "base": [base.hex(), tensor.base.dtype],
        "out": tensor.out_type.name,
    }
    return hash_record("recipe", dump_canonical(recipe))
