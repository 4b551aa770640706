"""What the benches of `mp` share: their options, the family that they run on, and a store to run in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import MP, ROOT, BenchError, drop_page_cache, run_command, workspace


@dataclass(frozen=True, slots=True)
class Family:
    """A base and its experts on disk."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def experts(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and path.name != "base")


def parser(description: str | None, preset: str, experts: int, rounds: int) -> argparse.ArgumentParser:
    """The options that every bench has."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--preset", default=preset, help=f"shape of the family ({preset})")
    options.add_argument("--experts", type=int, default=experts, help=f"how many experts ({experts})")
    options.add_argument("--rounds", type=int, default=rounds, help=f"turns of each side ({rounds})")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--family", type=Path, help="take this family (base/ and expert folders)")
    options.add_argument("--block-size", help="passed on to `mp init`")
    options.add_argument("--workdir", type=Path, help="where to put temporary files (build/)")
    options.add_argument("--keep", action="store_true", help="leave the temporary files")
    return options


def take_family(args: argparse.Namespace, work: Path) -> Family:
    """The family given by --family, or one made under `work`."""
    if args.family is not None:
        family = Family(args.family.resolve())
        if not family.base.is_dir():
            raise BenchError(f"{family.base} is not there: --family takes what bench/family.py wrote")
        return family
    print(f"making a family: {args.preset}, {args.experts} experts", file=sys.stderr)
    script = ROOT / "bench" / "family.py"
    options = ("--preset", args.preset, "--experts", str(args.experts), "--seed", str(args.seed))
    run_command((sys.executable, script, work / "family", *options), work)
    return Family(work / "family")


def make_store(folder: Path, block_size: str | None) -> None:
    """An empty store in `folder/.mp`; `mp` run from there finds it."""
    folder.mkdir(parents=True)
    options = ("--block-size", block_size) if block_size else ()
    run_command((MP, "init", *options), folder)


def ingest_commands(family: Family) -> list[Sequence[str | Path]]:
    """The base, then all experts as deltas against it."""
    return [
        (MP, "ingest", family.base, "--ref", "base", "--json"),
        (MP, "ingest", *family.experts, "--base", "base", "--json"),
    ]


def fill_store(folder: Path, family: Family, block_size: str | None) -> None:
    """A store in `folder` that holds the family, each member under its folder's name."""
    make_store(folder, block_size)
    for command in ingest_commands(family):
        run_command(command, folder)


def run_bench(args: argparse.Namespace, bench: Callable[[argparse.Namespace, Path], None]) -> int:
    """Run a bench in a folder of its own; returns the exit code."""
    try:
        with workspace(args.keep, args.workdir) as work:
            if not drop_page_cache():
                print("the page cache cannot be dropped by this user: runs are warm", file=sys.stderr)
            bench(args, work)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0
