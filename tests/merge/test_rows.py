"""Rows rearranged over many blocks and types, and what stays as it is: models written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mergepipe.merge.realign import keep_common_rows, realign
from mergepipe.merge.vocabulary import VocabularyRequest
from mergepipe.store import Digest, Store
from mergepipe.store.errors import BadInputError
from support.checkpoints import raw, write_checkpoint
from support.merges import NUMPY
from support.stores import state_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensor(store: Store, commit: Digest, name: str) -> np.ndarray:
    snapshot = store.snapshot_of(commit)
    entry = snapshot.entry(name)
    return snapshot.read_tensor(name).view(NUMPY[entry.dtype]).reshape(entry.shape)


def tokenizer_json(tokens: list[str], added: Mapping[str, int] | None = None) -> bytes:
    entries = [{"id": row, "content": token, "special": True} for token, row in (added or {}).items()]
    vocab = {token: row for row, token in enumerate(tokens)}
    return json.dumps({"added_tokens": entries, "model": {"type": "BPE", "vocab": vocab, "merges": []}}).encode()


def written(
    store: Store, folder: Path, name: str, tensors: Mapping[str, np.ndarray], tokens: list[str] | None, **more: bytes
) -> Digest:
    files = {"config.json": json.dumps({"vocab_size": len(next(iter(tensors.values())))}).encode()}
    if tokens is not None:
        files["tokenizer.json"] = tokenizer_json(tokens)
    files |= {path.replace("__", "."): content for path, content in more.items()}
    path = write_checkpoint(folder / name, {key: raw(value) for key, value in tensors.items()}, files=files)
    return store.ingest([path], ref=name)[0].commit


def random(rows: int, width: int, seed: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(dtype)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_many_blocks_and_types(store: Store, tmp_path: Path, dtype: Any) -> None:
    """A permutation over many blocks, means of two models in the third, and padding, as torch computes them."""
    import torch

    width, names = 128, [f"t{row}" for row in range(700)]
    order = np.random.default_rng(1).permutation(700)
    a, b = random(500, width, 1, dtype), random(700, width, 2, dtype)
    c = random(700, width, 3, dtype)
    commits = [
        written(store, tmp_path, "a", {EMBEDDING: a}, names[:500]),
        written(store, tmp_path, "b", {EMBEDDING: b}, [names[row] for row in order]),
        written(store, tmp_path, "c", {EMBEDDING: c}, names),
    ]
    made = realign(store, commits, VocabularyRequest(2, {}, 256), None, ["a", "b", "c"])
    where = np.argsort(order)
    wide = np.float64 if dtype is np.float64 else np.float32
    mean = ((b[where][500:].astype(wide) + c[500:].astype(wide)) / 2).astype(dtype)
    for commit, real in zip(made.commits, [np.concatenate([a, mean]), b[where], c], strict=True):
        found = tensor(store, commit, EMBEDDING)
        assert found.shape == (768, width)
        assert found[:700].tobytes() == real.tobytes()
        widened = torch.from_numpy(real.astype(wide)).mean(dim=0).numpy().astype(dtype)
        assert {row.tobytes() for row in found[700:]} == {widened.tobytes()}


def test_a_row_that_takes_several_blocks(store: Store, tmp_path: Path) -> None:
    a, b = random(4, 3000, 1), random(5, 3000, 2)
    commits = [
        written(store, tmp_path, "a", {EMBEDDING: a}, list("abcd")),
        written(store, tmp_path, "b", {EMBEDDING: b}, list("edcba")),
    ]
    made = realign(store, commits, VocabularyRequest("union"), 0, ["a", "b"])
    assert np.array_equal(tensor(store, made.commits[0], EMBEDDING), np.concatenate([a, b[:1]]))
    assert np.array_equal(tensor(store, made.commits[1], EMBEDDING), b[::-1])


def test_biases_heads_and_other_types(store: Store, tmp_path: Path) -> None:
    """A one-dimensional bias; a donor of another type; a head that a model has tied to its embedding."""
    a = {EMBEDDING: random(3, 8, 1), HEAD: random(3, 8, 2), "lm_head.bias": random(3, 1, 3)[:, 0]}
    b = {EMBEDDING: random(4, 8, 4, ml_dtypes.bfloat16), "model.other.weight": random(4, 8, 5)}
    commits = [written(store, tmp_path, "a", a, list("abc")), written(store, tmp_path, "b", b, list("abcd"))]
    made = realign(store, commits, VocabularyRequest("union"), 0, ["a", "b"])
    assert made.commits[1] == commits[1]
    for name in (EMBEDDING, HEAD):
        expected = np.concatenate([a[name], b[EMBEDDING][3:].astype(np.float32)])
        assert np.array_equal(tensor(store, made.commits[0], name), expected)
    with_zero = np.concatenate([a["lm_head.bias"], np.zeros(1, np.float32)])
    assert np.array_equal(tensor(store, made.commits[0], "lm_head.bias"), with_zero)


def test_a_model_that_stays_as_it_is_keeps_its_commit(store: Store, tmp_path: Path) -> None:
    weights = {EMBEDDING: random(3, 8, 1)}
    commits = [
        written(store, tmp_path, "a", weights, list("abc")),
        written(store, tmp_path, "b", weights, None),
    ]
    before = state_of(store)
    made = realign(store, commits, VocabularyRequest("union"), 0, ["a", "b"])
    assert made.commits == tuple(commits)
    assert made.notes == ("b has no tokenizer.json: its tokens are taken to be those of a",)
    assert state_of(store) == before


def test_the_leading_model_gets_the_output_tokenizer_even_where_no_row_changes(store: Store, tmp_path: Path) -> None:
    weights = {EMBEDDING: random(3, 8, 1)}
    first = written(store, tmp_path, "a", weights, list("abc"))
    second = written(store, tmp_path, "b", weights, None, tokenizer__json=tokenizer_json(list("ab"), {"c": 2}))
    made = realign(store, [first, second], VocabularyRequest("union"), 0, ["a", "b"])
    assert made.commits[1] == second
    old, new = store.snapshot_of(first), store.snapshot_of(made.commits[0])
    assert new.tensors == old.tensors
    assert new.shards == old.shards
    assert json.loads(new.read_file("tokenizer.json"))["added_tokens"][0]["content"] == "c"


def test_only_common_rows(store: Store, tmp_path: Path) -> None:
    a, b = random(300, 16, 1), random(200, 16, 2)
    commits = [
        written(store, tmp_path, "a", {EMBEDDING: a}, None),
        written(store, tmp_path, "b", {EMBEDDING: b}, None),
    ]
    made = keep_common_rows(store, commits, 0, ["a", "b"])
    assert made.commits[1] == commits[1]
    assert np.array_equal(tensor(store, made.commits[0], EMBEDDING), a[:200])
    assert store.snapshot_of(made.commits[0]).config() == {"vocab_size": 200}
    assert keep_common_rows(store, commits, 0, ["a", "b"]) == made


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer__model": b"\n\x05"}, "tokenizer.model alone"),
        ({"tokenizer__json": b"{}"}, "not a tokenizer"),
        ({"tokenizer__json": b'{"model": {"vocab": {"a": 1152921504606846976}}}'}, "the id 1152921504606846976"),
        ({"tokenizer__json": b"[" * 100_000}, "tokenizer.json of b"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(store: Store, tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    weights = {EMBEDDING: random(3, 8, 1)}
    commits = [
        written(store, tmp_path, "a", weights, list("abc")),
        written(store, tmp_path, "b", weights, None, **files),
    ]
    before = state_of(store)
    with pytest.raises(BadInputError, match=words):
        realign(store, commits, VocabularyRequest("union"), 0, ["a", "b"])
    assert state_of(store) == before


def test_models_of_other_widths_do_not_go_together(store: Store, tmp_path: Path) -> None:
    commits = [
        written(store, tmp_path, "a", {EMBEDDING: random(3, 8, 1)}, list("abc")),
        written(store, tmp_path, "b", {EMBEDDING: random(3, 9, 1)}, list("abc")),
    ]
    with pytest.raises(BadInputError, match=r"\[3, 9\] in b, \[3, 8\] in a"):
        realign(store, commits, VocabularyRequest("union"), 0, ["a", "b"])
