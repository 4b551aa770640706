"""Tokenizers and row maps: ids as the library gives them, rows from where they should come."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.tokenizer import MAXIMUM_TOKENS, Tokenizer, changed_files, read_tokenizer, without_unused
from mergepipe.merge.vocabulary import (
    FromModel,
    FromToken,
    ModelVocabulary,
    RowMap,
    Run,
    TokenRequest,
    Vocabulary,
    VocabularyRequest,
    Zero,
    build_vocabulary,
    common_rows,
    row_maps,
)
from mergepipe.store.errors import BadInputError

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def content(vocab: Any, added: list[str] | None = None, kind: str = "BPE", **model: Any) -> dict[str, Any]:
    """A ``tokenizer.json`` that the library takes, too."""
    entries = [{"id": len(vocab) + place, "content": token, **FLAGS} for place, token in enumerate(added or [])]
    value: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": entries}
    value |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    defaults: dict[str, Any] = {
        "BPE": {"merges": []},
        "WordPiece": {"unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        "WordLevel": {"unk_token": "a"},
        "Unigram": {"unk_id": 0},
    }[kind]
    return {**value, "model": {"type": kind, "vocab": vocab, **defaults, **model}}


def rows_of(words: str | list[str]) -> dict[str, int]:
    return {word: row for row, word in enumerate(words)}


def tokenizer(words: str, added: list[str] | None = None, **settings: Any) -> Tokenizer:
    return read_tokenizer(content(rows_of(words), added), settings, "t")


def model(words: str, added: list[str] | None = None, rows: int | None = None, name: str = "") -> ModelVocabulary:
    return ModelVocabulary(name or words, tokenizer(words, added), rows)


def union(*models: ModelVocabulary, base: int | None = 0, **request: Any) -> Vocabulary:
    return build_vocabulary(models, VocabularyRequest("union", **request), base)


words = st.lists(st.text("abcé ▁", min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


@given(words, st.lists(st.text("abcxyz<>", max_size=3), max_size=6), st.sampled_from(["BPE", "WordLevel", "Unigram"]))
def test_ids_are_those_of_the_library(own: list[str], added: list[str], kind: str) -> None:
    from tokenizers import Tokenizer as Library

    vocab: Any = [[word, -1.0] for word in own] if kind == "Unigram" else rows_of(own)
    value = content(vocab, added, kind)
    assert dict(read_tokenizer(value, {}, "t").ids) == Library.from_str(json.dumps(value)).get_vocab()


@given(words, st.lists(st.sampled_from("abcdefgh"), unique=True), st.integers(1, 14))
def test_what_is_written_is_what_the_library_reads(own: list[str], added: list[str], rows: int) -> None:
    """Also where tokens were taken out, and others were added."""
    from tokenizers import Tokenizer as Library

    base = ModelVocabulary("base", read_tokenizer(content(rows_of(own), added), {}, "t"), rows)
    made = union(base, model("xyz", ["end"]), tokens={"new": TokenRequest(Zero())})
    text = changed_files(made.tokenizer, {})["tokenizer.json"].decode()
    assert Library.from_str(text).get_vocab() == dict(made.tokenizer.ids)
    assert read_tokenizer(json.loads(text), {}, "t").ids == made.tokenizer.ids


def test_tokens_that_only_the_settings_name() -> None:
    settings = {
        "pad_token": "<pad>",
        "bos_token": {"content": "<s>", "lstrip": True},
        "unk_token": "a",
        "additional_special_tokens": ["<x>"],
        "added_tokens_decoder": {"10": {"content": "ten"}, "9": {"content": "nine"}, "odd": {}},
    }
    read = read_tokenizer(content(rows_of("abc")), settings, "t")
    assert list(read.ids) == ["a", "b", "c", "nine", "ten", "<s>", "<pad>", "<x>"]
    assert (read.added["<s>"].lstrip, read.added["<s>"].special, read.added["nine"].special) == (True, True, False)
    assert "a" in read.added


def test_merges_of_tokens_that_go_go_too() -> None:
    from tokenizers import Tokenizer as Library

    merges = ["a b", ["ab", "c"], ["a", "c"]]
    value = content(rows_of(["a", "b", "c", "ac", "ab", "abc"]), merges=merges)
    left = without_unused(read_tokenizer(value, {}, "t"), 4)
    assert left.content["model"]["merges"] == [["a", "c"]]
    assert value["model"]["merges"] == merges
    Library.from_str(changed_files(left, {})["tokenizer.json"].decode())
    pieces = read_tokenizer(content([["a", 0], ["b", 0], ["c", 0]], ["<s>"], kind="Unigram"), {}, "t")
    assert without_unused(pieces, 2).content["model"]["vocab"] == [["a", 0], ["b", 0]]
    assert without_unused(pieces, 4) is pieces


def test_files_beside_the_tokenizer_follow_it() -> None:
    files = {"tokenizer_config.json": {"x": 1, "added_tokens_decoder": {"7": {}}}, "added_tokens.json": {"gone": 9}}
    made = union(model("ab"), model("abc", ["<s>"]))
    written = {path: json.loads(data) for path, data in changed_files(made.tokenizer, files).items()}
    decoder = written["tokenizer_config.json"]["added_tokens_decoder"]
    assert {row: token["content"] for row, token in decoder.items()} == {"2": "c", "3": "<s>"}
    assert written["tokenizer_config.json"]["x"] == 1
    assert written["added_tokens.json"] == {"c": 2, "<s>": 3}
    assert set(changed_files(made.tokenizer, {"tokenizer_config.json": {}})) == {"tokenizer.json"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "not a tokenizer"),
        ({"model": []}, "not a tokenizer"),
        ({"model": {}}, "no vocab"),
        ({"model": {"vocab": "abc"}}, "no vocab"),
        ({"model": {"vocab": {"a": -1}}}, "the id -1"),
        ({"model": {"vocab": {"a": 2**60}}}, "the id 1152921504606846976"),
        ({"model": {"vocab": {"a": 10**400}}}, "the id 1000"),
        ({"model": {"vocab": {"a": True}}}, "the id True"),
        ({"model": {"vocab": {"a": 1.0}}}, "the id 1.0"),
        ({"model": {"vocab": [["a"], [1, 2]]}}, "pieces"),
        ({"model": {"vocab": ["a"]}}, "pieces"),
        ({"model": {"vocab": [[["a"], 0]]}}, "pieces"),
        ({"model": {"vocab": {}}, "added_tokens": 3}, "not a tokenizer"),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": 0}]}, "not an added token"),
        ({"model": {"vocab": {}}, "added_tokens": [{"content": "a", "special": 1}]}, "not an added token"),
        ({"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [{"content": "c"}]}, "would get the id 2"),
        ({"model": {"vocab": {}}, "added_tokens": [{"content": "c"}] * (MAXIMUM_TOKENS + 1)}, "more than"),
        ({"model": {"vocab": [["a", 0]] * (MAXIMUM_TOKENS + 1)}}, "more than"),
    ],
)
def test_what_is_no_tokenizer_is_refused(value: Any, words: str) -> None:
    with pytest.raises(BadInputError, match=f"^t: .*{words}"):
        read_tokenizer(value, {}, "t")


def test_a_union_is_the_bases_then_plain_tokens_then_added_ones() -> None:
    models = [model("xab", ["<x>"]), model("abc", ["<s>"]), model("ayz", ["<e>", "b"])]
    made = union(*models, base=1)
    assert list(made.tokenizer.ids) == ["a", "b", "c", "<s>", "x", "y", "z", "<x>", "<e>"]
    assert list(made.tokenizer.ids.values()) == list(range(9))
    assert list(made.tokenizer.added) == ["b", "<s>", "x", "y", "z", "<x>", "<e>"]
    assert (made.source, made.changed, made.rows) == (1, True, 9)


def test_a_union_of_equals_changes_nothing() -> None:
    made = union(model("abc", ["<s>"]), model("acb"), model("c", ["<s>"]))
    assert (made.changed, made.rows) == (False, 4)


def test_each_row_comes_from_where_it_should() -> None:
    """Own rows, then the one model that has it, then the base's, then the mean."""
    models = [model("abc"), model("bad"), model("de")]
    maps = row_maps(union(*models), [0, 1, 2])  # a b c d e
    assert maps[0] == RowMap(5, 5, (Run(0, 0, 3),), {3: ((1, 2), (2, 0)), 4: ((2, 1),)})
    assert maps[1] == RowMap(5, 5, (Run(0, 1, 1), Run(1, 0, 1), Run(3, 2, 1)), {2: ((0, 2),), 4: ((2, 1),)})
    assert maps[2] == RowMap(5, 5, (Run(3, 0, 2),), {0: ((0, 0),), 1: ((0, 1),), 2: ((0, 2),)})
    without = row_maps(union(*models, base=None), [0, 1, 2])
    assert without[2].others == {0: ((0, 0), (1, 1)), 1: ((0, 1), (1, 0)), 2: ((0, 2),)}


