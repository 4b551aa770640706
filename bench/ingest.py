"""Time `mp ingest` of a whole family, statistics included, against `cp -r` and `sync` of the same bytes.

    python bench/ingest.py --preset qwen3-0.6b --experts 4 --rounds 3

One side is two processes timed together, the base and then all experts, into a store made anew for each turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import (
    Goal,
    Run,
    Side,
    alternate,
    copy_command,
    disk_bytes,
    drop_page_cache,
    folder_bytes,
    format_bytes,
    median_seconds,
    peak_bytes,
    print_goals,
    print_runs,
    print_table,
    remove,
    write_report,
)
from setting import Family, ingest_commands, make_store, parser, run_bench, take_family


@dataclass(slots=True)
class Stored:
    """What the last ingest said of itself, and what its store takes on disk."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    disk_bytes: int = 0

    def total(self, key: str) -> int:
        return sum(int(row[key]) for row in self.rows)


def _sides(family: Family, work: Path, block_size: str | None, stored: Stored) -> list[Side]:
    store, copy = work / "store", work / "copy"

    def inspect(run: Run) -> None:
        stored.rows = [row for text in run.outputs for row in json.loads(text)]
        stored.disk_bytes = disk_bytes(store / ".mp")

    ingest = Side(
        "mp ingest",
        ingest_commands(family),
        store,
        prepare=lambda: make_store(store, block_size),
        inspect=inspect,
        cleanup=lambda: remove(store),
    )
    copying = Side("cp + sync", [copy_command(family.folder, copy)], work, cleanup=lambda: remove(copy))
    return [ingest, copying]


def _print_members(stored: Stored) -> None:
    rows = []
    for row in stored.rows:
        sizes = [format_bytes(row[key]) for key in ("raw_bytes", "stored_bytes", "written_bytes")]
        share = row["reused_blocks"] / max(1, row["blocks"])
        rows.append([str(row["ref"]), *sizes, f"{share:.1%}", f"{row['elapsed_seconds']:.2f}"])
    print_table(["ref", "raw", "stored", "written", "reused blocks", "seconds"], rows)


def _goals(runs: Mapping[str, Sequence[Run]], stored: Stored, input_bytes: int) -> list[Goal]:
    mp, cp = runs["mp ingest"], runs["cp + sync"]
    counted, on_disk = stored.total("written_bytes") / input_bytes, stored.disk_bytes / input_bytes
    return [
        Goal("seconds, to cp + sync", median_seconds(mp) / median_seconds(cp), 1.5, "x"),
        Goal("bytes written by its own count, share of the input", counted, 0.4),
        Goal("bytes on disk (du), share of the input", on_disk, 0.4),
        Goal("peak memory", peak_bytes(mp) / 1e6, 500, " MB"),
    ]


def _bench(args: argparse.Namespace, work: Path) -> None:
    family = take_family(args, work)
    input_bytes = folder_bytes(family.folder)
    stored = Stored()
    runs = alternate(_sides(family, work, args.block_size, stored), args.rounds)
    goals = _goals(runs, stored, input_bytes)
    warmth = "dropped" if drop_page_cache() else "warm"
    facts = {
        "preset": None if args.family else args.preset,
        "experts": len(family.experts),
        "block_size": args.block_size,
        "page_cache": warmth,
        "input_bytes": input_bytes,
        "store_disk_bytes": stored.disk_bytes,
        "reused_block_share": stored.total("reused_blocks") / max(1, stored.total("blocks")),
        "ingest": stored.rows,
    }
    size = format_bytes(input_bytes)
    print(f"\na base and {len(family.experts)} experts, {size}; page cache: {warmth}\n")
    print_runs(runs, "cp + sync")
    print()
    _print_members(stored)
    print(f"the store takes {format_bytes(stored.disk_bytes)} on disk\n")
    print_goals(goals)
    print(f"\nwrote {write_report('ingest', facts, runs, goals)}")


if __name__ == "__main__":
    sys.exit(run_bench(parser(__doc__, "qwen3-0.6b", 4, 3).parse_args(), _bench))
