"""Vocabularies made equal: a model's commit in, a commit of the same model with its vocabulary rows rearranged out.

Only what is indexed by tokens is made anew: embeddings and output heads whose first axis is the vocabulary, the
vocabulary's size in ``config.json``, and the tokenizer's files. Rows are rearranged in bands of bounded size, so that
no embedding is ever in memory whole: for each band every input block that it needs is read once.

The commit has its model's time and author, so the same request gives the same commit. No ref points at it: whoever
uses it names it as a parent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from mergepipe.merge.rows import Rearranging, Target, rearrange
from mergepipe.merge.tokenizer import SETTINGS, TOKENIZER, Tokenizer, as_file, changed_files, read_tokenizer
from mergepipe.merge.vocabulary import (
    ModelVocabulary,
    RowMap,
    Vocabulary,
    VocabularyRequest,
    build_vocabulary,
    common_rows,
    row_maps,
)
from mergepipe.store.canonical import load_strict
from mergepipe.store.chunking import chunk_shape, is_contiguous
from mergepipe.store.commits import Commit, Parent
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.errors import BadInputError
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import FileEntry, Shard, TensorEntry, build_tree
from mergepipe.store.parallel import default_workers
from mergepipe.store.publish import Changes, publish
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.staging import Staging
from mergepipe.store.store import Store
from mergepipe.store.version import TOOL

MAXIMUM_FILE_BYTES: Final = 256 << 20  # of a tokenizer.json: eight times the largest in use
_EMBEDDING: Final = r"embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings|shared"
_HEAD: Final = r"lm_head|embed_out|output|output_layer|vocab_projector|predictions"
_NAMES = re.compile(rf"(?:.*\.)?(?:(?P<embedding>{_EMBEDDING})|(?:{_HEAD})(?:\.linear|\.decoder)?)\.(?:weight|bias)\Z")
_UNREAD: Final = frozenset(
    ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")
)
_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
_TOKENIZER_FILES: Final = _UNREAD | {
    TOKENIZER, SETTINGS, "special_tokens_map.json", "added_tokens.json", "merges.txt", *_TEMPLATES,
}  # fmt: skip
_MORE_TEMPLATES: Final = "additional_chat_templates/"


@dataclass(frozen=True, slots=True)
class Realigned:
    """``commits``: for each model the commit to use in its place, its own where nothing changes."""

    commits: tuple[Digest, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Model:
    """``tensors``: those that are indexed by tokens. ``rows``: of its vocabulary, None where it has no such tensor."""

    name: str
    snapshot: Snapshot
    tensors: Mapping[str, TensorEntry]
    rows: int | None


@dataclass(frozen=True, slots=True)
class _Change:
    """A model on its way: tensors to make anew (name -> map, shape of its chunks), files in place of its own."""

    model: _Model
    message: str
    tensors: Mapping[str, Target]
    files: Mapping[str, FileEntry | bytes]
    rows: int | None


Donors: TypeAlias = Mapping[int, TensorEntry]
"""For each model that has a tensor, by its index, the entry that its rows are taken from."""
Maps: TypeAlias = Callable[[Donors], Mapping[int, RowMap]]


def realign(
    store: Store, models: Sequence[Digest], request: VocabularyRequest, base: int | None, names: Sequence[str]
) -> Realigned:
    """Give all models the vocabulary of a request, by mergekit's rules. ``base``: the base's index in ``models``.

    The model whose files a merge takes, the base or else the first, also gets the output's tokenizer where no row of
    it changes.

    Raises:
        BadInputError: a tokenizer cannot be read, or the models' vocabularies do not go together as requested.
        DamagedError: a block is not what it was; nothing is published.
    """
    loaded = [_load(store.snapshot_of(commit), name) for commit, name in zip(models, names, strict=True)]
    known = [ModelVocabulary(model.name, _tokenizer(model), model.rows) for model in loaded]
    vocabulary = build_vocabulary(known, request, base)
    files = _output_files(vocabulary, loaded[vocabulary.source].snapshot)
    what = request.source if isinstance(request.source, str) else names[request.source]
    lead = base if base is not None else 0
    made: dict[tuple[int, ...], Mapping[int, RowMap]] = {}

    def maps(donors: Donors) -> Mapping[int, RowMap]:
        present = tuple(donors)
        if present not in made:
            made[present] = row_maps(vocabulary, present)
        return made[present]

    changes = _plan(store, loaded, lead, maps)
    found = []
    for number, (model, targets) in enumerate(zip(loaded, changes, strict=True)):
        news = number == lead and _differ(model.snapshot, files)
        message = f"vocabulary of {what} for {model.name}"
        found.append(
            _Change(model, message, targets, files, vocabulary.rows if targets else None) if targets or news else None
        )
    return Realigned(_carry_out(store, loaded, found), vocabulary.notes)


def keep_common_rows(store: Store, models: Sequence[Digest], base: int | None, names: Sequence[str]) -> Realigned:
    """Cut tensors that are indexed by tokens to the rows that all models have; tokenizers stay as they are.

    Raises:
        DamagedError: a block is not what it was; nothing is published.
    """
    loaded = [_load(store.snapshot_of(commit), name) for commit, name in zip(models, names, strict=True)]

    def maps(donors: Donors) -> Mapping[int, RowMap]:
        return dict.fromkeys(donors, common_rows(entry.shape[0] for entry in donors.values()))

    changes = _plan(store, loaded, base if base is not None else 0, maps)
    found = []
    for model, targets in zip(loaded, changes, strict=True):
        rows = min((target.rows.rows for target in targets.values()), default=None)
        message = f"common vocabulary rows of {model.name}"
        found.append(_Change(model, message, targets, _own_tokenizer(model.snapshot), rows) if targets else None)
    return Realigned(_carry_out(store, loaded, found))


def _load(snapshot: Snapshot, name: str) -> _Model:
    """The tensors whose first axis is the vocabulary, by their names and the vocabulary's size."""
    candidates = {tensor: entry for tensor, entry in snapshot.tensors.items() if entry.shape and _NAMES.match(tensor)}
    said = {size for size in _sizes(snapshot.config()) if any(entry.shape[0] == size for entry in candidates.values())}
    found = [entry.shape[0] for tensor, entry in candidates.items() if _is_embedding(tensor)]
    found = found or [entry.shape[0] for entry in candidates.values()]
    rows = min(said, default=found[0] if found else None)
    return _Model(name, snapshot, {k: entry for k, entry in candidates.items() if entry.shape[0] == rows}, rows)


