"""Ctrl-C and SIGTERM: the command stops soon, says so, and leaves the store as it was."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from mergepipe.store import Store
from support.checkpoints import random_tensor, write_safetensors
from support.processes import start_python
from support.stores import state_of, writers_left

# Every block takes a while, so that there is time to press Ctrl-C in the middle of the work.
SLOWLY = """
    import sys, time
    from mergepipe.store.ingest_blocks import BlockPipeline
    real = BlockPipeline._block
    def slow(*arguments):
        time.sleep(0.02)
        real(*arguments)
    BlockPipeline._block = slow
    from mergepipe.cli.app import main
    sys.exit(main(sys.argv[1:]))
"""
# Ctrl-C comes while the catalog is being written: too late.
TOO_LATE = """
    import os, signal, sys
    from mergepipe.store.catalog import Catalog
    real = Catalog.write
    def write(self, change):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, change)
    Catalog.write = write
    from mergepipe.cli.app import main
    sys.exit(main(sys.argv[1:]))
"""


def wait_for_writer(process: subprocess.Popen[str], store: Path) -> None:
    """Until the command has staged some objects."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if sum(1 for path in (store / "tmp").glob("*/*") if path.name != "lease.json") >= 5:
            return
        time.sleep(0.01)
    output, errors = process.communicate(timeout=10)
    pytest.fail(f"the command wrote nothing: {output}{errors}")


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "error: stopped; the store is as it was\n"), (signal.SIGTERM, 143, "")],
)
def test_ingest_stops(filled: Path, number: signal.Signals, code: int, message: str) -> None:
    big = {f"tensor{i}": random_tensor("BF16", (256, 256), i) for i in range(20)}
    path = write_safetensors(filled / "big.safetensors", big)
    with Store.open(filled) as store:
        before = state_of(store)
        process = start_python(SLOWLY, "ingest", path, "--store", filled)
        wait_for_writer(process, filled / ".mp")
        process.send_signal(number)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 5
        assert (process.returncode, errors) == (code, message)
        assert state_of(store) == before
        assert writers_left(store) == []


def test_pressing_it_again_does_not_disturb_the_cleaning_up(filled: Path) -> None:
    big = {f"tensor{i}": random_tensor("BF16", (256, 256), i) for i in range(20)}
    path = write_safetensors(filled / "big.safetensors", big)
    process = start_python(SLOWLY, "ingest", path, "--store", filled, "--json")
    wait_for_writer(process, filled / ".mp")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
    assert '"error": "interrupted"' in errors
    assert "Traceback" not in errors
    with Store.open(filled) as store:
        assert writers_left(store) == []


def test_too_late(filled: Path) -> None:
    path = write_safetensors(filled / "small.safetensors", {"x": random_tensor("BF16", (4, 4))})
    process = start_python(TOO_LATE, "ingest", path, "--store", filled)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("small  ")
    with Store.open(filled) as store:
        store.snapshot("small")


def test_export_stops(filled: Path) -> None:
    code = """
        import sys, time
        import mergepipe.store.export as export
        real = export._copy_block
        def slow(*arguments):
            time.sleep(0.05)
            real(*arguments)
        export._copy_block = slow
        from mergepipe.cli.app import main
        sys.exit(main(sys.argv[1:]))
    """
    process = start_python(code, "export", "base", filled / "out", "--store", filled)
    deadline = time.monotonic() + 60
    while not list(filled.glob(".out.*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "error: stopped; the store is as it was\n")
    assert sorted(path.name for path in filled.iterdir()) == [".mp"]
