"""The models of a merge as the engine sees them: a tensor entry for each name, whatever an expert is kept as.

An expert that is a whole model has its own entries. One that is an adapter, or a saved task vector, has *virtual*
blocks: ids of what would be the block's content, made from what it is computed from, so that plans, statistics and
the result cache treat all experts alike. Only :mod:`mergepipe.merge.tiles` knows how a virtual block is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergepipe.merge.plan import Input
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.catalog import ObjectRow, Reading
from mergepipe.store.digest import Digest, hash_record
from mergepipe.store.dtypes import DType
from mergepipe.store.errors import BadInputError, DamagedError, NotFoundError
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store

if TYPE_CHECKING:
    from mergepipe.merge.adapters import LowRank


@dataclass(frozen=True, slots=True)
class Virtual:
    """What a virtual block is computed from: a delta, and the block that it is a delta to.

    ``onto``: that block and its type. ``low`` with ``start``, the block's first element in its tensor; or ``block``
    with ``dtype``, a block of a task vector; or ``preview``, that of another block to ``onto``.
    """

    onto: tuple[Digest, DType]
    start: int = 0
    low: LowRank | None = None
    block: Digest | None = None
    dtype: DType | None = None
    preview: Digest | None = None

    @property
    def stored(self) -> Digest | None:
        """The object that is read for it, where it is one."""
        return self.block or self.preview


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a merge. ``adapter_blocks``: all that reading its low-rank factors takes, by target tensor."""

    input: Input
    snapshot: Snapshot
    tensors: Mapping[str, TensorEntry]
    virtual: Mapping[Digest, Virtual] = field(default_factory=dict)
    adapter_blocks: Mapping[str, tuple[Digest, ...]] = field(default_factory=dict)


def open_models(store: Store, inputs: Sequence[Input], opened: Mapping[Digest, Snapshot] | None = None) -> list[Model]:
    """All models of a merge, the base first. ``opened``: snapshots whose trees were read already.

    Raises:
        NotFoundError: a commit is not in the store.
        BadInputError: an adapter that cannot be applied, or a task vector with other tensors than the base's.
    """
    known = opened or {}
    base = Model(inputs[0], _snapshot(store, inputs[0], known), {})
    base = replace(base, tensors=base.snapshot.tensors)
    return [base, *(_expert(store, item, base.tensors, known) for item in inputs[1:])]


def _snapshot(store: Store, item: Input, opened: Mapping[Digest, Snapshot]) -> Snapshot:
    try:
        return opened.get(item.commit) or store.snapshot_of(item.commit)
    except NotFoundError:
        raise NotFoundError(
            f"{item.name!r} of the plan is commit {item.commit.short}, which is not in this store",
            hint="Ingest it here first, or run the plan where it was made.",
        ) from None


def _expert(store: Store, item: Input, base: Mapping[str, TensorEntry], opened: Mapping[Digest, Snapshot]) -> Model:
    snapshot = _snapshot(store, item, opened)
    if item.kind == "adapter":
        return _adapter(store, item, snapshot, base)
    if item.kind == "task_vector":
        return _task_vector(item, snapshot, base)
    return Model(item, snapshot, snapshot.tensors)


def _adapter(store: Store, item: Input, snapshot: Snapshot, base: Mapping[str, TensorEntry]) -> Model:
    """An adapter on the base, or on a model of its own: what it does not change is that model's."""
    from mergepipe.merge.adapters import read_adapter

    onto = store.snapshot_of(item.onto).tensors if item.onto is not None else base
    adapter = read_adapter(store, snapshot, onto)
    tensors = {**onto, **adapter.replaced}
    virtual: dict[Digest, Virtual] = {}
    blocks: dict[str, tuple[Digest, ...]] = {}
    for name, low in adapter.deltas.items():
        entry = onto[name]
        ids = []
        for index, block in enumerate(entry.blocks):
            start = entry.block_span(index)[0] * 8 // entry.element_type.bits
            made_of = Virtual((block, entry.element_type), start, low)
            ids.append(_virtual_id(made_of, index))
            virtual[ids[-1]] = made_of
        tensors[name] = TensorEntry("F32", entry.shape, entry.chunks, tuple(ids))
        blocks[name] = (*low.a.blocks, *low.b.blocks)
    return Model(item, snapshot, tensors, virtual, blocks)


