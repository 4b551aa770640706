"""Vocabularies: tokenizers in, the output's tokenizer and a map of rows for each model out. Pure.

A union is the base's vocabulary, then what the other models have beyond it: plain tokens, in the
order of models and of ids there, then added tokens likewise. The rules for rows are mergekit's: a model keeps its own
row of a token; where it has none it gets the row of the one model that has it, or the base's, else the mean over those
that have it, or zeros; what the recipe says of a token comes before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mergepipe.merge.tokenizer import (
    MAXIMUM_TOKENS,
    TOKENIZER,
    AddedToken,
    Tokenizer,
    usable,
    with_added,
    without_unused,
)
from mergepipe.store.errors import BadInputError, nearest


@dataclass(frozen=True, slots=True)
class Zero:
    """A row of zeros."""


@dataclass(frozen=True, slots=True)
class FromModel:
    """The row that a model (by its index) has for the token itself."""

    model: int


@dataclass(frozen=True, slots=True)
class FromToken:
    """The row that a model (by its index) has for another token, given as text or as an id."""

    model: int
    token: str | int


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a recipe says of one token: where its row comes from; ``force``: also for models that have their own."""

    source: Zero | FromModel | FromToken | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class VocabularyRequest:
    """Which vocabulary the output has: the union of all, the base's, or that of a model by its index."""

    source: Literal["union", "base"] | int = "union"
    tokens: Mapping[str, TokenRequest] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class ModelVocabulary:
    """What is known of one model. ``tokenizer`` None: it has none, and the base's is assumed.

    ``rows``: how many rows tokens may use; tokens with higher ids are as good as absent. None: any number.
    """

    name: str
    tokenizer: Tokenizer | None
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The output's vocabulary. ``ids``: for each model the row of each token that it has.

    ``source``: the model whose tokenizer files the output has; ``changed``: ``tokenizer`` is not that model's own.
    ``real_rows``: those that tokens have; ``rows``: with padding.
    """

    models: tuple[ModelVocabulary, ...]
    request: VocabularyRequest
    base: int | None
    source: int
    tokenizer: Tokenizer
    changed: bool
    ids: tuple[Mapping[str, int], ...]
    real_rows: int
    rows: int
    notes: tuple[str, ...]


Terms: TypeAlias = tuple[tuple[int, int], ...]
"""Rows as ``(model, row)`` whose mean is meant; one is copied; none is zeros."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of the model itself: output rows from ``out_start`` are its rows from ``in_start``."""

    out_start: int
    in_start: int
    count: int


@dataclass(frozen=True, slots=True)
class RowMap:
    """Where each row of one model's output comes from.

    ``runs``: its own rows, in order. ``others``: the few that come from elsewhere. What is in neither is zeros, and
    rows from ``real_rows`` on are padding: the mean of all rows before.
    """

    rows: int
    real_rows: int
    runs: tuple[Run, ...]
    others: Mapping[int, Terms] = field(default_factory=dict)

    def keeps(self, rows: int) -> bool:
        """Whether a tensor of so many rows stays as it is."""
        return self.rows == rows and not self.others and self.runs == (Run(0, 0, rows),)


def build_vocabulary(
    models: Sequence[ModelVocabulary], request: VocabularyRequest, base: int | None = None
) -> Vocabulary:
    """The output's vocabulary. Without a base the first model stands in for it where a tokenizer is concerned.

    Raises:
        BadInputError: a tokenizer that is needed is not there, or the output would have more rows than any.
    """
    lead = base if base is not None else 0
    source = request.source if isinstance(request.source, int) else lead
    first = without_unused(_needed(models[lead]), models[lead].rows)
    known = [first if number == lead else model.tokenizer for number, model in enumerate(models)]
    output = first if request.source == "base" else _needed(models[source])
    if request.source == "union":
        output = _union(first, lead, models, known)
    new = [AddedToken(token) for token in request.tokens if token not in output.ids]
    output = with_added(output, new, TOKENIZER) if new else output
    ids = tuple(usable(tokenizer or first, model.rows) for tokenizer, model in zip(known, models, strict=True))
    real_rows = max(len(output.ids), max(output.ids.values(), default=-1) + 1)
    return Vocabulary(
        models=tuple(models),
        request=request,
        base=base,
        source=source,
        tokenizer=output,
        changed=output is not models[source].tokenizer,
        ids=ids,
        real_rows=real_rows,
        rows=_padded(real_rows, request.pad_to_multiple_of),
        notes=tuple(_notes(models, lead, ids)),
    )


def _needed(model: ModelVocabulary) -> Tokenizer:
    if model.tokenizer is None:
        raise BadInputError(
            f"{model.name} has no {TOKENIZER}, which the output's vocabulary is made from",
            hint="Save its tokenizer with save_pretrained and ingest it again.",
        )
    return model.tokenizer


def _notes(models: Sequence[ModelVocabulary], lead: int, ids: Sequence[Mapping[str, int]]) -> Iterator[str]:
    for model, own in zip(models, ids, strict=True):
        if model.tokenizer is None:
            yield f"{model.name} has no {TOKENIZER}: its tokens are taken to be those of {models[lead].name}"
        elif len(own) < len(model.tokenizer.ids):
            yield f"{model.name} has no rows for {len(model.tokenizer.ids) - len(own)} of its tokenizer's tokens"


