"""``mp ingest``: checkpoints become commits.

Everything that can be checked is checked before the first weight is read; everything that was made becomes visible in
one publication at the end. Several checkpoints given together are all stored or none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergepipe.store.canonical import as_text
from mergepipe.store.checkpoint import Checkpoint, OpenFile, is_safe_path, open_checkpoint
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.commits import Commit, Parent, default_author, timestamp_now
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.errors import BadInputError, ConflictError, UsageError
from mergepipe.store.frame import Kind
from mergepipe.store.ingest_blocks import BlockPipeline, TensorWork, plan_tensor, preview_level
from mergepipe.store.manifest import FileEntry, Shard, build_tree
from mergepipe.store.parallel import Progress, counter, default_workers
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import check_ref_name, find_ref, ref_name_for
from mergepipe.store.staging import Staging
from mergepipe.store.usage import stored_bytes_of
from mergepipe.store.version import TOOL

if TYPE_CHECKING:
    from mergepipe.store.snapshot import Snapshot
    from mergepipe.store.store import Store


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What one checkpoint became. Sizes in bytes.

    ``raw_bytes``: tensors and files as they came. ``stored_bytes``: all of its objects as they lie in the store.
    ``written_bytes``: those of them that this ingest wrote. ``reused_blocks``: blocks that were there already.
    ``previews``: how many were made, and ``preview_bytes`` their files, which are not in the other numbers.
    """

    ref: str
    commit: Digest
    tensors: int
    blocks: int
    raw_bytes: int
    stored_bytes: int
    written_bytes: int
    reused_blocks: int
    elapsed_seconds: float
    unchanged: bool = False
    previews: int = 0
    preview_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass
class _Arrival:
    """One checkpoint on its way in."""

    checkpoint: Checkpoint
    ref: str
    works: list[TensorWork]
    before: Digest | None
    files: dict[str, FileEntry] | None = None
    shards: tuple[Shard, ...] = ()
    file_written: int = 0


@dataclass(frozen=True, slots=True)
class _Request:
    """What the user asked for besides the checkpoints."""

    base_id: Digest | None
    base_name: str
    message: str
    author: str


