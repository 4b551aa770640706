"""``mp repack``: blocks that take clearly fewer bytes in another encoding are written anew. Ids never change.

The main case is a model that came in without its base: its blocks were stored whole, and can be differences to the
base's blocks. Others: blocks that were kept raw, and differences that are larger than the block by itself. A block that
some delta is stored against stays what it is, for a delta's base is never a delta; a difference to a block that is one
itself is taken to that one's base.

A dry run encodes a sample and says what that would save. In earnest, 64 blocks at a time are encoded, read back,
compared with their ids, and put in place (:mod:`mergepipe.store.replace`). It can be stopped at any time, and goes on
where it stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mergepipe.store import codecs
from mergepipe.store.catalog import ObjectRow, Reading
from mergepipe.store.chunking import block_elements
from mergepipe.store.codecs import scratch
from mergepipe.store.digest import Buffer, Digest
from mergepipe.store.errors import BadInputError, DamagedError, EnvironmentalError, UsageError
from mergepipe.store.frame import HEADER_BYTES, Encoding, Header, Kind
from mergepipe.store.layout import Layout
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.refs import all_refs
from mergepipe.store.replace import (
    MAY_BE_BASES,
    Replacement,
    bases_of_deltas,
    refuse_other_writers,
    replace_objects,
    settle,
)
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.staging import Staging
from mergepipe.store.suggest import suggest_stored_base

if TYPE_CHECKING:
    from mergepipe.store.store import Store

_BATCH_BLOCKS: Final = 64
_SAMPLE_BLOCKS: Final = 96
_WORTH_IT: Final = 0.95  # of a file's bytes: what shrinks by less stays
_LEAST_RAW_BYTES: Final = 256  # below, the frame outweighs what an encoding could save
_DELTA_IS_GOOD: Final = 0.4  # below this share of the raw size nobody looks whether planes were smaller


@dataclass(frozen=True, slots=True)
class Model:
    """One model, and the base that its blocks may be differences to. ``why``: how the base was found."""

    ref: str
    snapshot: Snapshot
    base: Snapshot | None = None
    base_name: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Repacked:
    """What became of one model, or would.

    ``blocks``: how many might shrink, of which ``measured`` were encoded; ``replaced`` of those took clearly fewer
    bytes. ``before_bytes`` and ``after_bytes`` are those blocks' files; after a sample all three are estimates.
    ``unreadable``: blocks that could not be read; `mp verify` says more. ``left``: those that somebody else changed, or
    began to rely on, meanwhile.
    """

    model: Model
    blocks: int = 0
    measured: int = 0
    replaced: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    unreadable: int = 0
    left: int = 0

    @property
    def saved_bytes(self) -> int:
        return self.before_bytes - self.after_bytes

    @property
    def is_estimate(self) -> bool:
        return self.measured < self.blocks


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A block that might shrink: as planes, or as a delta to ``root`` (a block that is no delta)."""

    digest: Digest
    row: ObjectRow
    width: int
    root: Digest | None
    planes: bool


@dataclass
class _Tally:
    """What threads found so far."""

    found: list[Replacement] = field(default_factory=list)
    measured_bytes: int = 0
    unreadable: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def models_to_repack(store: Store, refs: Sequence[str] = (), base: str | None = None) -> list[Model]:
    """The models that refs name (all, without refs), oldest first, each with its base.

    The base is the one that is named, else the one that the commit names, else an older model that resembles it.

    Raises:
        NotFoundError: a ref, or the base, does not exist.
        UsageError: a base is named, but no ref.
    """
    if base is not None and not refs:
        raise UsageError("--base says what one model differs from, and no REF was given", hint="Name the model too.")
    with store.catalog.reading() as view:
        names = list(dict.fromkeys(refs)) or [ref.name for ref in all_refs(view)]
    found: dict[Digest, Model] = {}
    for name in names:
        snapshot = store.snapshot(name)
        if snapshot.commit_id not in found:
            found[snapshot.commit_id] = _with_base(store, name, snapshot, base)
    return sorted(found.values(), key=lambda model: model.snapshot.commit.time)


def _with_base(store: Store, name: str, snapshot: Snapshot, base: str | None) -> Model:
    if "adapter_config.json" in snapshot.files:
        return Model(name, snapshot)
    if base is not None:
        named = store.snapshot(base)
        if not any(tensor in named.tensors for tensor in snapshot.tensors):
            raise BadInputError(
                f"none of the {len(snapshot.tensors)} tensors of {name!r} is in the base {base!r}",
                hint="Name the base that it was trained from.",
            )
        return Model(name, snapshot, named, base, "it was named")
    parent = snapshot.commit.parent("base")
    if parent is not None:
        return Model(
            name, snapshot, store.snapshot_of(parent.commit), parent.name or parent.commit.short, "its commit says so"
        )
    suggestion = suggest_stored_base(store, snapshot)
    if suggestion is None:
        return Model(name, snapshot)
    return Model(name, snapshot, store.snapshot(suggestion.ref), suggestion.ref, suggestion.reason)


