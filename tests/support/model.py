"""What a store ought to hold: a dictionary of refs and contents beside the store itself, and small models to put in.

A content is a checkpoint's tensors and files by name. Of what was ingested it is known from the checkpoint; of what was
merged it is read once, when the merge was acknowledged, and must be the same ever after.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from blake3 import blake3

from mergepipe.store import Digest, Store
from mergepipe.store.history import reflog
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import all_refs
from support.checkpoints import raw
from support.family import Weights, write_model
from support.stores import catalog_rows, object_files, writers_left

BLOCK_BYTES = 8192
"""4096 elements of bfloat16: the least that a preview is made of."""
VARIANTS = 6
Content = dict[str, bytes]
Moved = tuple[Digest | None, Digest | None]


def variant(number: int) -> Weights:
    """The base (0), or a fine-tune of it: some 20 KB in two matrices, of two blocks and one, and a norm.

    An odd variant leaves the second matrix as it is; 3 and 4 share the first one's second block.
    """
    generator = np.random.default_rng(7)
    weights: Weights = {
        "layers.0.weight": (generator.standard_normal((128, 64), np.float32) * 0.02).astype(ml_dtypes.bfloat16),
        "layers.1.weight": (generator.standard_normal((64, 64), np.float32) * 0.02).astype(ml_dtypes.bfloat16),
        "norm.weight": np.ones(64, np.float32),
    }
    if number == 0:
        return weights
    for place, name in enumerate(("layers.0.weight", "layers.1.weight")):
        if place == 1 and number % 2:
            continue
        step = np.random.default_rng(100 * number + place).standard_normal(weights[name].shape, np.float32) * 1e-3
        if place == 0 and number in (3, 4):
            step[64:] = np.random.default_rng(34).standard_normal((64, 64), np.float32) * 1e-3
        weights[name] = (weights[name].astype(np.float32) + step).astype(ml_dtypes.bfloat16)
    return weights


def content_of_variant(number: int) -> Content:
    """What the store must give back of a variant: its tensors."""
    return {name: raw(array).data for name, array in variant(number).items()}


def write_variants(folder: Path, count: int = VARIANTS) -> list[Path]:
    """Checkpoint folders ``v0``, ``v1``, …"""
    return [write_model(folder / f"v{number}", variant(number)) for number in range(count)]


def content_of(store: Store, commit: Digest) -> Content:
    """The tensors of a commit, decoded and checked against their ids."""
    snapshot = store.snapshot_of(commit)
    return {name: snapshot.read_tensor(name).tobytes() for name in snapshot.tensors}


def digest_of(content: Content) -> str:
    """One short name for a content."""
    hasher = blake3()
    for name in sorted(content):
        hasher.update(name.encode() + b"\0" + blake3(content[name]).digest())
    return hasher.hexdigest()[:32]


def move_ref(
    store: Store, name: str, expected: Digest | None, new: Digest | None, kind: str = "branch", reason: str = "test"
) -> None:
    """As ``mp branch``, ``mp tag`` and ``mp rm`` do it."""
    publish(store.catalog, None, Changes(refs=[RefUpdate(name, expected, new, kind, reason, "ada")]))


@dataclass
class Model:
    """Refs with their kinds, how each of them moved, and the contents of commits."""

    refs: dict[str, tuple[Digest, str]] = field(default_factory=dict)
    moves: dict[str, list[Moved]] = field(default_factory=dict)
    contents: dict[Digest, Content] = field(default_factory=dict)

    def move(self, name: str, new: Digest | None, kind: str = "branch") -> None:
        """A ref came, moved or went."""
        before = self.refs.get(name)
        self.moves.setdefault(name, []).append((before[0] if before else None, new))
        if new is None:
            del self.refs[name]
        else:
            self.refs[name] = new, kind

    def check(self, store: Store) -> None:
        """The store has these refs and no other, their contents bit for bit, and the log in this order."""
        with store.catalog.reading() as view:
            found = {ref.name: (ref.commit, ref.kind) for ref in all_refs(view)}
            assert found == self.refs
            logged = {name: [(move.old, move.new) for move in reversed(reflog(view, name))] for name in self.moves}
            every = [(move.ref, move.time) for move in reversed(reflog(view))]
        assert logged == self.moves
        assert len(every) == sum(map(len, self.moves.values()))
        for commit in {commit for commit, _ in self.refs.values()}:
            assert content_of(store, commit) == self.contents[commit]


def strays(store: Store) -> list[str]:
    """What lies in the store's folder and belongs to nothing: files without rows, unfinished work, unfinished files."""
    rows = {key.hex() for key in catalog_rows(store, "objects")["objects"]}
    found = [f"objects/{name}" for name in object_files(store) if name not in rows]
    found += [f"tmp/{name}" for name in writers_left(store) if not name.startswith(".")]
    known = {"store.json", "objects", "catalog", "tmp", "refs.journal"}
    others = (path.name for path in store.layout.root.iterdir() if path.name not in known)
    return found + [name for name in others if ".lost-" not in name]