def _task_vector(item: Input, snapshot: Snapshot, base: Mapping[str, TensorEntry]) -> Model:
    """A checkpoint of deltas; a tensor that it lacks is the base's own."""
    tensors = dict(base)
    virtual: dict[Digest, Virtual] = {}
    strangers = [name for name in snapshot.tensors if name not in base]
    if strangers:
        raise BadInputError(
            f"the task vector {item.name!r} has tensors that the base has not: {', '.join(strangers[:3])}",
            hint="`mp ls` lists both. A checkpoint of whole weights is an expert without as=task_vector.",
        )
    for name, entry in snapshot.tensors.items():
        if not entry.element_type.has_statistics:
            continue
        if not entry.same_grid(base[name]):
            raise BadInputError(
                f"{name!r} of the task vector {item.name!r} has another shape than the base's, or is cut otherwise",
                hint="Ingest it with --base, so that it is cut into the base's blocks.",
            )
        ids = []
        for index, block in enumerate(entry.blocks):
            made_of = Virtual((base[name].blocks[index], base[name].element_type), 0, None, block, entry.element_type)
            ids.append(_virtual_id(made_of, index))
            virtual[ids[-1]] = made_of
        tensors[name] = TensorEntry("F32", entry.shape, entry.chunks, tuple(ids))
    return Model(item, snapshot, tensors, virtual)


def _virtual_id(made_of: Virtual, index: int) -> Digest:
    parts: dict[str, Any] = {"virtual": index, "onto": [made_of.onto[0].hex(), made_of.onto[1].name]}
    if made_of.low is not None:
        low = made_of.low
        parts["low_rank"] = [low.a.id.hex(), low.b.id.hex(), low.scale, low.transposed]
    if made_of.block is not None and made_of.dtype is not None:
        parts["delta"] = [made_of.block.hex(), made_of.dtype.name]
    return hash_record("recipe", dump_canonical(parts))


class Reads:
    """What reading blocks costs in this store: bytes on disk, from the catalog alone."""

    def __init__(self, view: Reading, virtual: Mapping[Digest, Virtual]) -> None:
        self._view = view
        self._virtual = virtual

    def expert_bytes(self, block: Digest, base: Digest) -> int:
        """Of an expert's block when the reference's block at its place is at hand.

        A delta against another block than the base's (or than the one that the base's is stored against) needs that
        too. Low-rank factors are read once for a tensor, and are not counted here.
        """
        made_of = self._virtual.get(block)
        if made_of is not None:
            parts = (made_of.block, made_of.onto[0])
            return sum(self.expert_bytes(part, base) for part in parts if part is not None and part != base)
        row = self._row(block)
        if row.base is None or row.base in (base, self._row(base).base):
            return row.stored_bytes
        return row.stored_bytes + self._row(row.base).stored_bytes

    def own_bytes(self, block: Digest) -> int:
        """Of a block by itself, with what it is stored against."""
        row = self._row(block)
        return row.stored_bytes + (self._row(row.base).stored_bytes if row.base is not None else 0)

    def total(self, blocks: Iterable[Digest]) -> int:
        """Of distinct blocks, each by itself."""
        return sum(self.own_bytes(block) for block in set(blocks))

    def _row(self, block: Digest) -> ObjectRow:
        row = self._view.object_row(block)
        if row is None:
            raise DamagedError(
                f"object {block.short} is not in the store", hint="`mp verify` says what is missing and what needs it."
            )
        return row


def virtual_blocks(models: Sequence[Model]) -> dict[Digest, Virtual]:
    """The virtual blocks of all models."""
    return {digest: made_of for model in models for digest, made_of in model.virtual.items()}
