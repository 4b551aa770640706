"""Where each block of a tensor is from: which experts reached it, or which ingest brought it. Reads no weights.

A merge's plan says which experts' blocks were read, and the manifests say where these differ from the reference's; so
the history of a block follows from ids alone. An ingested commit continues others (its previous one, and the base that
it was stored against): a block that these have at the same place was brought by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from mergepipe.merge.build import jobs_of_plan
from mergepipe.merge.job import Job
from mergepipe.merge.plan import Plan
from mergepipe.merge.plan_file import decode_plan
from mergepipe.store.digest import Digest
from mergepipe.store.errors import NotFoundError, nearest
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import Node, TensorEntry, split_name
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store

Origin = Literal["own", "computed", "brought"]
_Key = tuple[Digest, str]


@dataclass(frozen=True, slots=True)
class Source:
    """A model that a merged tensor was made from. ``tensor``: its name there; ``kind``: as in the plan's input."""

    name: str
    commit: Digest
    tensor: str
    kind: str


@dataclass(frozen=True, slots=True)
class Fate:
    """How a block came about. Experts are positions in the tensor's ``experts``.

    ``own``: it is the reference's, and nothing was read. ``computed``: from the reference's, the blocks of the experts
    in ``reached``, and the previews of those in ``coarse``; ``equals`` is the model whose block came out (0: the
    reference, 1: the first expert).
    ``brought``: ``commit`` is the first that had it at this place, an ingest, or a merge that was ingested over.

    ``left_out``: these experts differ here, and were not read to stay within the budget; ``same``: they have the
    reference's block. ``unmerged``: they differ, and the tensor's element type is none that merges compute with.
    """

    origin: Origin
    reached: tuple[int, ...] = ()
    coarse: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    same: tuple[int, ...] = ()
    unmerged: tuple[int, ...] = ()
    equals: int | None = None
    commit: Digest | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of one fate, ``first`` to ``last`` included."""

    first: int
    last: int
    fate: Fate

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True, slots=True)
class TensorBlame:
    """One tensor of one commit. ``reference`` and ``method`` are None, and ``experts`` empty, where it was ingested.

    ``based``: whether the reference took part as the method's base.
    """

    commit: Digest
    kind: str
    name: str
    entry: TensorEntry
    runs: tuple[Run, ...]
    method: str | None = None
    reference: Source | None = None
    experts: tuple[Source, ...] = ()
    based: bool = False

    def count(self, chosen: Callable[[Fate], bool]) -> int:
        """How many blocks have such a fate."""
        return sum(len(run.blocks) for run in self.runs if chosen(run.fate))


def matching_tensors(snapshot: Snapshot, pattern: str, ref: str) -> list[str]:
    """The tensor of that name, or all that match a pattern such as ``model.layers.3.*``; raises NotFoundError."""
    if pattern in snapshot.tensors:
        return [pattern]
    found = [name for name in snapshot.tensors if fnmatchcase(name, pattern)]
    if not found:
        hint = nearest(pattern, snapshot.tensors) or f"`mp ls {ref}` lists the tensors."
        raise NotFoundError(f"there is no tensor {pattern!r} in {ref!r}", hint=hint)
    return found


def blame(
    store: Store, snapshot: Snapshot, names: Sequence[str], *, deep: bool = False
) -> tuple[list[TensorBlame], list[TensorBlame]]:
    """The tensors that were asked for; and, with ``deep``, those that their blocks came from, commit by commit.

    Raises:
        NotFoundError: no such tensor, or a merge whose plan or inputs are not in the store.
    """
    history = _History(store)
    asked = [history.tensor(snapshot.commit_id, name) for name in names]
    return asked, history.behind(asked) if deep else []


@dataclass(frozen=True)
class _Merge:
    """A merge's plan, and what it did for each tensor."""

    store: Store
    plan: Plan

    @cached_property
    def jobs(self) -> Mapping[str, Job]:
        return {job.name: job for job in jobs_of_plan(self.store, self.plan)[1]}


