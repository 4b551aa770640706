"""Rows rearranged as mergekit rearranges them, streaming, published once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergepipe.merge import rows as rows_module
from mergepipe.merge.realign import Realigned, realign
from mergepipe.merge.vocabulary import FromModel, FromToken, TokenRequest, VocabularyRequest, Zero
from mergepipe.store import Digest, Store
from mergepipe.store.frame import Kind
from support.merges import NUMPY
from support.stores import assert_clean, objects_of, state_of

HIDDEN = 64  # torch sums columns in another order where they are no multiple of 64
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = ("base", "chat", "other")


@dataclass
class Oracle:
    """Three models on disk and in a store, and what mergekit makes of them."""

    store: Store
    folder: Path
    commits: tuple[Digest, ...]
    names: tuple[str, ...] = NAMES

    def vocabulary(self, request: VocabularyRequest, base: int | None) -> tuple[Any, dict[str, Any]]:
        """mergekit's tokenizer and, for each of the two tensors, each model's rearranged one."""
        from mergekit.common import ModelReference
        from mergekit.tokenizer.build import build_tokenizer
        from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, ZeroEmbedding
        from mergekit.tokenizer.embed import PermutedVocabulary
        from safetensors.torch import load_file

        models = [ModelReference.parse(str(self.folder / name)) for name in self.names]
        tokens = {}
        for token, asked in request.tokens.items():
            source: Any = None
            if isinstance(asked.source, Zero):
                source = ZeroEmbedding(kind="zero")
            elif isinstance(asked.source, FromModel):
                source = models[asked.source.model]
            elif asked.source is not None:
                key = "token" if isinstance(asked.source.token, str) else "token_id"
                source = ModelTokenEmbedding(
                    kind="model_token", model=models[asked.source.model], **{key: asked.source.token}
                )
            tokens[token] = TokenEmbeddingConfig(source=source, force=asked.force)
        info = build_tokenizer(
            models[base] if base is not None else None,
            models,
            models[request.source] if isinstance(request.source, int) else request.source,
            False,
            list(tokens),
        )
        task = PermutedVocabulary.model_construct(
            tokens=tokens,
            pad_to_multiple_of=request.pad_to_multiple_of,
            base_model=models[base] if base is not None else None,
            vocabulary_axis=0,
        )
        weights = {model: load_file(Path(model.model.path) / "model.safetensors") for model in models}
        found = {}
        for tensor in (EMBEDDING, HEAD):
            done = task.execute(info, {model: weights[model][tensor] for model in models})
            found[tensor] = [done[model].numpy() for model in models]
        return info.tokenizer, found


def _tokenizers() -> dict[str, Any]:
    """A base; the same with two tokens more; one with another vocabulary, another order and a token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def made(words: list[str], merges: list[tuple[str, str]], added: list[str], **named: str) -> Any:
        vocab = {word: row for row, word in enumerate(words)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **named)
        fast.add_tokens(added)
        return fast

    letters = list("abcdefgh")
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f")]
    words = ["<unk>", "<s>", *letters, "ab", "cd", "abcd", "ef"]
    others = ["<unk>", *reversed(letters), "x", "y", "xy", "ab", "gh", "hx"]
    return {
        "base": made(words, merges, [], bos_token="<s>"),
        "chat": made(words, merges, ["<|start|>", "<|end|>"], bos_token="<s>"),
        "other": made(others, [("x", "y"), ("a", "b"), ("g", "h"), ("h", "x")], ["hello"], pad_token="<pad>"),
    }


