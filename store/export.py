"""``mp export``: a commit becomes a folder of safetensors again.

What came in as safetensors goes out byte for byte: the header is kept verbatim, and the tensors follow in its order.
The folder is built beside its destination and renamed there when it is whole and flushed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergepipe.store.checkpoint import INDEX, TORCH_INDEX, is_safe_path
from mergepipe.store.codecs import expect, scratch
from mergepipe.store.digest import Digest
from mergepipe.store.dtypes import DType
from mergepipe.store.errors import BadInputError, ConflictError, DamagedError, UsageError
from mergepipe.store.filesystem import exchange, explain_os_error, flush_directory, flush_filesystem, start_writeback
from mergepipe.store.leases import reading
from mergepipe.store.manifest import FileEntry, TensorEntry
from mergepipe.store.objects import ObjectReader
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.safetensors_file import SafetensorsHeader, build_header, parse_header
from mergepipe.store.snapshot import Snapshot

DEFAULT_SHARD_BYTES: Final = 5 * 10**9
_WRITEBACK_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written. ``identical``: the weights' files are byte for byte those that were ingested."""

    directory: Path
    files: int
    written_bytes: int
    identical: bool
    elapsed_seconds: float


@dataclass(frozen=True, slots=True)
class _OutputShard:
    """A safetensors file to write: its name, its header, and the type that tensors are converted to."""

    path: str
    header: SafetensorsHeader


@dataclass(frozen=True, slots=True)
class _Piece:
    """One block's way into a file: where its bytes go. ``to``: the element type that they are converted to."""

    descriptor: int
    position: int
    digest: Digest
    size: int
    source: DType
    to: DType


