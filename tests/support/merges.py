"""Merges in tests: models from arrays, plans in one line, and results as float32."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import Expert, MergeResult, Plan, execute, parse_budget, plan_merge
from mergepipe.merge.build import facts_of, jobs_of_plan
from mergepipe.merge.facts import Facts
from mergepipe.merge.method import Value
from mergepipe.merge.methods import find_method
from mergepipe.store import Digest, Store
from mergepipe.store.frame import Kind
from support.checkpoints import raw, write_checkpoint
from support.family import Weights
from support.stores import object_path, objects_of

Floats = NDArray[np.float32]
Weighted = Mapping[str, float | Mapping[str, float]]
NUMPY = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
METHODS = ("linear", "task_arithmetic", "ties")
FAMILIES = (*METHODS, "dare_linear", "della", "sce", "model_stock", "nuslerp", "karcher")
"""One method at least of each kind that the engine knows: with masks, thresholds, whole rows, passes over all of it."""
USUAL: Mapping[str, Mapping[str, Value]] = {
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "sce": {"select_topk": 0.4},
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.01},
}
"""What is asked of a method where a test does not say: so that it has something to leave out."""


def write_weights(folder: Path, name: str, weights: Weights) -> Path:
    return write_checkpoint(folder / name, {tensor: raw(array) for tensor, array in weights.items()})


def ingest_model(store: Store, folder: Path, name: str, weights: Weights, *, base: str | None = None) -> Digest:
    """Write one model below ``folder`` and ingest it as ``name``; returns its commit."""
    return store.ingest([write_weights(folder, name, weights)], ref=name, base=base)[0].commit


def ingest_family(
    store: Store,
    folder: Path,
    base: Weights,
    experts: Mapping[str, Weights],
    *,
    base_name: str = "base",
    against_base: bool = True,
) -> None:
    """A base, and its experts stored against it or by themselves."""
    ingest_model(store, folder, base_name, base)
    paths = [write_weights(folder, name, weights) for name, weights in experts.items()]
    store.ingest(paths, base=base_name if against_base else None)


def make_plan(
    store: Store,
    method: str,
    experts: Weighted,
    *,
    base: str | None = "base",
    budget: str | None = None,
    max_error: float | None = None,
    dtype: str | None = None,
    **parameters: Any,
) -> Plan:
    """A plan; experts as ``{"math": 0.6}`` or ``{"math": {"weight": 0.6, "density": 0.2}}``.

    A weight is left out where the method has none.
    """
    weighted = any(parameter.name == "weight" for parameter in find_method(method).parameters)
    named = [
        Expert(name, ({"weight": own} if weighted else {}) if isinstance(own, int | float) else own)
        for name, own in experts.items()
    ]
    parameters = {**USUAL.get(method, {}), **parameters}
    return plan_merge(
        store, base, named, method, parameters=parameters, budget=parse_budget(budget, max_error), dtype=dtype
    )


def merge(store: Store, method: str, experts: Weighted, ref: str = "merged", **options: Any) -> MergeResult:
    """Plan and execute at once, every block computed; ``options`` are those of :func:`make_plan`."""
    return execute(store, make_plan(store, method, experts, **options), ref, use_cache=False)


def facts_of_refs(store: Store, method: str, experts: list[str], base: str = "base", *, bounded: bool = True) -> Facts:
    """What the planner knows of models."""
    plan = make_plan(store, method, dict.fromkeys(experts, 1.0), base=base)
    models, jobs = jobs_of_plan(store, plan)
    return facts_of(store, models, jobs, plan.settings, find_method(method), bounded=bounded)


def assert_as_planned(plan: Plan, result: MergeResult) -> None:
    """Nothing came from the cache, and the reader and the writer counted what the plan says."""
    assert result.expert_bytes_read == plan.costs.expert_bytes
    assert result.base_bytes_read == plan.costs.base_bytes
    assert result.computed_blocks == plan.costs.computed_blocks
    assert result.referenced_blocks == plan.costs.referenced_blocks
    assert result.cached_blocks == 0
    assert result.budget_bytes == plan.budget_bytes
    assert plan.budget_bytes is None or result.expert_bytes_read <= plan.budget_bytes


def tree_of(store: Store, ref: str) -> Digest:
    return store.commit(store.resolve(ref)).tree


def weights_of(store: Store, ref: str) -> Weights:
    """All tensors of a commit as NumPy has them."""
    snapshot = store.snapshot(ref)
    return {
        name: snapshot.read_tensor(name).view(NUMPY[entry.dtype]).reshape(entry.shape)
        if entry.dtype in NUMPY
        else snapshot.read_tensor(name)
        for name, entry in snapshot.tensors.items()
    }


def bits(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def blocks_of(store: Store, ref: str) -> dict[str, tuple[Digest, ...]]:
    """The block ids of every tensor of a commit."""
    return {name: entry.blocks for name, entry in store.snapshot(ref).tensors.items()}


def without_weights(store: Store, keep: Container[Digest] = ()) -> int:
    """Delete every block's file but those to ``keep``, so that reading one fails; returns how many went."""
    gone = [digest for digest in objects_of(store, Kind.BLOCK) if digest not in keep]
    for digest in gone:
        object_path(store, digest).unlink()
    return len(gone)
