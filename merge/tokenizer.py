"""Tokenizers: ``tokenizer.json`` in, tokens with their ids and the same file with other tokens out. Pure.

Tokens have the ids that the ``tokenizers`` library gives them: the model's vocabulary as it is written, then added
tokens in the file's order, whatever ids the file names, then those that only the settings beside it name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from mergepipe.store.errors import BadInputError

MAXIMUM_TOKENS: Final = 1 << 22  # of a vocabulary, and of ids: sixteen times the largest in use
TOKENIZER: Final = "tokenizer.json"
SETTINGS: Final = "tokenizer_config.json"
_ADDED: Final = "added_tokens.json"
_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched whole, before the model's own, with the library's settings for it."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A ``tokenizer.json``. ``ids``: all tokens; ``own``: how many are the model's own; ``added``: in order of ids.

    ``named``: tokens that only the settings beside it name (``pad_token`` and the like).
    """

    content: Mapping[str, Any]
    ids: Mapping[str, int]
    own: int
    added: Mapping[str, AddedToken]
    named: tuple[AddedToken, ...] = ()


def read_tokenizer(value: Any, settings: Mapping[str, Any], what: str) -> Tokenizer:
    """A parsed ``tokenizer.json`` with the parsed ``tokenizer_config.json`` beside it (or an empty one).

    Raises:
        BadInputError: it is no tokenizer, or has more tokens or higher ids than any; the message begins with ``what``.
    """
    model = value.get("model") if isinstance(value, dict) else None
    listed = value.get("added_tokens") or [] if isinstance(value, dict) else []
    if not isinstance(model, dict) or not isinstance(listed, list):
        raise BadInputError(f"{what}: not a tokenizer", hint="It should have a model with a vocab.")
    ids = _own_ids(model, what)
    if len(ids) + len(listed) > MAXIMUM_TOKENS:
        raise BadInputError(f"{what}: more than {MAXIMUM_TOKENS} tokens")
    added = [_added_token(entry, what) for entry in listed]
    named = tuple(_named_tokens(settings, what))
    return with_added(with_added(Tokenizer(value, ids, len(ids), {}, named), added, what), named, what)


def _own_ids(model: Mapping[str, Any], what: str) -> dict[str, int]:
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: pairs of a piece and its score
        if len(vocab) > MAXIMUM_TOKENS:
            raise BadInputError(f"{what}: more than {MAXIMUM_TOKENS} tokens")
        pieces = [pair[0] for pair in vocab if isinstance(pair, list) and pair and isinstance(pair[0], str)]
        if len(pieces) < len(vocab):
            raise BadInputError(f"{what}: its vocab is not a list of pieces with scores")
        return {piece: row for row, piece in enumerate(pieces)}
    if not isinstance(vocab, dict):
        raise BadInputError(f"{what}: its model has no vocab")
    if len(vocab) > MAXIMUM_TOKENS:
        raise BadInputError(f"{what}: more than {MAXIMUM_TOKENS} tokens")
    for token, row in vocab.items():
        if type(row) is not int or not 0 <= row < MAXIMUM_TOKENS:
            raise BadInputError(f"{what}: token {token!r} has the id {str(row)[:40]}, which no tokenizer has")
    return dict(vocab)


def _added_token(entry: Any, what: str, **defaults: bool) -> AddedToken:
    if isinstance(entry, str):
        return AddedToken(entry, **defaults)
    entry = entry if isinstance(entry, dict) else {"content": entry}
    content = entry.get("content")
    flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in entry}
    if not isinstance(content, str) or not all(type(flag) is bool for flag in flags.values()):
        raise BadInputError(f"{what}: {str(entry)[:80]!r} is not an added token")
    return AddedToken(content, **{**defaults, **flags})