class _History:
    """Commits, plans and manifest nodes as they are needed, each read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._snapshots: dict[Digest, Snapshot] = {}
        self._nodes: dict[Digest, Node] = {}
        self._merges: dict[Digest, _Merge] = {}

    def tensor(self, commit: Digest, name: str, wanted: Sequence[int] | None = None) -> TensorBlame:
        """One tensor, or only some of its blocks."""
        snapshot = self._snapshot(commit)
        entry = self._entry(snapshot, name) or snapshot.entry(name)
        indices = range(len(entry.blocks)) if wanted is None else wanted
        kind = snapshot.commit.kind
        if kind == "merge":
            return self._merged(snapshot, name, entry, indices)
        brought = self._brought(commit, name, indices)
        fates = ((index, Fate("brought", commit=brought[index])) for index in indices)
        return TensorBlame(commit, kind, name, entry, tuple(_runs(fates)))

    def behind(self, asked: Iterable[TensorBlame]) -> list[TensorBlame]:
        """All that the blocks of these came from, in the order in which it is met."""
        wanted: dict[_Key, set[int]] = {}
        waiting = [step for each in asked for step in _steps(each)]
        while waiting:
            key, indices = waiting.pop(0)
            new = indices - wanted.setdefault(key, set())
            if new:
                wanted[key] |= new
                waiting += _steps(self.tensor(*key, sorted(new)))
        return [self.tensor(*key, sorted(indices)) for key, indices in wanted.items()]

    def _merged(self, snapshot: Snapshot, name: str, entry: TensorEntry, indices: Iterable[int]) -> TensorBlame:
        merge = self._merge(snapshot)
        plan, job = merge.plan, merge.jobs[name]
        planned = plan.tensors.get(name)
        setting = plan.settings[job.setting]
        members = (setting.reference, *setting.experts)
        sources = [
            Source(plan.models[member].name, plan.models[member].commit, tensor, plan.models[member].kind)
            for member, tensor in zip(members, job.sources or (name,) * len(members), strict=True)
        ]
        none = (frozenset[int](), frozenset[int]())
        levels = planned.levels if planned else (none,) * len(job.experts)
        fates = ((index, _fate(job, levels, index, entry.blocks[index])) for index in indices)
        return TensorBlame(
            commit=snapshot.commit_id,
            kind="merge",
            name=name,
            entry=entry,
            runs=tuple(_runs(fates)),
            method=plan.method,
            reference=sources[0],
            experts=tuple(sources[1:]),
            based=setting.based,
        )

    def _merge(self, snapshot: Snapshot) -> _Merge:
        commit = snapshot.commit_id
        if commit not in self._merges:
            plan = snapshot.commit.plan
            if plan is None:
                raise NotFoundError(f"merge {commit.short} has no plan, so nothing says what it was made from")
            data = self._store.reader.read_record(Kind.PLAN, plan)
            self._merges[commit] = _Merge(self._store, decode_plan(data, f"plan {plan.short}"))
        return self._merges[commit]

    def _brought(self, commit: Digest, name: str, indices: Iterable[int]) -> dict[int, Digest]:
        """For each block the first commit that had it at this place, going back by what was continued."""
        found: dict[int, Digest] = {}
        waiting = [(commit, list(indices))]
        while waiting:
            digest, left = waiting.pop()
            snapshot = self._snapshot(digest)
            entry = self._entry(snapshot, name)
            for role in ("previous", "base") if snapshot.commit.kind == "ingest" else ():
                parent = snapshot.commit.parent(role)
                before = self._entry(self._snapshot(parent.commit), name) if parent is not None else None
                if parent is None or before is None or entry is None:
                    continue
                shared = {i for i in left if i < len(before.blocks) and before.blocks[i] == entry.blocks[i]}
                if shared:
                    waiting.append((parent.commit, sorted(shared)))
                    left = [index for index in left if index not in shared]
            found.update(dict.fromkeys(left, digest))
        return found

    def _snapshot(self, commit: Digest) -> Snapshot:
        if commit not in self._snapshots:
            self._snapshots[commit] = self._store.snapshot_of(commit)
        return self._snapshots[commit]

    def _entry(self, snapshot: Snapshot, name: str) -> TensorEntry | None:
        """A tensor by its name, reading only the manifest nodes on the way to it."""
        path, leaf = split_name(name)
        digest: Digest | None = snapshot.commit.tree
        for part in path:
            digest = self._node(snapshot, digest).nodes.get(part) if digest is not None else None
        return self._node(snapshot, digest).tensors.get(leaf) if digest is not None else None

    def _node(self, snapshot: Snapshot, digest: Digest) -> Node:
        if digest not in self._nodes:
            self._nodes[digest] = snapshot.node(digest)
        return self._nodes[digest]


def _fate(job: Job, levels: Sequence[tuple[frozenset[int], frozenset[int]]], index: int, block: Digest) -> Fate:
    """What a plan says of one place, beside the block that came out. ``levels``: what is read, and as a preview."""
    own = job.reference.blocks[index]
    theirs = [entry.blocks[index] for entry in job.experts]
    reached = tuple(number for number, (read, _) in enumerate(levels) if index in read)
    coarse = tuple(number for number, (_, previews) in enumerate(levels) if index in previews)
    differing = tuple(n for n, other in enumerate(theirs) if other != own and n not in (*reached, *coarse))
    same = tuple(number for number, other in enumerate(theirs) if other == own)
    merges = job.reference.element_type.has_statistics
    computed = bool(reached or coarse) or block != own
    return Fate(
        origin="computed" if computed else "own",
        reached=reached,
        coarse=coarse,
        left_out=differing if merges else (),
        same=same,
        unmerged=() if merges else differing,
        equals=next((n for n, other in enumerate((own, *theirs)) if other == block), None) if computed else None,
    )


def _runs(fates: Iterable[tuple[int, Fate]]) -> Iterator[Run]:
    first = last = -1
    current: Fate | None = None
    for index, fate in fates:
        if current is not None and (fate != current or index != last + 1):
            yield Run(first, last, current)
            current = None
        if current is None:
            first, current = index, fate
        last = index
    if current is not None:
        yield Run(first, last, current)


def _steps(tensor: TensorBlame) -> Iterator[tuple[_Key, set[int]]]:
    """Which blocks of which other tensors the blocks of this one came from."""
    found: dict[_Key, set[int]] = {}
    for run in tensor.runs:
        fate = run.fate
        if fate.origin == "brought":
            if fate.commit is not None and fate.commit != tensor.commit:
                found.setdefault((fate.commit, tensor.name), set()).update(run.blocks)
            continue
        for source in (tensor.reference, *(tensor.experts[number] for number in (*fate.reached, *fate.coarse))):
            if source is not None and source.kind == "model":
                found.setdefault((source.commit, source.tensor), set()).update(run.blocks)
    yield from found.items()
