"""A store: the door to everything else.

::

    from mergepipe.store import Store

    with Store.open("models/.mp") as store:
        store.ingest(["./math"], base="Qwen3-0.6B")
        weights = store.snapshot("math").tensor("lm_head.weight")
        store.snapshot("math").export("./out")
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mergepipe.store.catalog import DATA, LOCK, Writing, open_catalog, release_catalog
from mergepipe.store.chunking import DEFAULT_BLOCK_BYTES
from mergepipe.store.commits import Commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import MergePipeError
from mergepipe.store.filesystem import explain_os_error
from mergepipe.store.layout import Layout, declare_layout, discard_layout, find_layout, prepare_layout
from mergepipe.store.objects import ObjectReader
from mergepipe.store.refs import load_commit, resolve
from mergepipe.store.snapshot import Snapshot

if TYPE_CHECKING:
    from mergepipe.store.ingest import IngestResult


class Store:
    """One open store. Use as a context manager, or :meth:`close` it."""

    def __init__(self, layout: Layout, *, create: bool = False) -> None:
        self.layout = layout
        self.catalog = open_catalog(layout.catalog, create=create)
        self.catalog.journal = layout.journal
        self.reader = ObjectReader(layout)

    @classmethod
    def create(
        cls, path: Path | str, *, block_bytes: int = DEFAULT_BLOCK_BYTES, catalog: Path | str | None = None
    ) -> Store:
        """Make a new store in the directory ``path`` (usually named ``.mp``).

        Raises:
            ConflictError: there is one already.
            EnvironmentalError: the catalog would lie on a network filesystem, or the disk is full, or the like.
        """
        where = Path(catalog) if catalog is not None else None
        try:
            layout = prepare_layout(Path(path), block_bytes=block_bytes, catalog=where)
            store = cls._with_new_catalog(layout)
            try:
                declare_layout(layout)
            except BaseException:
                discard_layout(layout)
                store.close()
                raise
        except OSError as error:
            raise explain_os_error(error, f"making the store {path}") from error
        return store

    @classmethod
    def _with_new_catalog(cls, layout: Layout) -> Store:
        """Half a catalog does not stay: nobody could open it, and the store could not be made again."""
        was_there = [(layout.catalog / name).exists() for name in (DATA, LOCK)]
        try:
            return cls(layout, create=True)
        except MergePipeError:
            for name, before in zip((DATA, LOCK), was_there, strict=True):
                if not before:
                    (layout.catalog / name).unlink(missing_ok=True)
            raise

    @classmethod
    def open(cls, path: Path | str | None = None) -> Store:
        """Open the store in ``path``: the ``.mp`` directory or the folder that has it.

        Without a path: ``MP_STORE``, else the nearest ``.mp`` upwards from the working directory.

        Raises:
            NotFoundError: there is none.
        """
        return cls(find_layout(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the catalog."""
        release_catalog(self.catalog)

    def discard_if_empty(self) -> bool:
        """Take an empty store away again, and close it; False where anything was stored or is being written."""

        def change(view: Writing) -> bool:
            if any(view.count(name) for name in ("objects", "commits", "refs")) or any(
                os.scandir(self.layout.temporary)
            ):
                return False
            discard_layout(self.layout)  # a writer that opened it meanwhile sees that before it publishes
            return True

        if not self.catalog.write(change):
            return False
        self.close()
        shutil.rmtree(self.layout.root, ignore_errors=True)
        return True

    def resolve(self, name: str) -> Digest:
        """The commit that a ref, id prefix or expression such as ``ref~2`` names; raises NotFoundError."""
        with self.catalog.reading() as view:
            return resolve(view, name)

    def commit(self, digest: Digest) -> Commit:
        """A commit by its id; raises NotFoundError."""
        with self.catalog.reading() as view:
            return load_commit(view, digest)

    def snapshot(self, name: str) -> Snapshot:
        """The content of the commit that ``name`` stands for; raises NotFoundError."""
        return self.snapshot_of(self.resolve(name))

    def snapshot_of(self, digest: Digest) -> Snapshot:
        """The content of a commit by its id; raises NotFoundError."""
        return Snapshot(self.reader, digest, self.commit(digest))

    def ingest(self, paths: Sequence[Path | str], *, base: str | None = None, **options: Any) -> list[IngestResult]:
        """Store checkpoints; see :func:`mergepipe.store.ingest.ingest`. ``base="auto"`` finds the base by itself."""
        from mergepipe.store.ingest import ingest
        from mergepipe.store.suggest import find_base

        found = [Path(path) for path in paths]
        if base == "auto":
            base = find_base(self, found, options.get("ref"))
        snapshot = self.snapshot(base) if base is not None else None
        return ingest(self, found, base=snapshot, base_name=base or "", **options)