def ingest(
    store: Store,
    paths: Sequence[Path],
    *,
    ref: str | None = None,
    base: Snapshot | None = None,
    base_name: str = "",
    message: str = "",
    author: str = "",
    previews: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[IngestResult]:
    """Store checkpoints; each becomes a commit that ``ref`` (default: its folder's name) points at.

    ``previews``: make the previews of their deltas to the base as well (:mod:`mergepipe.store.previews`).

    Raises:
        UsageError: ``previews`` are wanted, and there is no base.
        BadInputError: a checkpoint cannot be trusted, or does not fit the base.
        ConflictError: a ref moved meanwhile.
        EnvironmentalError: the disk is full, or the like. The store is then as it was.
    """
    started = time.monotonic()
    if previews and base is None:
        raise UsageError(
            "previews are of differences, and there is no base to differ from",
            hint="Name the base with --base REF, or leave --previews out.",
        )
    names = _ref_names(paths, ref)
    arrivals: list[_Arrival] = []
    try:
        for path, name in zip(paths, names, strict=True):
            arrivals.append(_arrive(store, path, name, base, base_name))
            if previews and arrivals[-1].checkpoint.is_adapter:
                arrivals[-1].checkpoint.notes.append(f"{path}: an adapter has no previews; it takes few bytes itself")
        with Staging(store.layout, store.catalog) as staging:
            pipeline = _read_everything(store, staging, arrivals, workers, progress, previews=previews)
            for arrival in arrivals:
                arrival.checkpoint.check_unchanged()
            changes = Changes(
                deltas=pipeline.deltas,
                tensors=pipeline.tensor_rows,
                previews=pipeline.previews,
                relied_on=tuple(pipeline.relied_on),
            )
            request = _Request(base.commit_id if base is not None else None, base_name, message, author)
            results = [_commit(store, staging, arrival, request, changes) for arrival in arrivals]
            if changes.commits or changes.deltas or changes.tensors or changes.previews or staging.rows:
                publish(store.catalog, staging, changes)
            return [_finished(store, result, started) for result in results]
    finally:
        for arrival in arrivals:
            arrival.checkpoint.close()


def _ref_names(paths: Sequence[Path], ref: str | None) -> list[str]:
    if ref is not None and len(paths) > 1:
        raise UsageError("--ref names one checkpoint, and several were given", hint="Ingest them one by one.")
    names = [check_ref_name(ref or ref_name_for(path)) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two of the checkpoints would both become {name!r}",
                hint="Ingest them one by one, with --ref NAME.",
            )
    return names


def _arrive(store: Store, path: Path, name: str, base: Snapshot | None, base_name: str) -> _Arrival:
    with store.catalog.reading() as view:
        found = find_ref(view, name)
    if found is not None and found.kind == "tag":
        raise ConflictError(f"{name!r} is a tag, and tags do not move", hint="Choose another name with --ref.")
    checkpoint = open_checkpoint(path)
    try:
        works = _plan_tensors(checkpoint, base, base_name, store.layout.block_bytes)
        for file in [*checkpoint.files, *(shard.path for shard in checkpoint.shards)]:
            if not is_safe_path(file):
                raise BadInputError(f"{path}: the file name {file!r} cannot be kept safely", hint="Rename it.")
    except BaseException:
        checkpoint.close()
        raise
    return _Arrival(checkpoint, name, works, found.commit if found else None)


def _plan_tensors(checkpoint: Checkpoint, base: Snapshot | None, base_name: str, target_bytes: int) -> list[TensorWork]:
    known = base.tensors if base is not None else {}
    works = [plan_tensor(name, source, known.get(name), target_bytes) for name, source in checkpoint.tensors.items()]
    if base is None or checkpoint.is_adapter:
        return works
    different = [work for work in works if work.base is not None and not _rows_agree(work)]
    if different:
        work = different[0]
        assert work.base is not None
        raise BadInputError(
            f"{work.source.file}: tensor {work.name!r} has the shape {list(work.source.shape)}, and "
            f"{list(work.base.shape)} in the base {base_name!r}"
            + (f" (and {len(different) - 1} tensors more)" if len(different) > 1 else ""),
            hint="Give the base that it was trained from, or ingest it without --base.",
        )
    if not any(work.base is not None for work in works):
        raise BadInputError(
            f"{checkpoint.path}: none of its {len(works)} tensors is in the base {base_name!r}",
            hint="Give the base that it was trained from, or ingest it without --base.",
        )
    return works


def _rows_agree(work: TensorWork) -> bool:
    """Whether the shapes are equal but for rows at the end (an embedding with tokens added)."""
    assert work.base is not None
    ours, theirs = work.source.shape, work.base.shape
    return len(ours) == len(theirs) and ours[1:] == theirs[1:]


def _read_everything(
    store: Store,
    staging: Staging,
    arrivals: list[_Arrival],
    workers: int | None,
    progress: Progress | None,
    *,
    previews: bool,
) -> BlockPipeline:
    total = sum(work.source.dtype.nbytes(_count(work)) for a in arrivals for work in a.works)
    advance = counter(progress, "ingest", total)
    pipeline = BlockPipeline(store.catalog, store.reader, staging, workers or default_workers(), advance, previews)
    groups: dict[str, list[TensorWork]] = {}
    for arrival in arrivals:
        for work in arrival.works:
            groups.setdefault(work.name, []).append(work)
    for arrival in arrivals if previews else ():
        level = preview_level(arrival.works, store.reader)
        for work in arrival.works:
            work.preview_level = level
    pipeline.run(group for group in groups.values() if any(work.blocks for work in group))
    for arrival in arrivals:
        _store_files(arrival, staging, store.layout.block_bytes, pipeline)
    return pipeline


def _count(work: TensorWork) -> int:
    return int(np.prod(work.source.shape, dtype=np.int64)) if work.source.shape else 1


def _store_files(arrival: _Arrival, staging: Staging, piece_bytes: int, pipeline: BlockPipeline) -> None:
    before = staging.written_bytes
    arrival.files = {
        name: _store_file(file, staging, piece_bytes, pipeline)
        for name, file in sorted(arrival.checkpoint.files.items())
    }
    shards = []
    for shard in arrival.checkpoint.shards:
        raw = np.frombuffer(shard.header.raw, np.uint8)
        pieces = [raw[start : start + piece_bytes] for start in range(0, raw.nbytes, piece_bytes)]
        blocks = tuple(_store_piece(piece, staging, pipeline) for piece in pieces)
        shards.append(Shard(shard.path, FileEntry(raw.nbytes, blocks)))
    arrival.shards = tuple(shards)
    arrival.file_written = staging.written_bytes - before


def _store_file(file: OpenFile, staging: Staging, piece_bytes: int, pipeline: BlockPipeline) -> FileEntry:
    size = file.stamp[0]
    blocks = []
    for start in range(0, size, piece_bytes):
        data = scratch.bytes("incoming", min(piece_bytes, size - start))
        file.read_into(start, data)
        blocks.append(_store_piece(data, staging, pipeline))
    return FileEntry(size, tuple(blocks))


def _store_piece(data: Bytes, staging: Staging, pipeline: BlockPipeline) -> Digest:
    digest = hash_bytes(data.data)
    if staging.claim(digest):
        staging.add_block(Kind.FILE, digest, data, 1)
    elif digest not in staging.rows:
        pipeline.relied_on.add(digest)
    return digest


def _commit(store: Store, staging: Staging, arrival: _Arrival, request: _Request, changes: Changes) -> IngestResult:
    """Stage an arrival's tree and commit, and add them to the changes; a tree that the ref has already is no news."""
    tensors = {work.name: work.entry() for work in arrival.works}
    assert arrival.files is not None
    before = staging.written_bytes
    tree = build_tree(tensors, arrival.files, arrival.shards, lambda data: staging.add_record(Kind.NODE, data))
    unchanged = _has_already(store, arrival.before, tree, request)
    if unchanged is not None and arrival.before is not None:
        commit_id = arrival.before
        staging.add_record(Kind.COMMIT, unchanged.encode())  # writes it only where its file was lost
    else:
        commit = _new_commit(arrival, tree, request)
        commit_id = staging.add_record(Kind.COMMIT, commit.encode())
        changes.commits.append(commit)
        changes.refs.append(RefUpdate(arrival.ref, arrival.before, commit_id, "branch", "ingest", commit.author))
    records = staging.written_bytes - before
    return IngestResult(
        ref=arrival.ref,
        commit=commit_id,
        tensors=len(tensors),
        blocks=sum(len(work.blocks) for work in arrival.works),
        raw_bytes=sum(entry.nbytes for entry in tensors.values())
        + sum(entry.size for entry in arrival.files.values())
        + sum(shard.header.size for shard in arrival.shards),
        stored_bytes=0,
        written_bytes=sum(work.written_bytes for work in arrival.works) + arrival.file_written + records,
        reused_blocks=sum(work.reused for work in arrival.works),
        elapsed_seconds=0.0,
        unchanged=unchanged is not None,
        previews=sum(work.previews for work in arrival.works),
        preview_bytes=sum(work.preview_bytes for work in arrival.works),
        notes=tuple(arrival.checkpoint.notes),
    )


def _has_already(store: Store, before: Digest | None, tree: Digest, request: _Request) -> Commit | None:
    """The ref's commit, where it is this tree already; a base that it had not before is news all the same."""
    if before is None:
        return None
    commit = store.commit(before)
    parent = commit.parent("base")
    known = (None, before, parent.commit if parent else None)
    return commit if commit.tree == tree and request.base_id in known else None


def _new_commit(arrival: _Arrival, tree: Digest, request: _Request) -> Commit:
    parents = [Parent(arrival.before, "previous", arrival.ref)] if arrival.before else []
    if request.base_id is not None and request.base_id != arrival.before:
        parents.append(Parent(request.base_id, "base", request.base_name))
    return Commit(
        tree=tree,
        parents=tuple(parents),
        kind="ingest",
        message=as_text(request.message or f"ingest {arrival.checkpoint.path.absolute().name}"),
        author=as_text(request.author or default_author()),
        time=timestamp_now(),
        tool=TOOL,
    )


def _finished(store: Store, result: IngestResult, started: float) -> IngestResult:
    """The result with what is known only after its publication."""
    stored = stored_bytes_of(store, result.commit)
    return replace(result, stored_bytes=stored, elapsed_seconds=round(time.monotonic() - started, 3))