def test_only_models_that_have_the_tensor_count() -> None:
    maps = row_maps(union(model("abc"), model("bad"), model("de")), [1, 2])
    assert maps[1].others == {4: ((2, 1),)}
    assert maps[2] == RowMap(5, 5, (Run(3, 0, 2),), {0: ((1, 1),), 1: ((1, 0),)})  # nobody has c: zeros


def test_what_a_recipe_says_comes_first() -> None:
    models = (model("abc"), model("bad"))
    tokens = {
        "a": TokenRequest(FromToken(1, "d"), force=True),
        "c": TokenRequest(Zero()),
        "d": TokenRequest(FromToken(0, 1)),
        "new": TokenRequest(FromToken(1, 0)),
        "b": TokenRequest(),
    }
    maps = row_maps(union(*models, tokens=tokens), [0, 1])  # a b c d new
    assert maps[0] == RowMap(5, 5, (Run(1, 1, 2), Run(3, 1, 1)), {0: ((1, 2),), 4: ((1, 0),)})
    assert maps[1] == RowMap(5, 5, (Run(0, 2, 1), Run(1, 0, 1), Run(3, 2, 1), Run(4, 0, 1)), {})


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"c": TokenRequest()}, "'c' has no source"),
        ({"a": TokenRequest(force=True)}, "'a' has no source"),
        ({"c": TokenRequest(FromModel(1))}, "needs bad's row for 'c'"),
        ({"c": TokenRequest(FromToken(1, "zz"))}, "needs bad's row for 'zz'"),
        ({"c": TokenRequest(FromToken(1, 3))}, "row 3 of bad, which has 3 rows"),
        ({"c": TokenRequest(FromToken(1, -1))}, "row -1 of bad"),
        ({"c": TokenRequest(FromModel(2))}, "lacks that tensor"),
    ],
)
def test_what_a_recipe_may_not_say(tokens: dict[str, TokenRequest], words: str) -> None:
    made = union(model("abc"), model("bad", rows=3), model("c"), tokens=tokens)
    with pytest.raises(BadInputError, match=words):
        row_maps(made, [0, 1])


