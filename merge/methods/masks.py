"""Random masks that depend on the seed, the tensor, the expert and the element's index alone.

Nothing is drawn in an order: an element's bits are a hash of its index, so a mask is the same for every cut into tiles
and blocks, for every number of threads, and for every order of the experts.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.method import Parameter, Problem
from mergepipe.merge.mix import ALWAYS

SEED: Final = Parameter("seed", 0, "another number gives another mask", minimum=0.0, maximum=2.0**53, whole=True)
_BITS: Final = (1 << 64) - 1


def mask_keys(problem: Problem) -> NDArray[Any]:
    """A key for each expert's mask, (K,) uint64."""
    seed = _mixed(int(problem.number("seed")) + 1)
    return np.array([_mixed(key ^ seed) for key in problem.keys], np.uint64)


def chances(densities: NDArray[np.float64]) -> NDArray[Any]:
    """Probabilities as the kernels compare them: of 2**31, uint32."""
    return np.asarray(np.rint(densities * ALWAYS).astype(np.uint32))


def _mixed(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    z = value & _BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
    return z ^ (z >> 31)
