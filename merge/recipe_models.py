"""The models that a recipe names, found in the store: by ref, by an earlier document's name, or ingested on the fly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from mergepipe.merge.assemble import same_shapes
from mergepipe.merge.plan import Input
from mergepipe.merge.recipe import Document, ModelReference, ModelToken, Tokenizer
from mergepipe.merge.recipe.nodes import Place, shown
from mergepipe.merge.vocabulary import FromModel, FromToken, TokenRequest, VocabularyRequest, Zero
from mergepipe.store.canonical import as_text, dump_canonical
from mergepipe.store.digest import DIGEST_BYTES, Digest, hash_record
from mergepipe.store.errors import BadInputError, NotFoundError, UsageError, nearest
from mergepipe.store.folder import walk_folder
from mergepipe.store.parallel import Progress
from mergepipe.store.publish import Changes, publish
from mergepipe.store.refs import all_refs
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store

_LONGEST_NAME: Final = 200
_NO_MODEL: Final = "Name a ref of the store, or a folder with a model in it."


@dataclass
class Found:
    """Commits by the names that recipes use. ``folder``: where the recipe lies, for paths. ``notes``: for the user.

    ``coming``: names of documents whose results will be there when they are needed. ``opened``: snapshots whose trees
    were read.
    """

    store: Store
    folder: Path
    results: dict[str, Digest] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    coming: frozenset[str] = frozenset()
    opened: dict[Digest, Snapshot] = field(default_factory=dict)
    progress: Progress | None = None
    _known: dict[str, tuple[Digest, str]] = field(default_factory=dict)

    def commit(self, path: str, revision: str | None, place: Place, base: str | None = None) -> tuple[Digest, str]:
        """The commit that a model's path stands for, and the name to show; raises BadInputError with the line."""
        name = f"{path}@{revision}" if revision else path
        if name not in self._known:
            self._known[name] = self._find(path, revision, name, place, base)
        return self._known[name]

    def _find(self, path: str, revision: str | None, name: str, place: Place, base: str | None) -> tuple[Digest, str]:
        where = self._locate(path, revision, name, place)
        if not isinstance(where, Path):
            return where
        try:
            return self._ingest(where, base)
        except BadInputError as error:
            raise place.error(error.message, error.hint or _NO_MODEL) from error

    def resolvable(self, item: Input) -> str:
        """A name that the store knows a model by: its own, or, for another document's result, its id."""
        with suppress(NotFoundError):
            if self.store.resolve(item.name) == item.commit:
                return item.name
        return item.commit.hex()

    def check(self, reference: ModelReference, place: Place) -> None:
        """Raise BadInputError with the line where a model is not to be found; nothing is ingested."""
        parts = [(reference.path, reference.revision)]
        if reference.lora is not None:
            parts.append((reference.lora, reference.lora_revision))
        for path, revision in parts:
            if path not in self.coming:
                self._locate(path, revision, f"{path}@{revision}" if revision else path, place)

    def _locate(self, path: str, revision: str | None, name: str, place: Place) -> tuple[Digest, str] | Path:
        """The commit, and the name to show; or the folder to ingest."""
        if name in self.results:
            return self.results[name], name
        known = self._resolve(name)
        if known is not None:
            return known, name
        if revision:
            raise place.error(
                f"revision {shown(revision)} of {shown(path)} is not in the store",
                "Ingest that revision under a name of its own (mp ingest FOLDER --ref NAME), and write that name here.",
            )
        for folder in (self.folder / path, Path(path)):
            if _exists(folder):
                return folder
        last = path.rsplit("/", 1)[-1]
        known = self._resolve(last)
        if known is not None:
            return known, last
        with self.store.catalog.reading() as view:
            names = [ref.name for ref in all_refs(view)]
        hint = nearest(path[:_LONGEST_NAME], names) or "Ingest it first: mp ingest FOLDER --ref NAME"
        raise place.error(f"{shown(path)} is no ref of the store, and no folder", hint)

    def _resolve(self, name: str) -> Digest | None:
        """The commit that a name stands for in the store, None where it is none, or no name at all."""
        try:
            return self.store.resolve(name)
        except (NotFoundError, UsageError):
            return None

    def _ingest(self, folder: Path, base: str | None) -> tuple[Digest, str]:
        """Ingest a folder, unless it was, and no file in it has another size or time since."""
        key = _stamp(folder)
        with self.store.catalog.reading() as view:
            row = view.get("results", key)
        if row is not None and len(row) == DIGEST_BYTES:
            with suppress(NotFoundError):
                self.store.commit(Digest(row))
                return Digest(row), folder.name
        result = self.store.ingest([folder.resolve()], base=base, progress=self.progress)[0]
        if _stamp(folder) == key:
            publish(self.store.catalog, None, Changes(results={key: result.commit}))
        if not result.unchanged:
            self.notes.append(f"{folder} was ingested as {result.ref}")
        return result.commit, result.ref

    def model(self, reference: ModelReference, place: Place, base: str | None = None) -> Input:
        """A model, or an adapter on one, as a plan's input."""
        commit, name = self.commit(reference.path, reference.revision, place, base)
        if reference.lora is None:
            kind = "adapter" if "adapter_config.json" in self.store.snapshot_of(commit).files else "model"
            return Input(commit, name, kind=kind)
        adapter, adapter_name = self.commit(reference.lora, reference.lora_revision, place)
        return Input(adapter, f"{name}+{adapter_name}", kind="adapter", onto=commit)