def test_tokens_without_rows_are_as_good_as_absent() -> None:
    made = union(model("abcd", rows=2), model("abdc", rows=3))
    assert list(made.tokenizer.ids) == ["a", "b", "d"]
    assert made.notes == (
        "abcd has no rows for 2 of its tokenizer's tokens",
        "abdc has no rows for 1 of its tokenizer's tokens",
    )
    assert row_maps(made, [0, 1])[0] == RowMap(3, 3, (Run(0, 0, 2),), {2: ((1, 2),)})
    whole = build_vocabulary(made.models, VocabularyRequest(1), 0)
    assert (whole.rows, whole.changed, whole.source) == (4, False, 1)
    assert row_maps(whole, [0, 1])[1] == RowMap(4, 4, (Run(0, 0, 3),), {})


def test_a_model_without_a_tokenizer_has_the_bases() -> None:
    made = union(model("abc"), ModelVocabulary("bare", None, 3), model("abcd"))
    assert row_maps(made, [0, 1, 2])[1] == RowMap(4, 4, (Run(0, 0, 3),), {3: ((2, 3),)})
    assert made.notes == ("bare has no tokenizer.json: its tokens are taken to be those of abc",)
    for request in (VocabularyRequest(1), VocabularyRequest("base")):
        with pytest.raises(BadInputError, match=r"bare has no tokenizer\.json"):
            build_vocabulary(made.models, request, 1)


@pytest.mark.parametrize(("multiple", "rows"), [(None, 5), (0, 5), (1, 5), (5, 5), (4, 8), (64, 64)])
def test_padding(multiple: int | None, rows: int) -> None:
    made = union(model("abcde"), pad_to_multiple_of=multiple)
    assert (made.real_rows, made.rows) == (5, rows)
    assert row_maps(made, [0])[0].keeps(5) == (rows == 5)


@pytest.mark.parametrize("multiple", [-1, MAXIMUM_TOKENS + 1, 2**60])
def test_padding_has_bounds(multiple: int) -> None:
    with pytest.raises(BadInputError, match="pad_to_multiple_of"):
        union(model("abcde"), pad_to_multiple_of=multiple)


def test_ids_with_gaps_leave_rows_of_zeros() -> None:
    made = union(ModelVocabulary("gaps", read_tokenizer(content({"a": 1, "b": 4}), {}, "t"), 9))
    assert row_maps(made, [0])[0] == RowMap(5, 5, (Run(1, 1, 1), Run(4, 4, 1)), {})


def test_common_rows() -> None:
    assert common_rows([7, 5, 9]) == RowMap(5, 5, (Run(0, 0, 5),), {})
    assert common_rows([7, 5]).keeps(5)
    assert not common_rows([7, 5]).keeps(7)
    assert common_rows([0, 3]) == RowMap(0, 0, (), {})


def test_a_large_map_is_compact() -> None:
    """A quarter of a million tokens that two models share, and some that one has more: few runs, few others."""
    many = {f"t{row}": row for row in range(250_000)}
    base = ModelVocabulary("base", read_tokenizer(content(many), {}, "t"), 250_000)
    more = ModelVocabulary("more", read_tokenizer(content(many, ["<x>", "<y>"]), {}, "t"), 250_002)
    maps = row_maps(union(base, more), [0, 1])
    assert maps[0] == RowMap(
        250_002, 250_002, (Run(0, 0, 250_000),), {250_000: ((1, 250_000),), 250_001: ((1, 250_001),)}
    )
    assert maps[1].keeps(250_002)
