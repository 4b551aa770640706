"""What tests of collections do to a store: take refs away, make things older, keep blocks that nobody needs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mergepipe.store import Digest, Store
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.catalog import Writing
from mergepipe.store.commits import default_author
from mergepipe.store.digest import hash_bytes
from mergepipe.store.frame import Kind
from mergepipe.store.gc import Collection
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import require_ref
from mergepipe.store.staging import Staging
from support.stores import object_files

Block = NDArray[np.uint8]
CALM: Block = np.random.default_rng(1).integers(0, 4, 4096, np.uint8)
NEAR: Block = (CALM.view(np.int16) + np.random.default_rng(2).integers(0, 2, 2048, np.int16)).view(np.uint8)
"""A block that is kept as a delta to ``CALM``."""


def remove(store: Store, *names: str) -> None:
    """Take refs away, as ``mp rm`` does."""
    for name in names:
        with store.catalog.reading() as view:
            ref = require_ref(view, name)
        publish(
            store.catalog, None, Changes(refs=[RefUpdate(name, ref.commit, None, ref.kind, "rm", default_author())])
        )


def age(store: Store, seconds: int = 10**6) -> None:
    """Make everything older: rows, files, and the moves of refs."""

    def change(view: Writing) -> None:
        for key, _ in list(view.items("objects")):
            row = view.object_row(Digest(key))
            assert row is not None
            view.put("objects", key, replace(row, touched=row.touched - seconds).pack())

    store.catalog.write(change)
    set_times_of_moves(store, "1999-01-01T00:00:00.000000Z")
    for name in object_files(store):
        path = Path(store.layout.object_path(Digest.parse(name)))
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def touch(store: Store, when: int, *objects: Digest) -> None:
    """Say when objects were last relied on, in Unix time."""

    def change(view: Writing) -> None:
        for digest in objects:
            row = view.object_row(digest)
            assert row is not None
            view.put("objects", digest, replace(row, touched=when).pack())

    store.catalog.write(change)


def set_times_of_moves(store: Store, time: str, ref: str = "") -> None:
    """Say when a ref was moved, or all were."""

    def change(view: Writing) -> None:
        for key, value in list(view.items("reflog", ref.encode() + b"\0" if ref else b"")):
            view.put("reflog", key, dump_canonical({**json.loads(value), "time": time}))

    store.catalog.write(change)


def put_block(store: Store, data: Block, base: Block | None = None) -> Digest:
    """Publish a block that nothing names."""
    digest = hash_bytes(data.tobytes())
    with Staging(store.layout, store.catalog) as staging:
        assert staging.claim(digest)
        against = None if base is None else (hash_bytes(base.tobytes()), base)
        assert staging.add_block(Kind.BLOCK, digest, data, 2, against).base == (against[0] if against else None)
        publish(store.catalog, staging, Changes())
    return digest


def nothing(found: Collection) -> bool:
    """Whether nothing goes."""
    return not (found.commits or found.objects or found.stray_files or found.rows)
