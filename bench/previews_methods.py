"""Why methods that trim deltas or let them vote read exact blocks: their results on previews, against those on deltas.

All previews take the place of all deltas; a block without one is taken as it is. Thresholds are those of the exact
deltas, as a catalog's histograms would give them. Weights are 1. Each method is written down here in its plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.store import Store
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.objects import ObjectReader
from mergepipe.store.previews import LEAST_ELEMENTS, content_size, find_preview, read_preview

Floats = NDArray[np.float32]
Rule = Callable[[list[Floats]], Floats]

DENSITIES: Final = (0.2, 0.5, 0.9)
OUTLIERS: Final = 0.01  # the largest magnitudes, which breadcrumbs drops


@dataclass(frozen=True, slots=True)
class Swap:
    """A method's relative deviation where previews are in place of deltas: trimmed as these are, and not trimmed."""

    name: str
    trimmed: float
    untrimmed: float


def consensus(deltas: Sequence[Floats]) -> Floats:
    """TIES: the mean, for each element, of those that have the sign of the sum."""
    sign = np.sign(sum(deltas))
    agreed = [np.sign(delta) == sign for delta in deltas]
    total = sum(np.where(agree, delta, 0) for agree, delta in zip(agreed, deltas, strict=True))
    count = sum((agree & (delta != 0)).astype(np.float32) for agree, delta in zip(agreed, deltas, strict=True))
    return np.asarray(total / np.maximum(count, 1), np.float32)


def total(deltas: Sequence[Floats]) -> Floats:
    return np.asarray(sum(deltas), np.float32)


def reach(delta: Floats, density: float) -> float:
    """The smallest of the ``density`` largest magnitudes."""
    kept = max(1, int(density * delta.size))
    return float(np.partition(np.abs(delta), -kept)[-kept])


def trim(delta: Floats, least: float, most: float = math.inf) -> Floats:
    size = np.abs(delta)
    return np.where((size >= least) & (size < most), delta, np.float32(0))


class _Sums:
    """Squared distances and lengths, by the row of the table."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}

    def add(self, name: str, exact: Floats, trimmed: Floats, untrimmed: Floats) -> None:
        row = self.rows.setdefault(name, [0.0, 0.0, 0.0])
        for place, off in enumerate((trimmed - exact, untrimmed - exact, exact)):
            row[place] += float(np.square(off, dtype=np.float64).sum())

    def swaps(self) -> list[Swap]:
        return [Swap(name, math.sqrt(a / c), math.sqrt(b / c)) for name, (a, b, c) in self.rows.items() if c]


def swaps(store: Store, experts: Sequence[str]) -> list[Swap]:
    """All methods over all tensors that have previews."""
    sums = _Sums()
    for deltas, coarse in _pairs(store, experts):
        sums.add("task arithmetic", total(deltas), total(coarse), total(coarse))
        for density in DENSITIES:
            least = [reach(delta, density) for delta in deltas]
            exact, cut = ([trim(d, t) for d, t in zip(found, least, strict=True)] for found in (deltas, coarse))
            sums.add(f"ties, density {density}", consensus(exact), consensus(cut), consensus(coarse))
            sums.add(f"trimmed sum, density {density}", total(exact), total(cut), total(coarse))
        most = [reach(delta, OUTLIERS) for delta in deltas]
        least = [reach(delta, min(1.0, 0.9 + OUTLIERS)) for delta in deltas]
        exact, cut = ([trim(*each) for each in zip(found, least, most, strict=True)] for found in (deltas, coarse))
        sums.add("breadcrumbs, density 0.9, gamma 0.01", total(exact), total(cut), total(coarse))
    return sorted(sums.swaps(), key=lambda swap: swap.name.partition(",")[0] != "task arithmetic")


def _pairs(store: Store, experts: Sequence[str]) -> Iterator[tuple[list[Floats], list[Floats]]]:
    """Tensor by tensor, all experts' deltas and what their previews hold."""
    base, others = store.snapshot("base"), [store.snapshot(name) for name in experts]
    for name, entry in base.tensors.items():
        own = [other.tensors[name] for other in others]
        if math.prod(entry.shape) < LEAST_ELEMENTS or all(other.blocks == entry.blocks for other in own):
            continue
        before = _floats(base, name)
        deltas = [_floats(other, name) - before for other in others]
        yield deltas, [_coarse(store, entry, mine, delta) for mine, delta in zip(own, deltas, strict=True)]


def _floats(snapshot: Any, name: str) -> Floats:
    return np.asarray(snapshot.tensor(name).float().numpy().ravel(), np.float32)


def _coarse(store: Store, base: TensorEntry, expert: TensorEntry, delta: Floats) -> Floats:
    """The delta, with the previews' content wherever there is one."""
    found, reader = delta.copy(), ObjectReader(store.layout)
    with store.catalog.reading() as view:
        rows = [find_preview(view, *pair) for pair in zip(base.blocks, expert.blocks, strict=True)]
    for index, row in enumerate(rows):
        if row is None:
            continue
        first, size = (part * 8 // base.element_type.bits for part in base.block_span(index))
        content = np.empty(content_size(size), np.uint8)
        reader.read_block(row.id, content)
        read_preview(content).delta_into(0, found[first : first + size])
    return found