def _exists(path: Path) -> bool:
    """Whether a name that a recipe gives is that of a file or folder; one too long or odd for the system is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _stamp(folder: Path) -> Digest:
    """The hash of a folder's place, and of its files' names, sizes and times; raises BadInputError as ingest does."""
    files = sorted(walk_folder(folder).values()) if folder.is_dir() else [folder]
    stats = [(as_text(str(path)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hash_record("recipe", dump_canonical({"folder": as_text(str(folder.resolve())), "files": stats}))


def check_models(found: Found, document: Document) -> None:
    """Raise BadInputError with the line where a document names a model that is nowhere; nothing is ingested."""
    places = _places(document)
    for reference in document.references():
        found.check(reference, places.get(reference, document.place))


def _places(document: Document) -> dict[ModelReference, Place]:
    """Where each model stands first."""
    places = {source.model: source.place for source in reversed(list(document.inputs()))}
    if document.base_model is not None:
        places.setdefault(document.base_model, document.place_of("base_model"))
    if isinstance(document.tokenizer_source, ModelReference):
        places.setdefault(document.tokenizer_source, document.place_of("tokenizer_source"))
    for reference in document.tokenizer.references() if document.tokenizer is not None else ():
        places.setdefault(reference, document.place_of("tokenizer"))
    return places


def find_models(found: Found, document: Document) -> dict[ModelReference, Input]:
    """An input for each model of a document, the base first, so that others are stored against it."""
    check_models(found, document)
    places = _places(document)
    inputs: dict[ModelReference, Input] = {}
    base_name = None
    if document.base_model is not None:
        base = inputs[document.base_model] = found.model(document.base_model, document.place_of("base_model"))
        if base.kind != "model":
            raise document.place_of("base_model").error(
                f"the base {base.name!r} is an adapter on a model", "Merge the adapter into its model first."
            )
        base_name = found.resolvable(base)
    for reference in document.references():
        if reference not in inputs:
            inputs[reference] = found.model(reference, places.get(reference, document.place), base_name)
    return inputs


def align_vocabularies(
    found: Found, document: Document, inputs: Mapping[ModelReference, Input]
) -> dict[ModelReference, Input]:
    """The inputs with one vocabulary, as the document's tokenizer asks; or with the rows that all have.

    Adapters keep their model's rows: with a ``tokenizer`` they cannot be used.
    """
    references = [reference for reference, item in inputs.items() if item.kind == "model"]
    commits = [inputs[reference].commit for reference in references]
    names = [inputs[reference].name for reference in references]
    base = references.index(document.base_model) if document.base_model in references else None
    wanted = _request(document, references)
    if wanted is not None:
        adapters = [item.name for item in inputs.values() if item.kind == "adapter"]
        if adapters:
            raise document.place_of("tokenizer" if document.tokenizer is not None else "tokenizer_source").error(
                f"the vocabulary of {adapters[0]!r}, an adapter, cannot be matched by token",
                "Merge it into its model first, and use the result.",
            )
        place = document.place_of("tokenizer" if document.tokenizer is not None else "tokenizer_source")
        from mergepipe.merge.realign import realign

        try:
            realigned = realign(found.store, commits, wanted, base, names)
        except BadInputError as error:
            raise place.error(error.message, error.hint or "Save the tokenizer anew with save_pretrained.") from error
    else:
        found.opened.update({commit: found.store.snapshot_of(commit) for commit in commits})
        if same_shapes(found.opened[commit] for commit in commits):
            return dict(inputs)
        from mergepipe.merge.realign import keep_common_rows

        realigned = keep_common_rows(found.store, commits, base, names)
        found.notes += cut_notes(names, commits, realigned.commits)
    found.notes += realigned.notes
    changed = dict(inputs)
    for reference, commit, name in zip(references, realigned.commits, names, strict=True):
        if commit != inputs[reference].commit:
            changed[reference] = Input(commit, name)
    return changed


def cut_notes(names: Sequence[str], before: Sequence[Digest], after: Sequence[Digest]) -> list[str]:
    """What to tell the user of models whose vocabularies were cut."""
    return [
        f"{name}: its vocabulary is cut to the rows that all models have; `tokenizer:` in a recipe matches tokens"
        for name, old, new in zip(names, before, after, strict=True)
        if old != new
    ]


def _request(document: Document, references: Sequence[ModelReference]) -> VocabularyRequest | None:
    if document.tokenizer_source is not None:
        return VocabularyRequest(_index(document.tokenizer_source, references))
    tokenizer = document.tokenizer
    if tokenizer is None:
        return None
    tokens = {name: _token(tokenizer, name, references) for name in tokenizer.tokens}
    return VocabularyRequest(_index(tokenizer.source, references), tokens, tokenizer.pad_to_multiple_of)


def _index(
    source: ModelReference | Literal["union", "base"], references: Sequence[ModelReference]
) -> Literal["union", "base"] | int:
    return source if isinstance(source, str) else references.index(source)


def _token(tokenizer: Tokenizer, name: str, references: Sequence[ModelReference]) -> TokenRequest:
    token = tokenizer.tokens[name]
    if token.source is None:
        return TokenRequest(None, token.force)
    if isinstance(token.source, ModelToken):
        which = token.source.token if token.source.token is not None else token.source.token_id
        assert which is not None
        return TokenRequest(FromToken(references.index(token.source.model), which), token.force)
    if isinstance(token.source, ModelReference):
        return TokenRequest(FromModel(references.index(token.source)), token.force)
    return TokenRequest(Zero(), token.force)