def export_snapshot(
    snapshot: Snapshot,
    directory: Path,
    *,
    force: bool = False,
    max_shard_bytes: int | None = None,
    dtype: str | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    leave_out: Collection[str] = (),
    workers: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a commit's checkpoint to ``directory``, which appears only when it is whole.

    ``max_shard_bytes`` lays the tensors out anew; ``dtype`` (a safetensors name such as ``F32``) converts the
    floating-point tensors, rounding to nearest even. ``leave_out``: files of the commit, other than weights, that are
    not written. ``extra_files`` are added to the folder, where nothing of that name is.

    Raises:
        ConflictError: ``directory`` exists and ``force`` is not given, or it is a folder that others live in.
        DamagedError: a block is not what it was; nothing appears.
        EnvironmentalError: the disk is full, or the like; nothing appears.
    """
    started = time.monotonic()
    directory = Path(os.path.abspath(directory))  # noqa: PTH100  # a link keeps its own name; ".." does not
    _check_free(directory, snapshot, force=force)
    shards = _layout(snapshot, max_shard_bytes, dtype)
    kept = {path: entry for path, entry in snapshot.files.items() if path not in leave_out and _belongs(path, shards)}
    for path in [*kept, *(shard.path for shard in shards)]:
        if not is_safe_path(path):
            raise BadInputError(f"the commit has a file named {path!r}, which would leave the folder")
    partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.part")
    lease = ExitStack()
    try:
        lease.enter_context(reading(snapshot.reader.layout.temporary, [snapshot.commit_id]))
        partial.mkdir(parents=True)
        total = sum(len(shard.header.raw) + shard.header.data_bytes for shard in shards)
        expect(total, differences=snapshot.commit.parent("base") is not None)
        _write_shards(snapshot, partial, shards, workers or default_workers(), counter(progress, "export", total))
        written = total + _write_files(snapshot, partial, kept)
        added = _add_files(partial, extra_files or {})
        written += sum(added)
        unaltered = bool(snapshot.shards) and max_shard_bytes is None and dtype is None
        written += 0 if unaltered else _write_index(snapshot, partial, shards)
        if not flush_filesystem(partial):
            _flush_each(partial)
        _put_in_place(partial, directory, force)
    except OSError as error:
        raise explain_os_error(error, f"writing {directory}") from error
    finally:
        lease.close()
        shutil.rmtree(partial, ignore_errors=True)
    count = len(shards) + len(kept) + len(added)
    identical = unaltered and snapshot.commit.kind == "ingest"
    return ExportResult(directory, count, written, identical, round(time.monotonic() - started, 3))


def _check_free(directory: Path, snapshot: Snapshot, *, force: bool) -> None:
    """Raises ConflictError where the folder is there or in the store; ``force`` replaces only what can be spared."""
    layout, target = snapshot.reader.layout, directory.resolve()
    for place in (layout.root, layout.catalog):
        if target.is_relative_to(place.resolve()):
            raise ConflictError(f"{directory} is in the store, and is not replaced", hint="Choose another folder.")
    if not os.path.lexists(directory):
        return
    if not force:
        raise ConflictError(f"{directory} exists already", hint="Choose another name, or replace it with --force.")
    precious = {
        "the store": layout.root,
        "the store's catalog": layout.catalog,
        "the working directory": Path.cwd(),
        "your home": Path.home(),
    }
    for what, place in precious.items():
        if place.resolve().is_relative_to(target):
            raise ConflictError(f"{directory} holds {what}, and is not replaced", hint="Choose another folder.")


def _layout(snapshot: Snapshot, max_shard_bytes: int | None, dtype: str | None) -> list[_OutputShard]:
    target = None
    if dtype is not None:
        from mergepipe.store.convert import check_conversion

        target = check_conversion(dtype)
    if snapshot.shards and max_shard_bytes is None and target is None:
        return _kept_layout(snapshot)
    limit = DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    if limit < 1:
        raise UsageError("the largest shard size must be at least 1 byte", hint="Write it as in 5GB.")
    groups: list[list[tuple[str, DType, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, entry in snapshot.tensors.items():
        kind = _output_type(entry, target)
        size = kind.nbytes(entry.elements)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append((name, kind, entry.shape))
        filled += size
    total = len(groups)
    stem = "adapter_model" if "adapter_config.json" in snapshot.files else "model"
    names = (
        [f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        if total > 1
        else [f"{stem}.safetensors"]
    )
    metadata = _common_metadata(snapshot)
    return [_OutputShard(name, build_header(group, metadata)) for name, group in zip(names, groups, strict=True)]


def _kept_layout(snapshot: Snapshot) -> list[_OutputShard]:
    """The files as they came; raises DamagedError where a tensor is in none of them."""
    shards = [_OutputShard(shard.path, _kept_header(snapshot, shard.path, shard.header)) for shard in snapshot.shards]
    held = {item.name for shard in shards for item in shard.header.entries}
    for name in snapshot.tensors:
        if name not in held:
            raise DamagedError(f"tensor {name!r} is in none of the files that the commit names")
    return shards


def _kept_header(snapshot: Snapshot, path: str, entry: FileEntry) -> SafetensorsHeader:
    """A shard's header as it came, checked against the tensors that the commit has."""
    raw = b"".join(snapshot.file_pieces(entry))
    try:
        header = parse_header(raw, None, f"the stored header of {path}")
    except BadInputError as error:
        raise DamagedError(error.message, hint="`mp verify` lists what is damaged.") from error
    for item in header.entries:
        tensor = snapshot.entry(item.name)
        if tensor.dtype != item.dtype.name or tensor.shape != item.shape:
            raise DamagedError(f"the stored header of {path} disagrees with tensor {item.name!r}")
    return header


def _common_metadata(snapshot: Snapshot) -> dict[str, str]:
    """Metadata for a new layout: that of the first shard that came in, else what transformers expects."""
    for shard in snapshot.shards:
        metadata = _kept_header(snapshot, shard.path, shard.header).metadata
        if metadata:
            return dict(metadata)
    return {"format": "pt"}


def _output_type(entry: TensorEntry, target: DType | None) -> DType:
    return target if target is not None and entry.element_type.has_statistics else entry.element_type


def _belongs(path: str, shards: list[_OutputShard]) -> bool:
    """Indices are written anew where the layout changes, and those of files that are not written are left out."""
    names = {shard.path for shard in shards}
    if path == TORCH_INDEX and any(name.endswith(".safetensors") for name in names):
        return False
    return path not in names


def _write_shards(
    snapshot: Snapshot, folder: Path, shards: list[_OutputShard], workers: int, advance: Callable[[int], None]
) -> None:
    descriptors: list[int] = []
    tracker = _Writeback()
    try:

        def pieces() -> Iterator[_Piece]:
            for shard in shards:
                descriptor = _create(folder / shard.path)
                descriptors.append(descriptor)
                _pwrite(descriptor, memoryview(shard.header.raw), 0)
                os.truncate(descriptor, len(shard.header.raw) + shard.header.data_bytes)
                yield from _pieces_of(snapshot, shard, descriptor)

        def work(piece: _Piece) -> None:
            _copy_block(snapshot.reader, piece)
            tracker.wrote(piece.descriptor, piece.size)
            advance(piece.size)

        def prefetch(piece: _Piece) -> None:
            snapshot.reader.prefetch(piece.digest)

        with ThreadPoolExecutor(workers, thread_name_prefix="export") as pool:
            run_bounded(pool, work, pieces(), ahead=2 * workers, prepare=prefetch)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _pieces_of(snapshot: Snapshot, shard: _OutputShard, descriptor: int) -> Iterator[_Piece]:
    for item in shard.header.entries:
        entry = snapshot.entry(item.name)
        begin = len(shard.header.raw) + item.begin
        for index, digest in enumerate(entry.blocks):
            offset, size = entry.block_span(index)
            position = begin + offset * item.dtype.bits // entry.element_type.bits
            yield _Piece(descriptor, position, digest, size, entry.element_type, item.dtype)


def _copy_block(reader: ObjectReader, piece: _Piece) -> None:
    data = scratch.bytes("outgoing", piece.size)
    reader.read_block(piece.digest, data)
    if piece.to is not piece.source:
        from mergepipe.store.convert import convert_block

        data = convert_block(data, piece.source, piece.to)
    _pwrite(piece.descriptor, data.data, piece.position)


class _Writeback:
    """Asks the kernel now and then to begin writing, so that the flush at the end finds less to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[int, int] = {}

    def wrote(self, descriptor: int, size: int) -> None:
        with self._lock:
            pending = self._pending.get(descriptor, 0) + size
            self._pending[descriptor] = 0 if pending >= _WRITEBACK_BYTES else pending
        if pending >= _WRITEBACK_BYTES:
            start_writeback(descriptor)


def _write_files(snapshot: Snapshot, folder: Path, files: dict[str, FileEntry]) -> int:
    written = 0
    for path, entry in files.items():
        descriptor = _create(folder / path)
        try:
            position = 0
            for piece in snapshot.file_pieces(entry):
                _pwrite(descriptor, memoryview(piece), position)
                position += len(piece)
        finally:
            os.close(descriptor)
        written += entry.size
    return written


def _add_files(folder: Path, extra: Mapping[str, bytes]) -> list[int]:
    """Files beside those of the commit, never over one of them; returns the sizes of those that were written."""
    added = []
    for path, data in extra.items():
        if not (folder / path).exists():
            (folder / path).write_bytes(data)
            added.append(len(data))
    return added


def _write_index(snapshot: Snapshot, folder: Path, shards: list[_OutputShard]) -> int:
    """The index of a new layout; one that came in with the same layout is kept as it is."""
    kept = {shard.path for shard in snapshot.shards} == {shard.path for shard in shards} and (
        INDEX in snapshot.files or len(shards) == 1
    )
    path = folder / INDEX
    if kept and all(_same_header(snapshot, shard) for shard in shards):
        return 0
    if len(shards) == 1:
        path.unlink(missing_ok=True)
        return 0
    weight_map = {item.name: shard.path for shard in shards for item in shard.header.entries}
    total = sum(shard.header.data_bytes for shard in shards)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    path.unlink(missing_ok=True)
    path.write_bytes(text.encode() + b"\n")
    return len(text) + 1


def _same_header(snapshot: Snapshot, shard: _OutputShard) -> bool:
    found = next((kept for kept in snapshot.shards if kept.path == shard.path), None)
    return found is not None and b"".join(snapshot.file_pieces(found.header)) == shard.header.raw


def _put_in_place(partial: Path, directory: Path, force: bool) -> None:
    """Rename the finished folder to its name; one that is replaced changes places with it, and is then removed."""
    if not force or not os.path.lexists(directory):
        partial.rename(directory)
        flush_directory(directory.parent)
        return
    aside = exchange(partial, directory)
    flush_directory(directory.parent)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    else:
        aside.unlink()


def _create(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)


def _pwrite(descriptor: int, view: memoryview, position: int) -> None:
    view = view.cast("B")
    done = 0
    while done < view.nbytes:
        done += os.pwrite(descriptor, view[done:], position + done)


def _flush_each(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
