"""Memory does not grow with the model: a tensor is never held whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergepipe.store.dtypes import DTYPES
from mergepipe.store.safetensors_file import build_header
from support.processes import run_python

CODE = """
    import json, resource, sys
    from pathlib import Path
    from mergepipe.store import Store
    import mergepipe.store.ingest, mergepipe.store.export

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    folder, small, large = (Path(text) for text in sys.argv[1:])
    with Store.create(folder / "store", block_bytes=1 << 18) as store:
        found = {}
        for path in (small, large):
            store.ingest([path / "base"], ref=f"{path.name}/base", workers=2)
            store.ingest([path / "tuned"], ref=f"{path.name}/tuned", base=f"{path.name}/base", workers=2)
            store.snapshot(f"{path.name}/tuned").export(folder / f"out-{path.name}", workers=2)
            found[path.name] = peak()
        print(json.dumps(found))
"""


def write(path: Path, megabytes: int, seed: int) -> None:
    """One tensor of random bits; ``tuned`` differs from ``base`` in all blocks."""
    import numpy as np

    path.mkdir(parents=True)
    rows = megabytes << 20 >> 11
    with (path / "model.safetensors").open("wb") as file:
        file.write(build_header([("w", DTYPES["BF16"], (rows, 1024))], {}).raw)
        generator = np.random.default_rng(0)
        change = np.random.default_rng(seed)
        for _ in range(megabytes):
            block = generator.integers(0, 1 << 16, 1 << 19, np.uint16)
            file.write((block + change.integers(0, 3, block.size, np.uint16) if seed else block).tobytes())


@pytest.mark.parametrize("megabytes", [96])
def test_the_peak_is_far_below_the_model(tmp_path: Path, megabytes: int) -> None:
    import json

    for name, size in (("small", 8), ("large", megabytes)):
        write(tmp_path / name / "base", size, 0)
        write(tmp_path / name / "tuned", size, 1)
    peaks = json.loads(run_python(CODE, tmp_path, tmp_path / "small", tmp_path / "large"))
    # Whatever the process itself takes, a model twelve times as large takes no more than a third of the difference.
    grown = peaks["large"] - peaks["small"]
    assert grown < (megabytes - 8 << 20) / 3, f"{grown >> 20} MiB more for {megabytes - 8} MiB more of weights"
