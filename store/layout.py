"""Where things lie in a store's directory, and how a directory is recognised as a store.

::

    .mp/
      store.json          format version, block size, where the catalog is
      objects/ab/cdef…    one file for each object, named by its id
      catalog/            the LMDB environment (or elsewhere: store.json says)
      refs.journal        how refs moved, in case the catalog is lost
      tmp/<writer>/       what a writer has not published yet, with its lease
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergepipe.store.canonical import load_strict
from mergepipe.store.chunking import DEFAULT_BLOCK_BYTES, MAXIMUM_BLOCK_BYTES, MINIMUM_BLOCK_BYTES
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, ConflictError, NotFoundError, UsageError
from mergepipe.store.filesystem import explain_os_error, flush_directory, refuse_network_filesystem, write_durably

STORE_DIRECTORY: Final = ".mp"
FORMAT_VERSION: Final = 1
_SETTINGS: Final = "store.json"
_CATALOG: Final = "catalog"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one store. ``block_bytes`` is the target size of new blocks."""

    root: Path
    block_bytes: int
    catalog: Path

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    @property
    def journal(self) -> Path:
        return self.root / "refs.journal"

    def object_path(self, digest: Digest) -> str:
        """``objects/ab/cdef…``; a plain string, for it is on every hot path."""
        name = digest.hex()
        return f"{self.root}/objects/{name[:2]}/{name[2:]}"


def create_layout(root: Path, *, block_bytes: int = DEFAULT_BLOCK_BYTES, catalog: Path | None = None) -> Layout:
    """:func:`prepare_layout`, and :func:`declare_layout`."""
    layout = prepare_layout(root, block_bytes=block_bytes, catalog=catalog)
    declare_layout(layout)
    return layout


def prepare_layout(root: Path, *, block_bytes: int = DEFAULT_BLOCK_BYTES, catalog: Path | None = None) -> Layout:
    """Make a new store's folders; ``catalog`` puts the catalog outside of it (on a local disk). It is no store yet.

    Raises:
        ConflictError: there is a store already.
        UsageError: the block size is out of range.
        EnvironmentalError: the catalog would lie on a network filesystem.
    """
    if not _is_block_size(block_bytes):
        raise UsageError(
            f"a block size of {block_bytes} bytes is not possible",
            hint="Use a power of two from 4KiB to 64MiB; 2MiB is the default.",
        )
    root = root.absolute()
    if (root / _SETTINGS).exists():
        raise ConflictError(f"there is a store in {root} already", hint="Use it, or choose another folder.")
    where = catalog.absolute() if catalog else root / _CATALOG
    existing = next(path for path in (where, *where.parents) if path.exists())
    refuse_network_filesystem(existing)
    for fan in range(256):
        (root / "objects" / f"{fan:02x}").mkdir(parents=True, exist_ok=True)
    (root / "tmp").mkdir(exist_ok=True)
    where.mkdir(parents=True, exist_ok=True)
    flush_directory(root / "objects")
    return Layout(root, block_bytes, where)


def declare_layout(layout: Layout) -> None:
    """Write down the settings, once all else is there: from that moment on the directory is a store."""
    flush_directory(layout.catalog)
    inside = layout.catalog == layout.root / _CATALOG
    settings = {
        "format": FORMAT_VERSION,
        "block_bytes": layout.block_bytes,
        "catalog": _CATALOG if inside else str(layout.catalog),
    }
    write_durably(layout.root / _SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
    flush_directory(layout.root.parent)


def is_layout(root: Path) -> bool:
    """Whether a directory is a store: its settings are there."""
    return (root / _SETTINGS).exists()


def discard_layout(layout: Layout) -> None:
    """Take back a store that was just made and whose catalog could not be: the directory is no store any more."""
    (layout.root / _SETTINGS).unlink(missing_ok=True)


def _is_block_size(size: int) -> bool:
    return MINIMUM_BLOCK_BYTES <= size <= MAXIMUM_BLOCK_BYTES and size & (size - 1) == 0


def read_layout(root: Path) -> Layout:
    """Open an existing store's directory.

    Raises:
        NotFoundError: there is no store.
        BadInputError: its settings cannot be read, or it was made by a later release.
    """
    root = root.absolute()  # a reader must not depend on the working directory
    path = root / _SETTINGS
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # nobody may write into a pipe
            raise BadInputError(f"{path}: not a store's settings")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no store in {root}", hint="Make one with `mp init`.") from None
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
    value = load_strict(data, str(path))
    if not isinstance(value, dict) or type(value.get("format")) is not int or value["format"] < 1:
        raise BadInputError(f"{path}: not a store's settings")
    if value["format"] > FORMAT_VERSION:
        raise BadInputError(
            f"{path}: format {value['format']} is newer than this mp, which knows {FORMAT_VERSION}",
            hint="Upgrade mergepipe.",
        )
    block_bytes, catalog = value.get("block_bytes"), value.get("catalog")
    if type(block_bytes) is not int or not _is_block_size(block_bytes) or not isinstance(catalog, str):
        raise BadInputError(f"{path}: not a store's settings")
    return Layout(root, block_bytes, root / catalog)


def find_layout(path: Path | str | None = None) -> Layout:
    """The layout of the store in ``path``: the ``.mp`` directory or the folder that has it; see :func:`find_store`.

    Raises:
        NotFoundError: there is none.
        BadInputError: its settings cannot be read, or it was made by a later release.
    """
    if path is None:
        found = find_store()
        if found is None:
            raise NotFoundError(
                "there is no store here or in a folder above",
                hint="Make one with `mp init` or `mp ingest`.",
            )
        path = found
    root = Path(path)
    inner = root / STORE_DIRECTORY
    return read_layout(inner if (inner / _SETTINGS).exists() else root)


def find_store(start: Path | None = None) -> Path | None:
    """The store that a command means: ``MP_STORE``, else the nearest ``.mp`` upwards from ``start``."""
    named = os.environ.get("MP_STORE")
    if named:
        return Path(named)
    here = (start or Path.cwd()).absolute()
    for folder in (here, *here.parents):
        if (folder / STORE_DIRECTORY / _SETTINGS).exists():
            return folder / STORE_DIRECTORY
    return None