def _write_model(folder: Path, tokenizer: Any, rows: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(rows)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    folder = tmp_path_factory.mktemp("models")
    for name, tokenizer in _tokenizers().items():
        _write_model(folder / name, tokenizer, len(tokenizer) + (3 if name == "chat" else 0))  # rows of no token
    with Store.create(folder / "store", block_bytes=4096) as store:
        results = store.ingest([folder / name for name in NAMES])
        yield Oracle(store, folder, tuple(result.commit for result in results))
        assert_clean(store)


def tensor(store: Store, commit: Digest, name: str) -> np.ndarray:
    snapshot = store.snapshot_of(commit)
    entry = snapshot.entry(name)
    return snapshot.read_tensor(name).view(NUMPY[entry.dtype]).reshape(entry.shape)


def tokens_of(store: Store, commit: Digest) -> dict[str, int]:
    from tokenizers import Tokenizer

    text = store.snapshot_of(commit).read_file("tokenizer.json").decode()
    return Tokenizer.from_str(text).get_vocab()  # type: ignore[no-any-return]


def check_against(oracle: Oracle, request: VocabularyRequest, base: int | None) -> Realigned:
    """Every row is mergekit's, found by its token: it gives new tokens their ids in no order."""
    tokenizer, expected = oracle.vocabulary(request, base)
    result = realign(oracle.store, oracle.commits, request, base, oracle.names)
    lead = result.commits[base or 0]
    theirs, ours = tokenizer.get_vocab(), tokens_of(oracle.store, lead)
    assert set(theirs) == set(ours)
    assert sorted(theirs.values()) == sorted(ours.values())
    for name, arrays in expected.items():
        for number, array in enumerate(arrays):
            made = tensor(oracle.store, result.commits[number], name)
            assert made.shape == array.shape
            for token, row in ours.items():
                assert made[row].tobytes() == array[theirs[token]].tobytes(), (name, oracle.names[number], token)
            np.testing.assert_allclose(made[len(ours) :], array[len(ours) :], rtol=2e-5, atol=1e-8)
            if theirs == ours:
                assert made.tobytes() == array.tobytes()
    for commit in result.commits:
        assert oracle.store.snapshot_of(commit).config()["vocab_size"] == len(array)
    return result


@pytest.mark.parametrize("base", [0, 2, None])
@pytest.mark.parametrize("source", ["union", "base", 1, 2])
def test_rows_are_those_of_mergekit(oracle: Oracle, source: Any, base: int | None) -> None:
    if source == 1 and base is None:
        base = 1
    check_against(oracle, VocabularyRequest(source), base)


@pytest.mark.parametrize("source", ["union", 2])
@pytest.mark.parametrize(
    "tokens",
    [
        {"<|start|>": TokenRequest(FromToken(0, "ab"), force=True)},
        {"<|start|>": TokenRequest(FromToken(2, 3)), "ab": TokenRequest(FromModel(2), force=True)},
        {"new": TokenRequest(Zero()), "<s>": TokenRequest(FromModel(1))},
        {"hello": TokenRequest(Zero(), force=True), "a": TokenRequest(None)},
    ],
    ids=["forced", "model-token", "new", "zero"],
)
def test_what_a_recipe_says_of_a_token(oracle: Oracle, source: Any, tokens: dict[str, TokenRequest]) -> None:
    check_against(oracle, VocabularyRequest(source, tokens), 0)


def test_what_a_recipe_says_of_a_token_of_the_base(oracle: Oracle) -> None:
    """Of those alone: where a token is new to the base's vocabulary, mergekit fails."""
    tokens = {"ab": TokenRequest(FromModel(2), force=True), "cd": TokenRequest(Zero()), "<s>": TokenRequest(Zero())}
    check_against(oracle, VocabularyRequest("base", tokens), 0)
    result = realign(
        oracle.store, oracle.commits, VocabularyRequest("base", {"hello": TokenRequest(FromModel(2))}), 0, NAMES
    )
    row = tokens_of(oracle.store, result.commits[0])["hello"]
    assert row == 14
    rows = [tensor(oracle.store, commit, EMBEDDING)[row].tobytes() for commit in result.commits]
    assert rows == [tensor(oracle.store, oracle.commits[2], EMBEDDING)[16].tobytes()] * 3


@pytest.mark.parametrize("multiple", [1, 7, 64])
@pytest.mark.parametrize("source", ["union", "base", 1])
def test_padding_is_the_mean_of_all_rows(oracle: Oracle, source: Any, multiple: int) -> None:
    check_against(oracle, VocabularyRequest(source, {}, multiple), 1)


@pytest.mark.parametrize("source", ["union", "base"])
def test_tokens_that_the_base_has_no_rows_for_are_taken_out(store: Store, tmp_path: Path, source: Any) -> None:
    """An added token goes, and comes back in a union where the settings name it."""
    tokenizers = _tokenizers()
    tokenizers["chat"].pad_token = "<|end|>"
    _write_model(tmp_path / "chat", tokenizers["chat"], 15)
    _write_model(tmp_path / "other", tokenizers["other"], len(tokenizers["other"]))
    results = store.ingest([tmp_path / "chat", tmp_path / "other"])
    names = ("chat", "other")
    oracle = Oracle(store, tmp_path, tuple(result.commit for result in results), names)
    result = check_against(oracle, VocabularyRequest(source), 0)
    vocabulary = tokens_of(store, result.commits[0])
    assert ("<|end|>" in vocabulary) == (source == "union")
    assert result.notes == ("chat has no rows for 1 of its tokenizer's tokens",)


def test_the_output_tokenizer_reads_text_as_mergekits(oracle: Oracle, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    request = VocabularyRequest("union")
    theirs, _ = oracle.vocabulary(request, 0)
    result = realign(oracle.store, oracle.commits, request, 0, NAMES)
    for name, commit in zip(NAMES, result.commits, strict=True):
        oracle.store.snapshot_of(commit).export(tmp_path / name)
        ours = AutoTokenizer.from_pretrained(tmp_path / name)
        text = "<s>abcdef hello <|start|>ab xyhx<|end|><pad>"
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert len(ours) == len(theirs)


def test_the_exported_model_loads(oracle: Oracle, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = realign(oracle.store, oracle.commits, VocabularyRequest("union"), 0, NAMES)
    exported = oracle.store.snapshot_of(result.commits[2]).export(tmp_path / "out")
    assert not exported.identical
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size


def test_the_same_again_is_the_same_commit_and_reads_no_weights(oracle: Oracle) -> None:
    request = VocabularyRequest("union", {}, 8)
    first = realign(oracle.store, oracle.commits, request, 0, NAMES)
    before = state_of(oracle.store)
    blocks = set(objects_of(oracle.store, Kind.BLOCK))
    decoded = []
    reading = oracle.store.reader.read_block

    def watched(digest: Digest, *arguments: Any) -> None:
        decoded.append(digest)
        reading(digest, *arguments)

    oracle.store.reader.read_block = watched  # type: ignore[method-assign]
    try:
        again = realign(oracle.store, oracle.commits, request, 0, NAMES)
    finally:
        del oracle.store.reader.read_block  # type: ignore[method-assign]
    assert again == first
    assert not blocks & set(decoded)
    assert state_of(oracle.store) == before
    commit = oracle.store.commit(first.commits[2])
    source = oracle.store.commit(oracle.commits[2])
    assert (commit.kind, commit.time, commit.author) == ("ingest", source.time, source.author)
    assert [(parent.commit, parent.role, parent.name) for parent in commit.parents] == [
        (oracle.commits[2], "base", "other")
    ]
    assert commit.message == "vocabulary of union for other"


def test_all_but_the_vocabulary_is_the_models_own(oracle: Oracle) -> None:
    result = realign(oracle.store, oracle.commits, VocabularyRequest("union"), 0, NAMES)
    for source, commit in zip(oracle.commits, result.commits, strict=True):
        old, new = oracle.store.snapshot_of(source), oracle.store.snapshot_of(commit)
        assert list(old.tensors) == list(new.tensors)
        changed = {name for name in old.tensors if old.tensors[name] != new.tensors[name]}
        assert changed == {EMBEDDING, HEAD}
        kept, resized = old.config(), new.config()
        assert {**kept, "vocab_size": None} == {**resized, "vocab_size": None}
        assert list(kept) == list(resized)
    settings = {oracle.store.snapshot_of(commit).read_file("tokenizer_config.json") for commit in result.commits}
    assert len(settings) == 1


def test_bands_make_no_difference(oracle: Oracle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = VocabularyRequest("union", {}, 16)
    expected = realign(oracle.store, oracle.commits, request, None, NAMES)
    monkeypatch.setattr(rows_module, "BAND_BYTES", 1)
    with Store.create(tmp_path / "store", block_bytes=4096) as store:
        results = store.ingest([oracle.folder / name for name in NAMES])
        made = realign(store, [result.commit for result in results], request, None, NAMES)
        for one, other in zip(made.commits, expected.commits, strict=True):
            assert store.commit(one).tree == oracle.store.commit(other).tree
