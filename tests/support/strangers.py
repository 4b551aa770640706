"""A stranger's store: objects that are what their ids say, whatever they say, and objects that are not."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from typing import Any

from mergepipe.store import Digest, Store
from mergepipe.store.commits import Commit
from mergepipe.store.digest import hash_bytes, hash_record
from mergepipe.store.frame import Encoding, Header, Kind, pack_header
from mergepipe.store.manifest import Node
from mergepipe.store.snapshot import Snapshot
from support.stores import object_path, rewrite


def put(store: Store, kind: Kind, data: bytes, encoding: Encoding = Encoding.RAW) -> Digest:
    """An object of any content, under its own id, with no row in the catalog."""
    payload = zlib.compress(data, 9) if encoding is Encoding.DEFLATE else data
    records = (Kind.NODE, Kind.COMMIT, Kind.PLAN)
    digest = hash_record(kind.name.lower(), data) if kind in records else hash_bytes(data)
    put_frame(store, digest, Header(kind, encoding, 1, len(data), len(payload), None), payload)
    return digest


def put_frame(store: Store, digest: Digest, header: Header, payload: bytes) -> None:
    """Any frame under any id."""
    rewrite(object_path(store, digest), pack_header(header, [payload]) + payload)


def put_node(store: Store, node: Node) -> Digest:
    return put(store, Kind.NODE, node.encode())


def with_tree(store: Store, tree: Digest, like: str) -> Snapshot:
    """A commit of that tree, which no ref names."""
    commit = replace(store.snapshot(like).commit, tree=tree)
    return Snapshot(store.reader, commit.id, commit)


def publish_commit(store: Store, name: str, commit: Commit) -> Digest:
    """A ref to a commit, both in the catalog as they are given."""
    row = json.dumps({"name": name, "commit": commit.id.hex(), "kind": "branch"}).encode()

    def change(view: Any) -> None:
        view.put("commits", commit.id, commit.encode())
        view.put("refs", name.encode(), row)

    store.catalog.write(change)
    return commit.id