def measure(
    store: Store, models: Sequence[Model], *, full: bool = False, progress: Progress | None = None
) -> list[Repacked]:
    """What :func:`repack` would save; writes nothing. Encodes a sample of each model's blocks, or all with ``full``."""
    seen: set[Digest] = set()
    results = []
    for model in models:
        candidates, tally = _candidates(store, model, seen), _Tally()
        sample = candidates if full else _spread(candidates, _SAMPLE_BLOCKS)
        _encode_all(store, None, sample, tally, progress, model.ref)
        results.append(_estimate(model, candidates, len(sample), tally))
    return results


def repack(store: Store, models: Sequence[Model], progress: Progress | None = None) -> list[Repacked]:
    """Write blocks anew where that saves bytes; returns what was done.

    Raises:
        ConflictError: somebody else is writing to the store. What was done by then stays.
        DamagedError: the catalog cannot be read, or a block.
        EnvironmentalError: the disk is full, or the like; likewise.
    """
    store.catalog.check()
    settle(store.catalog, store.layout)
    seen: set[Digest] = set()
    results = []
    with Staging(store.layout, store.catalog) as staging:
        for model in models:
            staging.pin(each.commit_id for each in (model.snapshot, model.base) if each is not None)
            candidates = _candidates(store, model, seen)
            if any(each.root is not None for each in candidates):
                refuse_other_writers(store.layout, staging.path)
            results.append(_repack_model(store, staging, model, candidates, progress))
    return results


def _repack_model(
    store: Store, staging: Staging, model: Model, candidates: Sequence[_Candidate], progress: Progress | None
) -> Repacked:
    tally, done, left = _Tally(), list[Replacement](), 0
    advance = counter(progress, f"repack {model.ref}", sum(each.row.raw_bytes for each in candidates))
    waiting = iter(candidates)
    while batch := list(islice(waiting, _BATCH_BLOCKS)):
        tally.found = []
        for root in {each.root for each in batch if each.root is not None}:
            staging.claim(root)  # no collection may take it from now on
        _encode_all(store, staging, batch, tally, None, model.ref)
        taken = staging.take_batch()
        if tally.found:
            placed = replace_objects(store.catalog, taken, tally.found)
            done += placed
            left += len(tally.found) - len(placed)
        for digest in taken.rows:
            with suppress(OSError):  # those that were left; what stays goes with the folder
                taken.file_of(digest).unlink()
        advance(sum(each.row.raw_bytes for each in batch))
    before, after = _sizes(done)
    return Repacked(
        model, len(candidates), len(candidates), len(done), before, after, unreadable=tally.unreadable, left=left
    )


def _estimate(model: Model, candidates: Sequence[_Candidate], measured: int, tally: _Tally) -> Repacked:
    total = sum(each.row.stored_bytes for each in candidates)
    grow = total / tally.measured_bytes if tally.measured_bytes else 0.0
    if measured == len(candidates):
        grow = 1.0
    before, after = _sizes(tally.found)
    return Repacked(
        model,
        blocks=len(candidates),
        measured=measured,
        replaced=min(round(grow * len(tally.found)), len(candidates)),
        before_bytes=round(grow * before),
        after_bytes=round(grow * after),
        unreadable=tally.unreadable,
    )


def _sizes(found: Sequence[Replacement]) -> tuple[int, int]:
    return sum(each.old.stored_bytes for each in found), sum(each.new.stored_bytes for each in found)


