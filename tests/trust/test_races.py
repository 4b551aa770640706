"""Many processes and one store: nothing that was acknowledged is lost, and every loser has a clear error."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mergepipe.store import Store
from mergepipe.store.gc import collect
from support.checkpoints import folder_bytes
from support.covered import count
from support.model import BLOCK_BYTES, move_ref, write_variants
from support.processes import start_python
from support.stores import assert_clean

MP = Path(sys.executable).with_name("mp")
EVERYTHING_DENIED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def load_soak() -> ModuleType:
    """``soak.py``, which is a program."""
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).with_name("soak.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


def test_anything_at_once(tmp_path: Path, deep: bool) -> None:
    """Four processes that ingest, merge, collect, repack, verify, export, and fight for one ref."""
    run = load_soak().Soak(tmp_path, 4, seed=3, operations=200 if deep else 15)
    for number in range(4):
        run.start(number)
    for number in range(4):
        run.end(number, None, 0)
    assert run.finish() == []
    found = run.summary()
    count(processes=4, operations=found["operations"])
    assert found["operations"] > 30


def test_experts_that_come_at_once(tmp_path: Path) -> None:
    base, *experts = write_variants(tmp_path)
    with Store.create(tmp_path / ".mp", block_bytes=BLOCK_BYTES) as store:
        store.ingest([base], ref="base")
        code = """
            import sys
            from mergepipe.store import Store
            import mergepipe.store.ingest
            with Store.open(sys.argv[1]) as store:
                print("ready", flush=True)
                sys.stdin.readline()
                store.ingest([sys.argv[2]], base="base", previews=True)
        """
        children = [start_python(code, store.layout.root, path) for path in experts]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            _, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors
        for path in experts:
            store.snapshot(path.name).export(tmp_path / "out" / path.name)
            assert folder_bytes(tmp_path / "out" / path.name) == folder_bytes(path)
        assert_clean(store)


def test_a_reader_whose_ref_goes_away(tmp_path: Path, deep: bool) -> None:
    """It gets all of the bytes, or is told that the commit is gone; never that the store is damaged."""
    base, *experts = write_variants(tmp_path)
    with Store.create(tmp_path / ".mp", block_bytes=BLOCK_BYTES) as store:
        store.ingest([base], ref="base")
        reader = start_python(
            """
            import shutil, sys, time
            from pathlib import Path
            from mergepipe.store import Store
            from mergepipe.store.errors import MergePipeError, NotFoundError
            import mergepipe.store.export
            out, began, said = Path(sys.argv[2]), 0, []
            with Store.open(sys.argv[1]) as store:
                print("ready", flush=True)
                sys.stdin.readline()
                while began < int(sys.argv[3]):
                    try:
                        snapshot = store.snapshot("r")
                        began += 1
                        snapshot.export(out)
                        said.append(f"read {(out / 'model.safetensors').stat().st_size}")
                    except MergePipeError as error:
                        if not isinstance(error, NotFoundError) or "no ref" not in error.message:
                            said.append(f"told {error.kind} {'with' if error.hint else 'without'} {error.message}")
                        time.sleep(0.001)
                    shutil.rmtree(out, ignore_errors=True)
            print("\\n".join(said))
            """,
            store.layout.root, tmp_path / "out", 500 if deep else 40,
        )  # fmt: skip
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
        turns = 0
        while reader.poll() is None:
            (found,) = store.ingest([experts[turns % len(experts)]], ref="r", base="base")
            move_ref(store, "r", found.commit, None)
            collect(store, apply=True, grace_seconds=0)
            turns += 1
        output, errors = reader.communicate(timeout=120)
        assert reader.returncode == 0, errors
        lines = output.splitlines()
        told = [line.split(maxsplit=3) for line in lines if line.startswith("told")]
        print(f"\n{len(lines) - len(told)} read, {len(told)} told, while the ref went {turns} times")
        assert {tuple(line[1:3]) for line in told} <= {("not_found", "with"), ("conflict", "with")}, told[:5]
        sizes = {path.joinpath("model.safetensors").stat().st_size for path in experts}
        assert {int(line.split()[1]) for line in lines if line.startswith("read")} <= sizes
        assert_clean(store)


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """A store that may not be written, and how to start a process that may not; skipped where there is no way."""
    words: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everything, and setpriv is not there to take that away")
        words = EVERYTHING_DENIED
    root = tmp_path / ".mp"
    with Store.create(root, block_bytes=BLOCK_BYTES) as store:
        base, expert = write_variants(tmp_path, 2)
        store.ingest([base], ref="base")
        store.ingest([expert], ref="expert", base="base", previews=True)
    every = [root, *root.rglob("*")]
    for path in every:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    if subprocess.run([*words, "touch", root / "tmp" / "x"], capture_output=True, check=False).returncode == 0:
        pytest.skip("nothing keeps this process from writing")
    yield tmp_path, words
    for path in every:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


@pytest.mark.parametrize("command", ["ls", "ls expert", "log", "show expert", "verify", "du", "diff base expert"])
def test_a_store_that_cannot_be_written_can_be_read(unwritable: tuple[Path, list[str]], command: str) -> None:
    folder, words = unwritable
    done = call(folder, words, *command.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr


def test_a_store_that_cannot_be_written_can_be_exported(unwritable: tuple[Path, list[str]]) -> None:
    folder, words = unwritable
    done = call(folder, words, "export", "expert", folder / "out")
    assert done.returncode == 0, done.stderr
    assert folder_bytes(folder / "out") == folder_bytes(folder / "v1")
    refused = call(folder, words, "ingest", folder / "v1", "--ref", "other")
    assert refused.returncode == 8, refused.stderr
    assert "Traceback" not in refused.stderr


def call(folder: Path, words: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words, MP, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
