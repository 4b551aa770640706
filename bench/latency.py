"""Time what should answer at once: `mp log`, `mp ls`, `mp show` and `mp --help`, process start included.

    python bench/latency.py                          # a store made with a tiny family
    python bench/latency.py --store DIR --ref NAME   # a store that is there: DIR holds .mp/

The page cache stays warm here: it is what someone sees who types one command after another.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import MP, Goal, Side, alternate, median_seconds, print_goals, print_runs, write_report
from setting import fill_store, parser, run_bench, take_family

GOAL_SECONDS = 0.3


def _bench(args: argparse.Namespace, work: Path) -> None:
    if args.store is None:
        folder = work / "store"
        fill_store(folder, take_family(args, work), args.block_size)
    else:
        folder = args.store.resolve()
    commands = {
        "mp --help": ("--help",),
        "mp log": ("log", args.ref),
        "mp ls": ("ls",),
        "mp show": ("show", args.ref),
        "python -c pass": (),
    }
    sides = [
        Side(name, [(MP, *words) if words else (sys.executable, "-c", "pass")], folder)
        for name, words in commands.items()
    ]
    alternate(sides, 1, cold=False)  # compiles what is new, and warms the cache
    runs = alternate(sides, args.rounds, cold=False)
    goals = [
        Goal(f"{name}, median", median_seconds(each), GOAL_SECONDS, " s")
        for name, each in runs.items()
        if name != "python -c pass"
    ]
    print()
    print_runs(runs, "python -c pass")
    print()
    print_goals(goals)
    facts = {"store": str(args.store) if args.store else f"made, {args.preset}", "ref": args.ref}
    print(f"\nwrote {write_report('latency', facts, runs, goals)}")


def _arguments() -> argparse.Namespace:
    options = parser(__doc__, "tiny", 3, 10)
    options.add_argument("--store", type=Path, help="a folder that holds .mp/")
    options.add_argument("--ref", default="base", help="what to log and show (base)")
    return options.parse_args()


if __name__ == "__main__":
    sys.exit(run_bench(_arguments(), _bench))
