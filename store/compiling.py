"""Compiling the inner loops, and loading their machine code again without making a compiler ready.

Before numba looks into its cache it prepares for compiling whatever it could be asked for: it imports its support for
all of numpy, and scipy. That took half of the time in which a process was ready to merge. :class:`_MachineCode` leaves
it until something has to be compiled; what machine code itself needs is there before (the helpers that it calls, when
a context is made; the runtime, by ``initialize``).

That is numba's inside, so it is done only with releases that were looked into. Others work as numba has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys

_OLDEST, _NEWEST = (0, 65), (0, 68)
QUICK: Final[bool] = _OLDEST <= numba.version_info.short <= _NEWEST


class _MachineCode(FunctionCache):
    """numba's cache of one function. A miss is compiled as ever: the compiler prepares itself."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)  # type: ignore[no-untyped-call]  # numba has no types here


def compile_cached(function: Callable[..., Any], **options: Any) -> Any:
    """Compile on first use, release the GIL, keep the machine code in a cache where one can be written.

    ``options`` are those of ``numba.njit``.
    """
    dispatcher = njit(nogil=True, **options)(function)
    try:
        if QUICK:
            dispatcher._cache = _MachineCode(function)  # type: ignore[no-untyped-call]  # nor here
        else:
            dispatcher.enable_caching()
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        pass
    return dispatcher