def _union(
    first: Tokenizer, lead: int, models: Sequence[ModelVocabulary], known: Sequence[Tokenizer | None]
) -> Tokenizer:
    plain: dict[str, AddedToken] = {}
    added: dict[str, AddedToken] = {}
    for number in [lead, *(number for number in range(len(models)) if number != lead)]:
        tokenizer = known[number]
        if tokenizer is None:
            continue
        rows = usable(tokenizer, models[number].rows)
        found = [(row, token) for token, row in rows.items() if token in tokenizer.added or token not in first.ids]
        for _, token in sorted(found):
            if token in tokenizer.added:
                added.setdefault(token, tokenizer.added[token])
            else:
                plain.setdefault(token, AddedToken(token))
    new = [token for content, token in plain.items() if content not in added]
    whole = with_added(first, first.named, TOKENIZER)  # saving and loading it brings them back
    extended = with_added(whole, [*new, *added.values()], TOKENIZER)
    return first if extended.added == first.added else extended


def _padded(rows: int, multiple: int | None) -> int:
    if multiple is not None and not 0 <= multiple <= MAXIMUM_TOKENS:
        raise BadInputError(f"pad_to_multiple_of is {multiple}, which is no number of rows to pad to")
    padded = -(-rows // multiple) * multiple if multiple else rows
    if not 0 < padded <= MAXIMUM_TOKENS:
        raise BadInputError(f"the output's vocabulary would have {padded} rows; {MAXIMUM_TOKENS} at most are possible")
    return padded


def row_maps(vocabulary: Vocabulary, present: Sequence[int]) -> dict[int, RowMap]:
    """For each model that has the tensor, by its index: where the rows of its output come from.

    Raises:
        BadInputError: the recipe asks for a row that is not there, or says nothing of a row that is needed.
    """
    own: dict[int, list[tuple[int, int]]] = {number: [] for number in present}
    others: dict[int, dict[int, Terms]] = {number: {} for number in present}
    tokens = {row: token for token, row in sorted(vocabulary.tokenizer.ids.items(), reverse=True)}
    for row, token in sorted(tokens.items()):
        request = vocabulary.request.tokens.get(token)
        forced = request is not None and request.force
        having = [number for number in present if token in vocabulary.ids[number]]
        terms: Terms = ()
        if forced or len(having) < len(present):
            terms = _terms(vocabulary, token, having, present)
        for number in present:
            if number in having and not forced:
                own[number].append((row, vocabulary.ids[number][token]))
            elif len(terms) == 1 and terms[0][0] == number:
                own[number].append((row, terms[0][1]))
            elif terms:
                others[number][row] = terms
    return {
        number: RowMap(vocabulary.rows, vocabulary.real_rows, _runs(own[number]), others[number]) for number in present
    }


def _terms(vocabulary: Vocabulary, token: str, having: Sequence[int], present: Sequence[int]) -> Terms:
    """The row of a token for models that have none of their own, or may not keep it."""
    request = vocabulary.request.tokens.get(token)
    if request is not None:
        return _requested(vocabulary, token, request, present)
    if vocabulary.base is not None and vocabulary.base in having:
        having = [vocabulary.base]
    return tuple((number, vocabulary.ids[number][token]) for number in having)


def _requested(vocabulary: Vocabulary, token: str, request: TokenRequest, present: Sequence[int]) -> Terms:
    source = request.source
    if isinstance(source, Zero):
        return ()
    if source is None:
        raise BadInputError(
            f"tokens: {token!r} has no source, and not every model has a row for it to keep",
            hint="Give it a source: a model, `kind: zero`, or `kind: model_token`.",
        )
    model, wanted = vocabulary.models[source.model], source.token if isinstance(source, FromToken) else token
    if source.model not in present:
        raise BadInputError(f"tokens: {token!r} needs a row of {model.name}, which lacks that tensor")
    if isinstance(wanted, str):
        row = vocabulary.ids[source.model].get(wanted)
        if row is None:
            hint = nearest(wanted, list(vocabulary.ids[source.model])[:20_000]) or None
            raise BadInputError(f"tokens: {token!r} needs {model.name}'s row for {wanted!r}, which it lacks", hint=hint)
        return ((source.model, row),)
    if not 0 <= wanted < (model.rows if model.rows is not None else MAXIMUM_TOKENS):
        raise BadInputError(f"tokens: {token!r} needs row {wanted} of {model.name}, which has {model.rows} rows")
    return ((source.model, wanted),)


def _runs(pairs: Iterable[tuple[int, int]]) -> tuple[Run, ...]:
    runs: list[list[int]] = []
    for out, own in pairs:
        last = runs[-1] if runs else None
        if last is not None and out == last[0] + last[2] and own == last[1] + last[2]:
            last[2] += 1
        else:
            runs.append([out, own, 1])
    return tuple(Run(*run) for run in runs)


def common_rows(counts: Iterable[int]) -> RowMap:
    """The rows that tensors of these many rows have in common: the first of each."""
    rows = min(counts)
    return RowMap(rows, rows, (Run(0, 0, rows),) if rows else ())
