"""The cosines between what items of one place add, from their sketches.

A sketch has 64 sums, so the cosine of two is off by about ``(1 - cosine^2) / 8``: one in eight for deltas that have
nothing in common, and nearly nothing for those that are alike or opposed. Read as they are, such cosines would make
order out of noise. So all cosines of a model are looked at together: in ``z = atanh(cosine)`` the noise is the same
everywhere, and the distribution without it is found by expectation and maximization on a grid (the non-parametric
maximum likelihood of Kiefer and Wolfowitz, 1956). A cosine is then what is to be expected where this one was seen: in a
model of unrelated deltas nearly 0 for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.certificate import Item
from mergepipe.store.norms import SKETCH_SIZE

Floats = NDArray[np.float64]
Numbers = NDArray[np.intp]

_LARGEST: Final = 3.5  # of |z|: a cosine of 0.998, past which all count as 1
_CELLS: Final = 141
_GRID: Final = np.linspace(-_LARGEST, _LARGEST, _CELLS)
_PRECISION: Final = SKETCH_SIZE - 3.0  # one over the variance of z (Fisher, 1921)
_ROUNDS: Final = 60
_TINY: Final = 1e-300
_DIGITS: Final = 2.0**16  # cosines are rounded: the last bits of a sum differ between processors, and decide nothing


class Cosines:
    """Of all pairs of items that share a place. ``rows``: their numbers by places, arrays (P, K)."""

    def __init__(self, items: Sequence[Item], rows: Iterable[Numbers]) -> None:
        self._units = _units(items)
        counts = np.zeros(_CELLS)
        for numbers in rows:
            first, second = np.triu_indices(numbers.shape[1], 1)
            for a, b in zip(first, second, strict=True):
                seen = self._raw(numbers[:, a, None], numbers[:, b, None])[:, 0, 0]
                counts += np.bincount(_cells(seen[seen != 0]), minlength=_CELLS)
        self._likely = _expected(counts)

    def at(self, numbers: Numbers) -> Floats:
        """Of items (P, K), (P, K, K): 1 on the diagonal, 0 where a sketch is missing."""
        raw = self._raw(numbers, numbers)
        found = np.where(raw == 0, 0.0, self._likely[_cells(raw)])
        every = np.arange(numbers.shape[1])
        found[:, every, every] = 1.0
        return found

    def _raw(self, ones: Numbers, others: Numbers) -> Floats:
        products = self._units[ones] @ self._units[others].transpose(0, 2, 1)
        return np.asarray(np.round(products.astype(np.float64) * _DIGITS) / _DIGITS)


def _units(items: Sequence[Item]) -> NDArray[np.float32]:
    """Each item's sketch divided by its length, (N, 64); zeros where there is none."""
    units = np.zeros((len(items), SKETCH_SIZE), np.float32)
    for number, item in enumerate(items):
        if item.part is not None:
            length = float(np.linalg.norm(item.part))
            if 0 < length < np.inf:
                units[number] = item.part / length
    return units


def _cells(cosines: Floats) -> Numbers:
    """The nearest cell of the grid."""
    z = np.arctanh(np.clip(cosines, -0.999, 0.999))
    return np.asarray(np.round((np.clip(z, -_LARGEST, _LARGEST) + _LARGEST) * (_CELLS - 1) / (2 * _LARGEST)), np.intp)


def _expected(counts: Floats) -> Floats:
    """For each cell, the cosine to be expected where a sketch's falls into it, (141,)."""
    likelihood = np.exp(-0.5 * _PRECISION * (_GRID[:, None] - _GRID[None, :]) ** 2)
    share = np.full(_CELLS, 1 / _CELLS)
    total = max(float(counts.sum()), 1.0)
    for _ in range(_ROUNDS if counts.any() else 0):
        share *= (counts / np.maximum(likelihood @ share, _TINY)) @ likelihood / total
        share /= share.sum()
    cosines = np.tanh(_GRID)
    cosines[0], cosines[-1] = -1.0, 1.0
    weight = likelihood @ share
    found = np.where(weight > _TINY, (likelihood @ (share * cosines)) / np.maximum(weight, _TINY), cosines)
    return np.asarray(np.round(found * _DIGITS) / _DIGITS)