def _sizes(config: Mapping[str, Any]) -> list[int]:
    """What ``config.json`` gives as the vocabulary's size, at its top or one level below."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return [size for part in parts if type(size := part.get("vocab_size")) is int]


def _is_embedding(tensor: str) -> bool:
    match = _NAMES.match(tensor)
    return match is not None and match["embedding"] is not None and tensor.endswith(".weight")


def _tokenizer(model: _Model) -> Tokenizer | None:
    """The model's tokenizer, None where it has none at all.

    Raises:
        BadInputError: it is too large, is no tokenizer, or is there in another form alone.
    """
    files = model.snapshot.files
    if TOKENIZER not in files:
        other = sorted(_UNREAD & set(files))
        if not other:
            return None
        raise BadInputError(
            f"{model.name} has its tokenizer as {other[0]} alone, which mp cannot read",
            hint="Save it with transformers' AutoTokenizer and save_pretrained: that writes tokenizer.json.",
        )
    settings = _json(model.snapshot, SETTINGS, model.name)
    value = _json(model.snapshot, TOKENIZER, model.name)
    return read_tokenizer(value, settings if isinstance(settings, dict) else {}, f"{TOKENIZER} of {model.name}")


def _json(snapshot: Snapshot, path: str, name: str) -> Any:
    entry = snapshot.files.get(path)
    if entry is None:
        return None
    if entry.size > MAXIMUM_FILE_BYTES:
        raise BadInputError(f"{path} of {name} has {entry.size} bytes, more than any tokenizer has")
    return load_strict(snapshot.read_file(path), f"{path} of {name}")


def _own_tokenizer(snapshot: Snapshot) -> dict[str, FileEntry | bytes]:
    return {
        path: entry
        for path, entry in snapshot.files.items()
        if path in _TOKENIZER_FILES or path.startswith(_MORE_TEMPLATES)
    }


def _output_files(vocabulary: Vocabulary, source: Snapshot) -> dict[str, FileEntry | bytes]:
    """The tokenizer's files that every output has: the source's own, or new content."""
    files = _own_tokenizer(source)
    if vocabulary.changed:
        name = vocabulary.models[vocabulary.source].name
        parsed = {path: _json(source, path, name) for path in (SETTINGS, "added_tokens.json")}
        files.update(changed_files(vocabulary.tokenizer, parsed))
    return files


def _differ(snapshot: Snapshot, files: Mapping[str, FileEntry | bytes]) -> bool:
    own = _own_tokenizer(snapshot)
    return set(own) != set(files) or any(
        snapshot.read_file(path) != content if isinstance(content, bytes) else own[path] != content
        for path, content in files.items()
    )


def _plan(store: Store, models: Sequence[_Model], lead: int, maps: Maps) -> list[dict[str, Target]]:
    """For each model the tensors that change, and how."""
    found: list[dict[str, Target]] = [{} for _ in models]
    for tensor in dict.fromkeys(tensor for model in models for tensor in model.tensors):
        donors = {number: entry for number, model in enumerate(models) if (entry := _donor(model, tensor)) is not None}
        _check_widths(tensor, donors, models)
        planned = maps(donors)
        having = {number: model.tensors[tensor] for number, model in enumerate(models) if tensor in model.tensors}
        if all(planned[number].keeps(entry.shape[0]) for number, entry in having.items()):
            continue
        like = donors.get(lead) or next(iter(donors.values()))
        for number, entry in having.items():
            shape = (planned[number].rows, *entry.shape[1:])
            chunks = _chunks(store, shape, entry, like)
            if planned[number].keeps(entry.shape[0]) and entry.chunks == chunks:
                continue
            used = {number, *(source for terms in planned[number].others.values() for source, _ in terms)}
            sources = {source: donors[source] for source in donors if source in used}
            found[number][tensor] = Target(tensor, entry.element_type, shape, chunks, planned[number], number, sources)
    return found


def _chunks(store: Store, shape: tuple[int, ...], entry: TensorEntry, like: TensorEntry) -> tuple[int, ...]:
    """How all models' tensors of this shape are cut: as the leading model's is, or as one of its type would be."""
    chunks = like.chunks if like.shape == shape else ()
    if not is_contiguous(shape, chunks, entry.element_type.bits):
        chunks = chunk_shape(shape, like.element_type.bits, store.layout.block_bytes)
    if not is_contiguous(shape, chunks, entry.element_type.bits):
        chunks = chunk_shape(shape, entry.element_type.bits, store.layout.block_bytes)
    return chunks


def _donor(model: _Model, tensor: str) -> TensorEntry | None:
    """What a model has for a tensor; for a head that it lacks, the embedding that it is tied to."""
    entry = model.tensors.get(tensor)
    if entry is None and tensor.endswith(".weight") and not _is_embedding(tensor):
        embeddings = [entry for name, entry in model.tensors.items() if _is_embedding(name)]
        return embeddings[0] if len(embeddings) == 1 else None
    return entry


def _check_widths(tensor: str, donors: Donors, models: Sequence[_Model]) -> None:
    first = next(iter(donors))
    for number, entry in donors.items():
        if entry.shape[1:] != donors[first].shape[1:]:
            raise BadInputError(
                f"{tensor} is {list(entry.shape)} in {models[number].name}, "
                f"{list(donors[first].shape)} in {models[first].name}",
                hint="Only the number of rows may differ.",
            )


def _carry_out(store: Store, models: Sequence[_Model], changes: Sequence[_Change | None]) -> tuple[Digest, ...]:
    """Make what changes and publish it, all or nothing; returns each model's commit."""
    if not any(changes):
        return tuple(model.snapshot.commit_id for model in models)
    workers = default_workers()
    with Staging(store.layout, store.catalog) as staging, ThreadPoolExecutor(workers, "realign") as pool:
        run = Rearranging(store, staging, pool)
        commits = [_commit(run, change) if change is not None else None for change in changes]
        new = Changes(results=run.results, relied_on=tuple(run.relied_on - set(staging.rows)))
        for commit in commits:
            if commit is not None:
                staging.add_record(Kind.COMMIT, commit.encode())
                new.commits.append(commit)
        if staging.rows or not all(_is_known(store, commit) for commit in new.commits):
            publish(store.catalog, staging, new)
    return tuple(
        commit.id if commit is not None else model.snapshot.commit_id
        for commit, model in zip(commits, models, strict=True)
    )


