"""Scaling curves from bench/merge.py's reports: seconds and peak memory over the number of experts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

Point = tuple[int, float, float]


def draw(reports: Sequence[Path], target: Path) -> None:
    """Draw the reports' runs into one PNG: a column for each method, seconds above, memory below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    curves = _curves(reports)
    methods = sorted({method for method, _ in curves})
    figure, axes = plt.subplots(2, len(methods), figsize=(3.4 * len(methods), 6), squeeze=False, sharex="col")
    for column, method in enumerate(methods):
        for (name, side), points in sorted(curves.items()):
            if name != method:
                continue
            counts, seconds, peaks = zip(*sorted(points), strict=True)
            axes[0][column].plot(counts, seconds, marker="o", label=side)
            axes[1][column].plot(counts, peaks, marker="o", label=side)
        axes[0][column].set(title=method, yscale="log", ylabel="seconds" if not column else "")
        axes[1][column].set(xlabel="experts", yscale="log", ylabel="peak memory, MB" if not column else "")
        axes[0][column].legend(fontsize=7)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    print(f"wrote {target}")


def _curves(reports: Sequence[Path]) -> dict[tuple[str, str], list[Point]]:
    """By method and side, (experts, median seconds, peak MB)."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for path in reports:
        for name, runs in json.loads(path.read_text())["runs"].items():
            method, count, side = name.split(" ", 2)
            seconds = statistics.median(run["seconds"] for run in runs)
            peak = max(run["peak_bytes"] for run in runs) / 1e6
            curves.setdefault((method, side), []).append((int(count.removeprefix("K=")), seconds, peak))
    return curves
