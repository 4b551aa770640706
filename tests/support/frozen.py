"""Small stores of each format version, kept forever under ``tests/data/formats/``; every release must open them.

    python -m support.frozen tests/data/formats/v1        # from tests/; only ever for a version that has none yet

Beside the store lies ``expected.json``: what it held when it was made. git keeps no empty folders, so a store is copied
out with :func:`thaw` before it is opened.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import Expert, execute, parse_budget, plan_merge
from mergepipe.store import Store
from mergepipe.store.history import reflog
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import all_refs
from support.family import write_model

FORMATS = Path(__file__).resolve().parent.parent / "data" / "formats"
BLOCK_BYTES = 16384


def weights(seed: int) -> dict[str, NDArray[Any]]:
    """A model of some 60 KB in three element types; every seed but 0 is a fine-tune of seed 0's."""
    base, step = np.random.default_rng(0), np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for layer in range(2):
        weight = base.standard_normal((64, 160), np.float32) * 0.02
        moved = weight + step.standard_normal(weight.shape, np.float32) * 1e-3 * (seed > 0)
        found[f"model.layers.{layer}.up.weight"] = moved.astype(ml_dtypes.bfloat16)
    found["model.embed.weight"] = base.standard_normal((48, 64), np.float32).astype(np.float16)
    found["model.norm.weight"] = np.ones(64, np.float32) + np.float32(seed) * np.float32(2**-10)
    return found


def make(folder: Path) -> None:
    """Make the store, and write down what it holds."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with Store.create(work / "store", block_bytes=BLOCK_BYTES) as store:
            store.ingest([write_model(work / "base", weights(0), shards=2)], ref="base", author="ada")
            paths = [write_model(work / expert, weights(seed)) for seed, expert in ((1, "math"), (2, "code"))]
            store.ingest(paths, base="base", previews=True, author="ada")
            experts = [Expert("math", {"weight": 0.5}), Expert("code", {"weight": 0.25})]
            for ref, method, budget in (("full", "ties", "100%"), ("small", "task_arithmetic", "30%")):
                plan = plan_merge(store, "base", experts, method, budget=parse_budget(budget))
                execute(store, plan, f"merged/{ref}", author="ada")
            tag = RefUpdate("v1", None, store.resolve("merged/small"), "tag", "tag", "ada")
            gone = RefUpdate("merged/full", store.resolve("merged/full"), None, "branch", "rm", "ada")
            publish(store.catalog, None, Changes(refs=[tag, gone]))
            expected = describe(store, work / "out")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work / "store", folder / "store", ignore=shutil.ignore_patterns("lock.mdb"))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def describe(store: Store, out: Path) -> dict[str, Any]:
    """Refs, commits, moves, and the hashes of everything that they hold."""
    with store.catalog.reading() as view:
        refs = {ref.name: [ref.kind, ref.commit.hex()] for ref in all_refs(view)}
        commits = sorted(key.hex() for key, _ in view.items("commits"))
        moves = [[move.ref, move.new.hex() if move.new else None] for move in reflog(view)]
    contents: dict[str, dict[str, str]] = {}
    for number, commit in enumerate(commits):
        folder = out / str(number)
        store.snapshot(commit).export(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
        contents[commit] = {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
    return {"refs": refs, "commits": commits, "moves": moves, "contents": contents}


def thaw(folder: Path, target: Path) -> Path:
    """Copy a frozen store to where it can be worked with."""
    shutil.copytree(folder / "store", target)
    for fan in range(256):
        (target / "objects" / f"{fan:02x}").mkdir(parents=True, exist_ok=True)
    (target / "tmp").mkdir(exist_ok=True)
    return target


if __name__ == "__main__":
    make(Path(sys.argv[1]))