def _named_tokens(settings: Mapping[str, Any], what: str) -> Iterable[AddedToken]:
    """Tokens that the settings name, in the order in which transformers adds those that are not there."""
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for _, entry in sorted(
            (item for item in decoder.items() if item[0].isdecimal() and len(item[0]) < 20),
            key=lambda item: int(item[0]),
        ):
            yield _added_token(entry, what)
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    for entry in [*(settings.get(name) for name in _NAMED), *(extra if isinstance(extra, list) else [])]:
        if isinstance(entry, str | dict):
            yield _added_token(entry, what, special=True, normalized=False)


def with_added(tokenizer: Tokenizer, tokens: Iterable[AddedToken], what: str) -> Tokenizer:
    """The tokenizer with more added tokens; one that the model has already keeps its id.

    Raises:
        BadInputError: the ids have gaps, and a new token would get the id of an old one.
    """
    ids, added = dict(tokenizer.ids), dict(tokenizer.added)
    beyond = [ids[token] for token in added if ids[token] >= tokenizer.own]
    following = max(beyond, default=tokenizer.own - 1) + 1
    used: set[int] | None = None
    for token in tokens:
        if not token.content or token.content in added:
            continue
        if token.content not in ids:
            used = set(ids.values()) if used is None else used
            if following in used or following >= MAXIMUM_TOKENS:
                raise BadInputError(
                    f"{what}: token {token.content!r} would get the id {following}, which is taken",
                    hint="The ids have gaps. Save the tokenizer anew with save_pretrained.",
                )
            ids[token.content] = following
            following += 1
        added[token.content] = token
    return replace(tokenizer, ids=ids, added=dict(sorted(added.items(), key=lambda item: ids[item[0]])))


def without_unused(tokenizer: Tokenizer, rows: int | None) -> Tokenizer:
    """The tokenizer without tokens that the model has no row for."""
    unused = {token for token, row in tokenizer.ids.items() if rows is not None and row >= rows}
    if not unused:
        return tokenizer
    model = dict(tokenizer.content["model"])
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = vocab[:rows]
    else:
        model["vocab"] = {token: row for token, row in vocab.items() if token not in unused}
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, unused)]
    ids = {token: row for token, row in tokenizer.ids.items() if token not in unused}
    added = {content: token for content, token in tokenizer.added.items() if content not in unused}
    return replace(
        tokenizer, content={**tokenizer.content, "model": model}, ids=ids, own=len(model["vocab"]), added=added
    )


def _makes(merge: Any, unused: set[str]) -> bool:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    parts = [part for part in parts if isinstance(part, str)] if isinstance(parts, list) else []
    return "".join(parts) in unused or any(part in unused for part in parts)


def usable(tokenizer: Tokenizer, rows: int | None) -> Mapping[str, int]:
    """The tokens that a model with so many rows has a row for (None: all)."""
    if rows is None or all(row < rows for row in tokenizer.ids.values()):
        return tokenizer.ids
    return {token: row for token, row in tokenizer.ids.items() if row < rows}


def changed_files(tokenizer: Tokenizer, files: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a tokenizer that is not what it came from. ``files``: the JSON files that it came with, parsed."""
    entries = [{"id": tokenizer.ids[content], **asdict(token)} for content, token in tokenizer.added.items()]
    found: dict[str, Any] = {TOKENIZER: {**tokenizer.content, "added_tokens": entries}}
    settings = files.get(SETTINGS)
    if isinstance(settings, dict) and isinstance(settings.get("added_tokens_decoder"), dict):
        decoder = {str(tokenizer.ids[content]): asdict(token) for content, token in tokenizer.added.items()}
        found[SETTINGS] = {**settings, "added_tokens_decoder": decoder}
    if isinstance(files.get(_ADDED), dict):
        found[_ADDED] = {
            token: tokenizer.ids[token] for token in tokenizer.added if tokenizer.ids[token] >= tokenizer.own
        }
    return {path: as_file(value) for path, value in found.items()}


def as_file(value: Any) -> bytes:
    """JSON as Hugging Face's libraries write it: indented, keys in the order that they have."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
