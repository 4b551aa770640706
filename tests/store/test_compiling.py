"""Machine code that was kept is loaded without preparing the compiler; what was not kept is compiled all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergepipe.store import compiling
from support.processes import run_python

MODULE = """
import numpy as np
from mergepipe.store.compiling import compile_cached

@compile_cached
def doubled(source, out):
    work = np.zeros(2, np.float64)
    for i in range(source.size):
        work[i & 1] += source[i]
        out[i] = 2 * source[i]
    return work[0] + work[1]

def by(source, out, divisor):
    whole = doubled(source, out)
    for i in range(out.size):
        out[i] = out[i] / divisor
    return whole

by = compile_cached(by, error_model="numpy")
"""
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import kept

def prepared():
    return "numba.np.linalg" in sys.modules

source, out = np.arange(5.0), np.empty(5)
"""


def use(folder: Path, code: str, **environment: str) -> None:
    run_python(USE + code, folder, NUMBA_CACHE_DIR=str(folder / "cache"), **environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kept.py").write_text(MODULE, encoding="utf-8")
    use(tmp_path, "assert kept.doubled(source, out) == 10 and not kept.doubled.stats.cache_hits; assert prepared()")
    return tmp_path


@pytest.mark.skipif(not compiling.QUICK, reason="a release of numba that is not known from within")
def test_loading_prepares_no_compiler_and_compiling_still_does(folder: Path) -> None:
    use(
        folder,
        """
assert kept.doubled(source, out) == 10
assert out.tolist() == [0, 2, 4, 6, 8]
assert kept.doubled.stats.cache_hits and not prepared()
assert kept.by(source, out, 0.0) == 10  # compiled now, with what was loaded
assert np.isnan(out[0]) and out[1] == np.inf
assert kept.by.stats.cache_misses and prepared()
assert kept.doubled(source.astype(np.float32), out) == 10
""",
    )
    use(folder, "assert kept.by(source, out, 2.0) == 10 and out.tolist() == source.tolist() and not prepared()")


def test_what_no_cache_can_keep_is_compiled_all_the_same(tmp_path: Path) -> None:
    """A function that no file holds has no place in any cache."""
    made = """
exec("def tripled(x): return 3 * x")
from mergepipe.store.compiling import compile_cached
compiled = compile_cached(tripled)
assert compiled(2) == 6 and compiled.signatures and compiled.stats.cache_path is None
"""
    run_python(made, NUMBA_CACHE_DIR=str(tmp_path))


def test_other_releases_of_numba_load_as_they_do(folder: Path) -> None:
    other = """
from importlib import reload
from mergepipe.store import compiling
compiling.QUICK = False
reload(kept)
assert kept.doubled(source, out) == 10 and out.tolist() == [0, 2, 4, 6, 8]
assert kept.doubled.stats.cache_hits and prepared()
"""
    use(folder, other)
