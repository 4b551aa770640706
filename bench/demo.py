"""The main job on an embedded default, as `make demo` runs it: each step echoes the `mp` command that it ran.

A small family (a base, and experts for math, code and chat) is made in a temporary folder, ingested, merged
under a budget, and exported; the exports are checked. Exits with 1 where a step fails.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from family import Expert, make_family
from shapes import PRESETS

MP = Path(sys.executable).with_name("mp")

# Deltas differ in size by tensor, and chat touches only the upper layers: as real fine-tunes, more or less.
EXPERTS = (
    Expert("math", 2.4e-4, spread=0.8),
    Expert("code", 2.4e-4, spread=0.8),
    Expert("chat", 1.5e-4, layers=frozenset({2, 3}), spread=0.8),
)


class StepFailedError(Exception):
    """A step of the demo did not do what it should."""


def _paint(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def _say(text: str) -> None:
    print(f"\n{_paint('# ' + text, '2')}", flush=True)


def _echo(command: str) -> None:
    print(_paint(f"$ {command}", "1;36"), flush=True)


class Demo:
    """Runs `mp` in the demo's folder, telling the reader what and why."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("MP_")}

    def mp(self, why: str, *words: str) -> None:
        """One command; its output goes to the terminal. StepFailedError where it fails."""
        _say(why)
        _echo(shlex.join(["mp", *words]))
        code = subprocess.run([MP, *words], cwd=self.folder, env=self.environment, check=False).returncode
        if code != 0:
            raise StepFailedError(f"mp {words[0]} ended with exit code {code}")

    def mp_json(self, why: str, *words: str) -> dict[str, object]:
        """One command with --json: shown, and returned."""
        _say(why)
        words = (*words, "--json")
        _echo(shlex.join(["mp", *words]))
        done = subprocess.run(
            [MP, *words],
            cwd=self.folder,
            env=self.environment,
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            raise StepFailedError(f"mp {words[0]} ended with exit code {done.returncode}")
        answer = json.loads(done.stdout)
        if not isinstance(answer, dict):
            raise StepFailedError(f"mp {words[0]} --json did not answer with an object")
        return answer


def _ingest(demo: Demo) -> None:
    demo.mp("A store is one folder, .mp/, beside your work.", "init")
    demo.mp(
        "The base goes in first: blocks named by their hash, and every other file of the folder.",
        "ingest",
        "base",
    )
    demo.mp(
        "The experts go in as differences from the base; what they share with it is stored once.",
        *("ingest", "math", "code", "chat", "--base", "base"),
    )
    demo.mp("What the store holds now.", "ls")


def _merge(demo: Demo) -> None:
    experts = ("--expert", "math:0.5", "--expert", "code:0.3", "--expert", "chat:0.2")
    demo.mp(
        "A plan says beforehand what a merge will read: here half of the experts' bytes.",
        *("plan", "--base", "base", *experts, "--method", "ties", "--density", "0.3"),
        *("--budget", "50%", "-o", "p.json"),
    )
    demo.mp("The merge reads what the plan says, and no more.", "merge", "--plan", "p.json", "--as", "merged/v1")
    again = demo.mp_json(
        "The same merge again: every block is known by its recipe, so no expert is read.",
        *("merge", "--plan", "p.json", "--as", "merged/v1"),
    )
    if again["expert_bytes_read"] != 0 or again["computed_blocks"] != 0:
        raise StepFailedError("the second merge should have found every block in the cache")


def _look(demo: Demo) -> None:
    demo.mp("Where it came from.", "log", "merged/v1", "--graph")
    demo.mp("What it changed in the base.", "diff", "base", "merged/v1")
    demo.mp("What it all takes on disk, and what each ref alone holds.", "du")
    demo.mp("Every byte in the store is checked against its hash.", "verify")


def _check_merged(base: Path, out: Path) -> None:
    """The export loads with safetensors, has the base's tensors, and every value is finite."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return found

    before, after = tensors(base), tensors(out)
    if {n: (t.shape, t.dtype) for n, t in before.items()} != {n: (t.shape, t.dtype) for n, t in after.items()}:
        raise StepFailedError(f"{out.name}: names, shapes or dtypes differ from the base's")
    strange = [name for name, tensor in after.items() if not bool(torch.isfinite(tensor).all())]
    if strange:
        raise StepFailedError(f"{out.name}: not finite: {', '.join(strange)}")
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    print(
        f"loaded {len(after)} tensors with safetensors: all finite, {changed} differ from the base's",
        flush=True,
    )


def _check_identical(source: Path, target: Path) -> None:
    names = sorted(path.name for path in source.iterdir())
    if names != sorted(path.name for path in target.iterdir()):
        raise StepFailedError(f"{target.name}: not the files that went in")
    _, different, unreadable = filecmp.cmpfiles(source, target, names, shallow=False)
    if different or unreadable:
        raise StepFailedError(f"{target.name}: differs from what went in: {different + unreadable}")
    print(f"{len(names)} files, each identical to the one that went in", flush=True)


def _export(demo: Demo) -> None:
    demo.mp("Out again as ordinary safetensors, which transformers loads.", "export", "merged/v1", "out")
    _check_merged(demo.folder / "base", demo.folder / "out")
    demo.mp("What came in comes out, byte for byte.", "export", "math", "math-again")
    _check_identical(demo.folder / "math", demo.folder / "math-again")


def run(folder: Path) -> None:
    """All steps in `folder`; StepFailedError at the first that fails."""
    if not MP.exists():
        raise StepFailedError(f"{MP} is not there: run `make setup` first")
    _say("A small family to play with: a base and three experts, sharded, bf16 (random weights).")
    for path in make_family(folder, PRESETS["tiny"], EXPERTS, seed=0):
        print(f"{path.name}/  {', '.join(sorted(file.name for file in path.iterdir()))}", flush=True)
    demo = Demo(folder)
    for step in (_ingest, _merge, _look, _export):
        step(demo)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run MergePipe's main job on a small made-up family.")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR (new or empty), and leave it")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    start = time.perf_counter()
    try:
        if args.keep is not None:
            run(args.keep.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="mergepipe-demo-") as folder:
                run(Path(folder))
    except (StepFailedError, OSError) as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    where = f"Its folder is {args.keep}." if args.keep else "`make demo KEEP=DIR` keeps its folder."
    print(f"\nAll of it worked, in {time.perf_counter() - start:.0f} s. {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