def _spread(candidates: Sequence[_Candidate], count: int) -> list[_Candidate]:
    """So many of them, evenly over the whole."""
    if len(candidates) <= count:
        return list(candidates)
    return [candidates[number * len(candidates) // count] for number in range(count)]


def _candidates(store: Store, model: Model, seen: set[Digest]) -> list[_Candidate]:
    """The blocks of a model that might shrink, and were not looked at before; from the catalog's rows alone."""
    found = []
    with store.catalog.reading() as view:
        bases = bases_of_deltas(view)
        for digest, width, at_base in _places(model):
            if digest in seen:
                continue
            seen.add(digest)
            row = view.object_row(digest)
            if row is None or row.kind not in MAY_BE_BASES or row.raw_bytes < _LEAST_RAW_BYTES:
                continue
            width = codecs.effective_width(row.raw_bytes, width)
            may_be_delta = row.encoding is not Encoding.DELTA and digest not in bases and width in codecs.DELTA_WIDTHS
            root = _root(view, digest, row, at_base) if may_be_delta and at_base is not None else None
            planes = row.encoding is Encoding.RAW or (
                row.encoding is Encoding.DELTA and row.stored_bytes > _DELTA_IS_GOOD * row.raw_bytes
            )
            if (root is not None or planes) and view.get("damaged", digest) is None:
                found.append(_Candidate(digest, row, width, root, planes))
    return found


def _places(model: Model) -> Iterator[tuple[Digest, int, Digest | None]]:
    """Each block of a model: its id, its planes, and the base's block that a delta could be taken to."""
    known = model.base.tensors if model.base is not None else {}
    for name, entry in model.snapshot.tensors.items():
        base = known.get(name)
        comparable = base is not None and base.dtype == entry.dtype and entry.element_type.is_float
        for index, digest in enumerate(entry.blocks):
            at_base = _at_same_place(entry, base, index) if comparable and base is not None else None
            yield digest, entry.element_type.plane_bytes, at_base
    for file in [*model.snapshot.files.values(), *(shard.header for shard in model.snapshot.shards)]:
        for digest in file.blocks:
            yield digest, 1, None


def _at_same_place(entry: TensorEntry, base: TensorEntry, index: int) -> Digest | None:
    """The base's block that holds the same elements."""
    if len(entry.shape) != len(base.shape) or entry.shape[1:] != base.shape[1:] or index >= len(base.blocks):
        return None
    same = block_elements(base.shape, base.chunks, index) == block_elements(entry.shape, entry.chunks, index)
    return base.blocks[index] if same else None


def _root(view: Reading, digest: Digest, row: ObjectRow, at_base: Digest) -> Digest | None:
    """What a delta to the base's block is taken to: the block itself, or what that one is stored against."""
    base = view.object_row(at_base)
    root = base.base if base is not None and base.encoding is Encoding.DELTA else at_base
    found = view.object_row(root) if root is not None else None
    if root is None or root == digest or found is None or view.get("damaged", root) is not None:
        return None
    good = found.encoding is not Encoding.DELTA and found.raw_bytes == row.raw_bytes and found.kind in MAY_BE_BASES
    return root if good else None


def _encode_all(
    store: Store,
    staging: Staging | None,
    candidates: Sequence[_Candidate],
    tally: _Tally,
    progress: Progress | None,
    ref: str,
) -> None:
    advance = counter(progress, f"measure {ref}", sum(each.row.raw_bytes for each in candidates))
    staged = ObjectReader(_Staged(store.layout, staging.path)) if staging is not None else None

    def one(candidate: _Candidate) -> None:
        try:
            found = _encode(store.reader, candidate)
        except DamagedError:
            with tally.lock:
                tally.unreadable += 1
        else:
            with tally.lock:
                tally.measured_bytes += candidate.row.stored_bytes
            if found is not None:
                new = _keep(staging, staged, candidate.digest, *found)
                with tally.lock:
                    tally.found.append(Replacement(candidate.digest, candidate.row, new))
        advance(candidate.row.raw_bytes)

    workers = default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="repack") as pool:
        run_bounded(pool, one, candidates, ahead=2 * workers)


def _encode(reader: ObjectReader, candidate: _Candidate) -> tuple[Header, list[Buffer]] | None:
    """A block's header and payload in the smallest encoding; None where it stays as it is."""
    row, size = candidate.row, candidate.row.raw_bytes
    data = scratch.bytes("incoming", size)
    reader.read_block(candidate.digest, data)
    best: tuple[Encoding, list[Buffer], int] | None = None
    if candidate.root is not None:
        base = scratch.bytes("base", size)
        reader.read_block(candidate.root, base, Role.BASE)
        parts = codecs.encode_delta(data, base, candidate.width)
        best = Encoding.DELTA, parts, codecs.payload_size(parts)
    if candidate.planes:
        parts = codecs.encode_planes(data, candidate.width, text=row.kind is Kind.FILE)
        if best is None or codecs.payload_size(parts) < best[2]:
            best = Encoding.PLANES, parts, codecs.payload_size(parts)
    if best is None or HEADER_BYTES + best[2] > _WORTH_IT * row.stored_bytes:
        return None
    encoding, parts, stored = best
    root = candidate.root if encoding is Encoding.DELTA else None
    return Header(row.kind, encoding, candidate.width, size, stored, root), parts


def _keep(
    staging: Staging | None, staged: ObjectReader | None, digest: Digest, header: Header, payload: list[Buffer]
) -> ObjectRow:
    """The new row; with a staging, after the new file was written and read back."""
    if staging is None or staged is None:
        stored = header.stored_bytes
        return ObjectRow(header.kind, header.encoding, header.width, header.raw_bytes, stored, 0, header.base)
    row = staging.put_encoded(digest, header, payload)
    try:
        staged.verify(digest)
    except DamagedError as error:
        raise EnvironmentalError(
            f"what was written for object {digest.short} did not read back as it should: {error.message}",
            hint="The store is as it was. Check the disk and the memory of this machine.",
        ) from error
    return row


@dataclass(frozen=True)
class _Staged(Layout):
    """A store as it will be: staged files are taken for the objects that they will be."""

    folder: Path = Path()

    def __init__(self, layout: Layout, folder: Path) -> None:
        super().__init__(layout.root, layout.block_bytes, layout.catalog)
        object.__setattr__(self, "folder", folder)

    def object_path(self, digest: Digest) -> str:
        path = self.folder / digest.hex()
        return str(path) if path.exists() else super().object_path(digest)
