"""Looking at a store from outside, and harming it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from mergepipe.store import Digest, Store
from mergepipe.store.catalog import DATABASES
from mergepipe.store.check import verify
from mergepipe.store.frame import Encoding, Kind

State = dict[str, object]


def object_files(store: Store) -> dict[str, int]:
    """Sizes of all files under ``objects/`` by id."""
    found = {}
    for folder, _, names in os.walk(store.layout.objects):
        for name in names:
            found[Path(folder).name + name] = (Path(folder) / name).stat().st_size
    return found


def catalog_rows(store: Store, *databases: str) -> dict[str, dict[bytes, bytes]]:
    """All rows; of object rows without the time when they were last relied on."""
    rows: dict[str, dict[bytes, bytes]] = {}
    with store.catalog.reading() as view:
        for database in databases or DATABASES:
            rows[database] = dict(view.items(database))
    if "objects" in rows:
        rows["objects"] = {key: value[:24] + value[32:] for key, value in rows["objects"].items()}
    return rows


def state_of(store: Store) -> State:
    """All that may not change where a command failed: rows, and the objects that they stand for."""
    rows = catalog_rows(store)
    files = object_files(store)
    return {"rows": rows, "files": {key.hex(): files.get(key.hex()) for key in rows["objects"]}}


def writers_left(store: Store) -> list[str]:
    """What lies in the store's folder for unpublished work."""
    return sorted(path.name for path in store.layout.temporary.iterdir())


def assert_clean(store: Store) -> None:
    """Every object is what its id says, and every reference leads somewhere."""
    report = verify(store)
    assert not report.damaged, "\n".join(f"{item.kind} {item.id}: {item.reason}" for item in report.damaged)


def object_path(store: Store, digest: Digest) -> Path:
    return Path(store.layout.object_path(digest))


def objects_of(store: Store, kind: Kind, encoding: Encoding | None = None) -> list[Digest]:
    """Ids of all objects of a kind."""
    found = []
    with store.catalog.reading() as view:
        for key, _ in view.items("objects"):
            row = view.object_row(Digest(key))
            if row is not None and row.kind is kind and encoding in (None, row.encoding):
                found.append(Digest(key))
    return found


def rewrite(path: Path, data: bytes) -> None:
    """Replace an object's file, which is read-only."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    rewrite(path, bytes(data))


def stored_header(path: Path) -> tuple[int, int]:
    """``(raw bytes, payload bytes)`` as the file's header says, read without the code under test."""
    raw, payload = struct.unpack_from("<QQ", path.read_bytes(), 16)
    return raw, payload
