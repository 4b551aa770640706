"""The base's block of one place: decoded once, for everything that is compared with it or stored against it."""

from __future__ import annotations

from mergepipe.store.catalog import Catalog
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.digest import Digest
from mergepipe.store.frame import Encoding
from mergepipe.store.objects import ObjectReader, Role


class BaseBlock:
    """The base's block of one place, decoded when first needed, and what deltas of it may be stored against.

    ``own`` is the base model's block; ``root`` an id and bytes that are no delta themselves: the block itself, or the
    block that it was stored against.
    """

    def __init__(self, catalog: Catalog, reader: ObjectReader, buffers: str = "base") -> None:
        """``buffers``: whose scratch to decode into; two blocks that one thread holds at once need two names."""
        self._catalog = catalog
        self._reader = reader
        self._buffers = buffers
        self._loaded: tuple[Digest, Bytes] | None = None
        self.root: tuple[Digest, Bytes] | None = None

    @property
    def id(self) -> Digest:
        """The base model's block's id."""
        assert self._loaded is not None
        return self._loaded[0]

    @property
    def own(self) -> Bytes:
        assert self._loaded is not None
        return self._loaded[1]

    def load(self, digest: Digest, size: int) -> None:
        if self._loaded is not None and self._loaded[0] == digest:
            return
        with self._catalog.reading() as view:
            row = view.object_row(digest)
        block = scratch.bytes(self._buffers, size)
        if row is not None and row.encoding is Encoding.DELTA and row.base is not None:
            root = scratch.bytes(f"{self._buffers} root", size)
            self._reader.read_block(row.base, root, Role.BASE)
            self.root = (row.base, root)
            self._reader.read_block(digest, block, Role.BASE, self.root)
        else:
            self._reader.read_block(digest, block, Role.BASE)
            self.root = (digest, block)
        self._loaded = (digest, block)