def _is_known(store: Store, commit: Commit) -> bool:
    with store.catalog.reading() as view:
        return view.get("commits", commit.id) is not None


def _commit(run: Rearranging, change: _Change) -> Commit:
    """The commit in a model's place, with its tree staged."""
    snapshot = change.model.snapshot
    tensors = dict(snapshot.tensors)
    for name, target in change.tensors.items():
        tensors[name] = rearrange(run, target)
    own = _own_tokenizer(snapshot)
    files: dict[str, FileEntry | bytes] = {path: entry for path, entry in snapshot.files.items() if path not in own}
    files.update(change.files)
    if change.rows is not None and change.model.rows is not None:
        files.update(_config(change.model, change.rows))
    entries = {path: _file(run, content) for path, content in sorted(files.items())}
    shards: tuple[Shard, ...] = () if change.tensors else snapshot.shards  # their headers name the old shapes
    source = snapshot.commit
    return Commit(
        tree=build_tree(tensors, entries, shards, lambda data: run.staging.add_record(Kind.NODE, data)),
        parents=(Parent(snapshot.commit_id, "base", change.model.name),),
        kind="ingest",
        message=change.message,
        author=source.author,
        time=source.time,
        tool=TOOL,
    )


def _config(model: _Model, rows: int) -> dict[str, FileEntry | bytes]:
    """``config.json`` with the new size wherever it had the old one, at its top or one level below."""
    value = _json(model.snapshot, "config.json", model.name)
    if not isinstance(value, dict):
        return {}
    config = {key: _resized(part, model.rows, rows) if isinstance(part, dict) else part for key, part in value.items()}
    config = _resized(config, model.rows, rows)
    if rows not in _sizes(config):
        config["vocab_size"] = rows
    return {"config.json": as_file(config)} if config != value else {}


def _resized(part: Mapping[str, Any], old: int | None, new: int) -> dict[str, Any]:
    return {key: new if key == "vocab_size" and value == old else value for key, value in part.items()}


def _file(run: Rearranging, content: FileEntry | bytes) -> FileEntry:
    """A file's entry; content that is new is staged in pieces."""
    if isinstance(content, FileEntry):
        run.relied_on.update(content.blocks)
        return content
    raw = np.frombuffer(content, np.uint8)
    blocks = []
    for start in range(0, raw.nbytes, run.store.layout.block_bytes):
        piece = raw[start : start + run.store.layout.block_bytes]
        digest = hash_bytes(piece.data)
        if run.staging.claim(digest):
            run.staging.add_block(Kind.FILE, digest, piece, 1)
        run.relied_on.add(digest)
        blocks.append(digest)
    return FileEntry(raw.nbytes, tuple(blocks))
