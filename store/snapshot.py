"""A commit's content, read-only: its tensors, files and shards, and ways to get at the bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mergepipe.store.catalog import open_catalog, release_catalog
from mergepipe.store.chunking import MAXIMUM_BLOCK_BYTES
from mergepipe.store.commits import Commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, ConflictError, DamagedError, MergePipeError, NotFoundError, nearest
from mergepipe.store.frame import Kind
from mergepipe.store.layout import Layout
from mergepipe.store.leases import reading
from mergepipe.store.manifest import FileEntry, Node, Shard, TensorEntry, decode_node, walk_tensors
from mergepipe.store.objects import ObjectReader, Role

if TYPE_CHECKING:
    import torch
    import zarr

    from mergepipe.store.codecs import Bytes
    from mergepipe.store.export import ExportResult

_READ_AHEAD_BLOCKS: Final = 256


@contextmanager
def unless_collected(layout: Layout, commits: Iterable[Digest]) -> Iterator[None]:
    """While commits are read: what a collection took away meanwhile is no damage.

    Raises:
        ConflictError: instead of DamagedError, where one of the commits is no longer in the store.
    """
    try:
        yield
    except DamagedError as error:
        catalog = open_catalog(layout.catalog)
        try:
            with catalog.reading() as view:
                gone = next((commit for commit in commits if view.get("commits", commit) is None), None)
        finally:
            release_catalog(catalog)
        if gone is None:
            raise
        raise ConflictError(
            f"commit {gone.short} went away while it was being read: no ref led to it any more, and `mp gc` took it",
            hint="Name another ref, or ingest the checkpoint again.",
        ) from error


@contextmanager
def being_read(layout: Layout, commits: Sequence[Digest]) -> Iterator[None]:
    """Keep commits from being collected while they are read; raises as :func:`unless_collected` does."""
    with unless_collected(layout, commits), reading(layout.temporary, commits):
        yield


class Snapshot:
    """One commit of a store. Cheap to make: nodes are read when they are needed."""

    def __init__(self, reader: ObjectReader, commit_id: Digest, commit: Commit) -> None:
        self.reader = reader
        self.commit_id = commit_id
        self.commit = commit

    def node(self, digest: Digest) -> Node:
        """A node of the manifest tree."""
        data = self.reader.read_record(Kind.NODE, digest)
        try:
            return decode_node(data, f"manifest node {digest.short}")
        except BadInputError as error:
            raise DamagedError(error.message, hint="`mp verify` lists what is damaged.") from error

    @cached_property
    def root(self) -> Node:
        return self.node(self.commit.tree)

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """All tensors by full name, layers in the order of their numbers."""
        return dict(walk_tensors(self.root, self.node))

    @property
    def files(self) -> Mapping[str, FileEntry]:
        """Files that are not weights, by their path in the checkpoint."""
        return self.root.files

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The safetensors files that the checkpoint came in, or () where it came in otherwise."""
        return self.root.shards

    def entry(self, name: str) -> TensorEntry:
        """A tensor by its full name; raises NotFoundError that suggests the nearest."""
        try:
            return self.tensors[name]
        except KeyError:
            hint = nearest(name, self.tensors) or "`mp ls REF` lists the tensors."
            raise NotFoundError(f"there is no tensor {name!r} in commit {self.commit_id.short}", hint=hint) from None

    def read_tensor(self, name: str, role: Role = Role.OTHER) -> Bytes:
        """A tensor's decoded bytes, ``entry.nbytes`` of them, little-endian in C order."""
        import numpy as np

        entry = self.entry(name)
        out = np.empty(entry.nbytes, np.uint8)
        for index, block in enumerate(entry.blocks):
            offset, size = entry.block_span(index)
            self.reader.read_block(block, out[offset : offset + size], role)
        return out

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as torch has it, with its own memory.

        Raises:
            NotFoundError: no such tensor.
            BadInputError: torch has no such element type (packed types narrower than a byte).
        """
        import torch

        entry = self.entry(name)
        torch_name = entry.element_type.torch_name
        if torch_name is None or not hasattr(torch, torch_name):
            raise BadInputError(f"torch has no element type for {entry.dtype} ({name})")
        dtype = getattr(torch, torch_name)
        if not entry.blocks:  # nothing cannot be viewed as another type
            return torch.empty(entry.shape, dtype=dtype)
        return torch.from_numpy(self.read_tensor(name)).view(dtype).reshape(entry.shape)

    def read_file(self, path: str) -> bytes:
        """A file's content; raises NotFoundError."""
        if path not in self.files:
            raise NotFoundError(f"there is no file {path!r} in the commit", hint=nearest(path, self.files))
        return b"".join(self.file_pieces(self.files[path]))

    def file_pieces(self, entry: FileEntry) -> Iterator[bytes]:
        """A file's content piece by piece."""
        left = entry.size
        for digest in entry.blocks:
            header = self.reader.read_header(digest)
            size = header.raw_bytes
            if size > left or size > MAXIMUM_BLOCK_BYTES:
                raise DamagedError(f"a file's piece {digest.short} is longer than it can be")
            yield self.reader.read_piece(digest, size)
            left -= size
        if left:
            raise DamagedError(f"a file's pieces are {left} bytes short")

    def config(self) -> dict[str, Any]:
        """``config.json`` as a dict, empty where there is none or it is no JSON object."""
        import json

        if "config.json" not in self.files:
            return {}
        try:
            value = json.loads(self.read_file("config.json"))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def to_zarr(self) -> zarr.Group:
        """The commit as a read-only zarr v3 group: one array for each tensor, chunks read on demand."""
        from mergepipe.store.zarr_view import open_group

        return open_group(self)

    def _read_ahead(self) -> None:
        with suppress(MergePipeError):  # whoever reads it in earnest will say what is wrong
            blocks = (block for entry in self.tensors.values() for block in entry.blocks)
            for block in islice(blocks, _READ_AHEAD_BLOCKS):
                self.reader.prefetch(block)

    def export(self, directory: Path | str, **options: Any) -> ExportResult:
        """Write the checkpoint to ``directory``; see :func:`mergepipe.store.export.export_snapshot`."""
        # While the compiled kernels load, the disk can work already.
        threading.Thread(target=self._read_ahead, daemon=True).start()
        from mergepipe.store.export import export_snapshot

        with unless_collected(self.reader.layout, [self.commit_id]):
            return export_snapshot(self, Path(directory), **options)
