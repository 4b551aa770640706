"""Time `mp export` of an expert and of the base against `cp -r` and `sync` of the checkpoint that came in.

    python bench/export.py --preset qwen3-0.6b --experts 1 --rounds 3

Once for each, the exported files are compared with the input's, byte by byte.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
from pathlib import Path

from harness import (
    MP,
    BenchError,
    Goal,
    Run,
    Side,
    alternate,
    copy_command,
    drop_page_cache,
    folder_bytes,
    format_bytes,
    median_seconds,
    peak_bytes,
    print_goals,
    print_runs,
    remove,
    write_report,
)
from setting import fill_store, parser, run_bench, take_family


def check_identical(source: Path, target: Path) -> None:
    """BenchError unless both folders hold the same files with the same bytes."""
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    if names != found:
        raise BenchError(f"{target}: files differ from the input's: {sorted(names ^ found)}")
    _, different, unreadable = filecmp.cmpfiles(source, target, sorted(names), shallow=False)
    if different or unreadable:
        raise BenchError(f"{target}: bytes differ from the input's in {different + unreadable}")


class _Checker:
    """Compares the first export of a checkpoint, and only that one."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target, self.done = source, target, False

    def __call__(self, _: Run) -> None:
        if not self.done:
            check_identical(self.source, self.target)
            self.done = True


def _sides(source: Path, store: Path) -> list[Side]:
    name, target = source.name, store / "out"
    export = Side(
        f"mp export {name}",
        [(MP, "export", name, target)],
        store,
        inspect=_Checker(source, target),
        cleanup=lambda: remove(target),
    )
    copying = Side(f"cp + sync {name}", [copy_command(source, target)], store, cleanup=lambda: remove(target))
    return [export, copying]


def _bench(args: argparse.Namespace, work: Path) -> None:
    family = take_family(args, work)
    store = work / "store"
    print("ingesting it", file=sys.stderr)
    fill_store(store, family, args.block_size)
    warmth = "dropped" if drop_page_cache() else "warm"
    all_runs, goals = {}, []
    print(f"\npage cache: {warmth}\n")
    for source in (family.experts[0], family.base):
        runs = alternate(_sides(source, store), args.rounds)
        mp, cp = runs[f"mp export {source.name}"], runs[f"cp + sync {source.name}"]
        ratio = median_seconds(mp) / median_seconds(cp)
        goals += [
            Goal(f"{source.name}: seconds, to cp + sync", ratio, 1.3, "x"),
            Goal(f"{source.name}: peak memory", peak_bytes(mp) / 1e6, 500, " MB"),
        ]
        print(f"\n{source.name}, {format_bytes(folder_bytes(source))}: every file identical to the input's")
        print_runs(runs, f"cp + sync {source.name}")
        all_runs.update(runs)
    print()
    print_goals(goals)
    facts = {
        "preset": None if args.family else args.preset,
        "block_size": args.block_size,
        "page_cache": warmth,
        "checkpoint_bytes": folder_bytes(family.base),
    }
    print(f"\nwrote {write_report('export', facts, all_runs, goals)}")


if __name__ == "__main__":
    sys.exit(run_bench(parser(__doc__, "qwen3-0.6b", 1, 3).parse_args(), _bench))
