"""Time `mp merge` against mergekit: the same recipe, the same models, whole processes in turn, from a cold cache.

    python bench/merge.py --experts 8 --methods ties task_arithmetic --rounds 1
    python bench/merge.py --plot bench/out/merge-*.json

Both sides take one recipe. mergekit reads the folders and writes a folder; `mp` reads its store, where the family was
ingested before, and commits the result to it. Every round of `mp` begins with a fresh copy of the store, so nothing is
known from before. Beside the full merge it runs each method with a tenth of the experts' bytes, the same plan again,
and the recipe with one layer changed. mergekit's memory grows with the number of experts: `--peer-most` says up to
which it runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import (
    MP,
    BenchError,
    Goal,
    Run,
    Side,
    alternate,
    drop_page_cache,
    format_bytes,
    median_seconds,
    peak_bytes,
    print_goals,
    print_table,
    remove,
    write_report,
)
from merge_recipes import METHODS, SPEEDUP, SPEEDUP_TENTH, recipe_text
from setting import Family, fill_store, parser, run_bench, take_family

PEER = Path(sys.executable).with_name("mergekit-yaml")
PEAK_LIMIT_MB = 800


@dataclass
class _Figures:
    """What `mp` said of its merges, by the side's name."""

    answers: dict[str, dict[str, object]]

    def keep(self, name: str) -> Callable[[Run], None]:
        def inspect(run: Run) -> None:
            self.answers[name] = json.loads(run.outputs[-1])

        return inspect


def _copy_store(source: Path, target: Path) -> None:
    """A store with the same content; objects never change, so they are linked."""
    remove(target)
    shutil.copytree(source / ".mp" / "objects", target / ".mp" / "objects", copy_function=_link)
    for entry in (source / ".mp").iterdir():
        if entry.name != "objects":
            (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, target / ".mp" / entry.name)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _write_recipes(work: Path, method: str, family: Family, count: int) -> dict[str, Path]:
    """The recipe by folders for mergekit, by refs for `mp`, and with one layer changed."""
    names = [path.name for path in family.experts[:count]]
    texts = {
        "peer": recipe_text(method, str(family.base), [str(family.folder / name) for name in names]),
        "mp": recipe_text(method, "base", names),
        "layer": recipe_text(method, "base", names, changed_layer=3),
    }
    paths = {}
    for kind, text in texts.items():
        paths[kind] = work / f"{method}-{count}-{kind}.yml"
        paths[kind].write_text(text)
    return paths


def _sides(
    args: argparse.Namespace, method: str, family: Family, count: int, work: Path, figures: _Figures
) -> list[Side]:
    recipes = _write_recipes(work, method, family, count)
    store, out = work / "round", work / "peer-out"
    label = f"{method} K={count}"

    def side(name: str, options: Sequence[str], recipe: str = "mp", fresh: bool = True) -> Side:
        command: list[str | Path] = [MP, "merge", recipes[recipe], "--as", "result", "--json", *options]
        prepare = (lambda: _copy_store(work / "store", store)) if fresh else _nothing
        return Side(f"{label} {name}", [command], store, prepare, figures.keep(f"{label} {name}"))

    sides = [side("mp", ())]
    sides += [side("mp again", (), fresh=False)]
    if METHODS[method].layered:
        sides += [side("mp one layer changed", (), "layer", fresh=False)]
    if method in SPEEDUP_TENTH:
        sides += [side("mp 10%", ("--budget", "10%"))]
    if count <= args.peer_most:
        peer: list[str | Path] = [PEER, recipes["peer"], out, "--quiet"]
        sides.append(Side(f"{label} mergekit", [peer], work, cleanup=lambda: remove(out)))
    return sides


def _nothing() -> None:
    """The store stays as the side before left it."""


def _goals(method: str, count: int, runs: dict[str, list[Run]], figures: _Figures) -> list[Goal]:
    label = f"{method} K={count}"
    found = [Goal(f"{label}: peak memory", peak_bytes(runs[f"{label} mp"]) / 1e6, PEAK_LIMIT_MB, " MB")]
    again = f"{label} mp again"
    if again in runs:
        read = figures.answers[again]["expert_bytes_read"]
        found.append(Goal(f"{label}: same recipe again", median_seconds(runs[again]), 1.0, " s"))
        found.append(Goal(f"{label}: expert bytes of that", float(str(read)), 0, " B"))
    peer = runs.get(f"{label} mergekit")
    if peer and method in SPEEDUP:
        share = median_seconds(runs[f"{label} mp"]) / median_seconds(peer)
        found.append(Goal(f"{label}: of mergekit's time (goal {SPEEDUP[method]}x faster)", share, 1 / SPEEDUP[method]))
    if peer and method in SPEEDUP_TENTH:
        share = median_seconds(runs[f"{label} mp 10%"]) / median_seconds(peer)
        goal = SPEEDUP_TENTH[method]
        found.append(Goal(f"{label} 10%: of mergekit's time (goal {goal}x faster)", share, 1 / goal))
    return found


def _print(runs: dict[str, list[Run]], figures: _Figures) -> None:
    rows = []
    for name, side in runs.items():
        peer = runs.get(" ".join(name.split(" ")[:2]) + " mergekit")
        faster = f"{median_seconds(peer) / median_seconds(side):.1f}x" if peer else ""
        answer = figures.answers.get(name, {})
        read = format_bytes(float(str(answer["expert_bytes_read"]))) if answer else ""
        rows.append([name, f"{median_seconds(side):.2f}", format_bytes(peak_bytes(side)), read, faster])
    print_table(["", "median s", "peak memory", "expert bytes", "against mergekit"], rows)


def _bench(args: argparse.Namespace, work: Path) -> None:
    family = take_family(args, work)
    print("ingesting it", file=sys.stderr)
    fill_store(work / "store", family, args.block_size)
    warmth = "dropped" if drop_page_cache() else "warm"
    figures = _Figures({})
    runs: dict[str, list[Run]] = {}
    goals: list[Goal] = []
    for count in args.counts or [len(family.experts)]:
        for method in args.methods:
            if count < METHODS[method].experts:
                continue
            members = 1 if METHODS[method].experts == 1 else count
            mine = alternate(_sides(args, method, family, members, work, figures), args.rounds)
            runs.update(mine)
            goals += _goals(method, members, mine, figures)
            remove(work / "round")
    print(f"\npage cache: {warmth}\n")
    _print(runs, figures)
    print()
    print_goals(goals)
    facts = {"preset": args.preset, "page_cache": warmth, "answers": figures.answers}
    print(f"\nwrote {write_report(args.name, facts, runs, goals)}")


def _options() -> argparse.ArgumentParser:
    options = parser(__doc__, "qwen3-0.6b", 8, 1)
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--counts", nargs="+", type=int, help="how many of the experts to merge (all)")
    options.add_argument("--peer-most", type=int, default=8, help="mergekit runs with up to so many experts (8)")
    options.add_argument("--name", default="merge", help="of the report below bench/out/")
    options.add_argument("--plot", nargs="+", type=Path, help="draw the scaling curves from these reports, and stop")
    options.add_argument("--plot-to", type=Path, default=Path("docs/merge-speed.png"))
    return options


def main() -> int:
    """Run the bench, or draw."""
    args = _options().parse_args()
    if args.plot:
        from merge_plot import draw

        draw(args.plot, args.plot_to)
        return 0
    if not PEER.exists():
        raise BenchError(f"{PEER} is not there: run `make setup` first")
    return run_bench(args, _bench)


if __name__ == "__main__":
    sys.exit(main())
