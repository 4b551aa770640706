"""Sweep methods and budgets over a trained family: held-out score of each merge, and its distance from the full merge.

    python bench/quality.py                                          # trains a family first: minutes
    python bench/quality.py --family DIR --out docs/quality --json FILE

DIR is what bench/training.py or bench/encoder.py wrote. Writes plots into docs/quality/, and the tables into
docs/quality.md, into the section of the family's kind (full, lora, sparse, encoder); what else stands on that page
stays. Language models are scored by their loss, encoders by recall@1.

*Gain recovered* is `(merge - base) / (full merge - base)` of the held-out scores, each the mean over the domains.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from encoder import held_out_recalls, load_encoder
from harness import ROOT, BenchError, format_bytes, workspace
from matplotlib.figure import Figure
from setting import Family
from training import KINDS, HeldOut, Options, TrainingError, held_out_losses, load_model, make_family, read_held_out

from mergepipe.merge import Expert, execute, parse_budget, plan_merge
from mergepipe.merge.methods import METHODS as KNOWN
from mergepipe.store import MergePipeError, Store


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method, and its parameters: for the whole merge, or alike for all experts."""

    method: str
    parameters: Mapping[str, float | bool] = field(default_factory=dict)


# For four experts. Those that this engine does not have are passed over, and named.
RECIPES = (
    Recipe("linear"),
    Recipe("task_arithmetic", {"weight": 0.4}),
    Recipe("ties", {"density": 0.5}),
    Recipe("dare_linear", {"weight": 0.4, "density": 0.7}),
    Recipe("dare_ties", {"weight": 0.4, "density": 0.7}),
    Recipe("breadcrumbs", {"weight": 0.4, "density": 0.9}),
    Recipe("breadcrumbs_ties", {"weight": 0.4, "density": 0.9}),
    Recipe("della_linear", {"weight": 0.4, "density": 0.7}),
    Recipe("della", {"density": 0.7}),
    Recipe("sce", {"select_topk": 0.7}),
    Recipe("model_stock"),
    Recipe("multislerp"),
    Recipe("karcher"),
    Recipe("ram"),
)
BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the experts' stored bytes; 1 reads all
CLAIMED_BUDGET = 0.1  # "an order of magnitude less"
ENOUGH = 0.95  # of the gain
BLOCK_BYTES = 64 << 10  # the families are small: about a hundred blocks for each language model, 700 for an encoder

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a family is scored by; a `sign` of -1 where less is better."""

    title: str
    sign: int
    load: Callable[[Path], Any]
    score: Callable[[Any, HeldOut], dict[str, float]]

    @property
    def direction(self) -> str:
        return f"{'More' if self.sign > 0 else 'Less'} {self.title.partition(',')[0]} is better."


LOSS = Measure("held-out loss, nats per token", -1, load_model, held_out_losses)
RECALL = Measure("held-out recall@1", 1, load_encoder, held_out_recalls)
MEASURES = dict.fromkeys(KINDS, LOSS) | {"encoder": RECALL}


@dataclass(frozen=True, slots=True)
class Merged:
    """One merge as it came out of the store."""

    tensors: Tensors
    expert_bytes_read: int
    expert_bytes_full: int
    relative_bound: float


@dataclass(frozen=True, slots=True)
class Point:
    """One merge, scored. Deviations are L2 distances from the full merge, over its update and over its weights."""

    method: str
    budget: float
    expert_bytes_read: int
    share_of_stored: float
    share_of_raw: float
    scores: dict[str, float]
    gain_recovered: float
    deviation_of_update: float
    deviation_of_weights: float
    relative_bound: float

    @property
    def score(self) -> float:
        return mean(self.scores)


def mean(scores: Mapping[str, float]) -> float:
    return math.fsum(scores.values()) / len(scores)


def merge_to(store: Store, experts: Sequence[str], recipe: Recipe, budget: float, ref: str) -> Merged:
    """Merge within a share of the experts' stored bytes; all the rest of this file knows the engine through this."""
    limit = parse_budget(f"{100 * budget:g}%") if budget < 1 else None
    inputs = [Expert(name) for name in experts]
    plan = plan_merge(store, "base", inputs, recipe.method, parameters=recipe.parameters, budget=limit)
    result = execute(store, plan, ref, use_cache=False)
    tensors = tensors_of(store, ref)
    return Merged(tensors, result.expert_bytes_read, plan.costs.expert_bytes_full, plan.bound.relative)


def tensors_of(store: Store, ref: str) -> Tensors:
    snapshot = store.snapshot(ref)
    return {name: snapshot.tensor(name) for name in snapshot.tensors}


def distance(one: Tensors, other: Tensors) -> float:
    """L2, in float64."""
    return math.sqrt(sum((one[name].double() - other[name].double()).square().sum().item() for name in one))


def norm(tensors: Tensors) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


class Scorer:
    """Held-out scores of weights, in one model that is loaded once."""

    def __init__(self, family: Family, measure: Measure) -> None:
        self.measure = measure
        self.held_out = read_held_out(family.folder)
        self._model = measure.load(family.base)

    def __call__(self, tensors: Tensors) -> dict[str, float]:
        return self.measure.score(self.model_of(tensors), self.held_out)

    def model_of(self, tensors: Tensors) -> Any:
        """The model, with these weights."""
        found = self._model.load_state_dict(tensors, strict=False)
        if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:  # tied to the embedding
            raise BenchError(f"these are not the model's tensors: {found}")
        return self._model


@dataclass(frozen=True, slots=True)
class Sweep:
    """All that was measured on one family; `scores` has the base and each expert, `points` every merge."""

    kind: str
    parameters: int
    scores: dict[str, dict[str, float]]
    points: list[Point]

    @property
    def measure(self) -> Measure:
        return MEASURES[self.kind]

    def of(self, method: str) -> list[Point]:
        return [point for point in self.points if point.method == method]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(point.method for point in self.points))


def _sweep_method(
    store: Store, experts: Sequence[str], recipe: Recipe, score: Scorer, base: tuple[Tensors, dict[str, float]]
) -> list[Point]:
    origin, before = base
    raw_bytes = len(experts) * sum(tensor.nbytes for tensor in origin.values())
    full = merge_to(store, experts, recipe, 1.0, f"merged/{recipe.method}")
    gain = mean(score(full.tensors)) - mean(before)
    update, weights = distance(full.tensors, origin), norm(full.tensors)
    points = []
    for budget in BUDGETS:
        merged = merge_to(store, experts, recipe, budget, f"merged/{recipe.method}-{100 * budget:g}")
        scores = score(merged.tensors)
        away = distance(merged.tensors, full.tensors)
        points.append(
            Point(
                method=recipe.method,
                budget=budget,
                expert_bytes_read=merged.expert_bytes_read,
                share_of_stored=merged.expert_bytes_read / merged.expert_bytes_full,
                share_of_raw=merged.expert_bytes_read / raw_bytes,
                scores=scores,
                gain_recovered=(mean(scores) - mean(before)) / gain if gain * score.measure.sign > 0 else math.nan,
                deviation_of_update=away / update if update else 0.0,
                deviation_of_weights=away / weights,
                relative_bound=merged.relative_bound,
            )
        )
        print(f"  {recipe.method} {budget:.0%}: score {points[-1].score:.4f}, away {away:.4g}", file=sys.stderr)
    return points


def sweep(family: Family, work: Path, methods: Sequence[str]) -> Sweep:
    """Ingest the family into a store below `work`, merge by these methods (all, where none is named), and score."""
    kind = json.loads((family.folder / "training.json").read_text())["kind"]
    score = Scorer(family, MEASURES[kind])
    experts = [folder.name for folder in family.experts]
    with Store.create(work / ".mp", block_bytes=BLOCK_BYTES) as store:
        store.ingest([family.base], ref="base")
        store.ingest(family.experts, base="base")
        origin = tensors_of(store, "base")
        scores = {name: score(tensors_of(store, name)) for name in ("base", *experts)}
        points = []
        for recipe in RECIPES:
            if methods and recipe.method not in methods:
                continue
            if recipe.method not in KNOWN:
                print(f"  {recipe.method}: this engine does not have it", file=sys.stderr)
                continue
            points += _sweep_method(store, experts, recipe, score, (origin, scores["base"]))
    return Sweep(kind, sum(tensor.numel() for tensor in origin.values()), scores, points)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(gain: float) -> str:
    """Of the full merge's gain, where it has one."""
    return "the full merge has none" if math.isnan(gain) else f"{gain:.0%}"


def _scores_table(found: Sweep) -> str:
    domains = list(found.scores["base"])
    named = found.scores | {f"{method}, all read": found.of(method)[-1].scores for method in found.methods}
    rows = [[name, *(f"{each[domain]:.3f}" for domain in domains), f"{mean(each):.3f}"] for name, each in named.items()]
    return markdown_table([found.measure.title, *domains, "mean"], rows)


def _claims_table(found: Sweep) -> str:
    rows = []
    for method in found.methods:
        points = found.of(method)
        claimed = next(point for point in points if point.budget == CLAIMED_BUDGET)
        enough = next(point for point in points if point.gain_recovered >= ENOUGH or point.budget == 1)
        worse = sum(found.measure.sign * (more.score - less.score) > 0 for less, more in pairwise(points))
        rows.append(
            [
                f"`{method}`",
                f"{claimed.deviation_of_weights:.1e}",
                _share(claimed.gain_recovered),
                f"{1 / claimed.share_of_stored:.1f}x",
                f"{worse} of {len(points) - 1}",
                "" if math.isnan(enough.gain_recovered) else f"{enough.share_of_stored:.0%}",
            ]
        )
    header = [
        "method",
        f"deviation of the weights at {CLAIMED_BUDGET:.0%}",
        "gain recovered there",
        "less expert I/O there",
    ]
    return markdown_table([*header, "steps down that cost quality", f"bytes for {ENOUGH:.0%} of the gain"], rows)


def _budget_table(points: Sequence[Point]) -> str:
    rows = [
        [
            f"{point.budget:.0%}",
            format_bytes(point.expert_bytes_read),
            f"{point.share_of_stored:.1%}",
            f"{point.share_of_raw:.1%}",
            *(f"{score:.3f}" for score in point.scores.values()),
            _share(point.gain_recovered),
            f"{point.deviation_of_update:.3g}",
            f"{point.deviation_of_weights:.1e}",
            f"{point.relative_bound:.3g}",
        ]
        for point in points
    ]
    header = ["budget", "read", "of stored", "of raw", *points[0].scores]
    return markdown_table([*header, "gain recovered", "deviation of update", "of weights", "bound"], rows)


def section(found: Sweep, pictures: Sequence[str]) -> str:
    """The page's section for one family, as Markdown."""
    experts = len(found.scores) - 1
    parts = [
        f"## Family `{found.kind}`",
        f"{experts} experts of {found.parameters:,} parameters, bfloat16. {found.measure.direction}",
        _scores_table(found),
        "Claimed for budgets: a deviation of order 1e-3, no steady decline, an order of magnitude less expert I/O.",
        _claims_table(found),
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
    ]
    for method in found.methods:
        parts += [f"### `{method}`, {found.kind}", _budget_table(found.of(method))]
    return "\n\n".join(parts)


INTRODUCTION = """# What a budget costs

Made by `bench/quality.py` on families that `bench/training.py` and `bench/encoder.py` trained: a small language model,
or a pretrained sentence encoder, and an expert for each of several kinds of text that the machine has. `budget` is a
share of the experts' bytes as stored. `read` is what the merge measured; `of raw` compares it with the experts' plain
bfloat16 bytes. *Gain recovered* is `(merge - base) / (full merge - base)` of the held-out scores, each the mean over
the domains. Deviations are L2 distances from the merge that reads everything, over the length of its update and of its
weights; the bound is the plan's certificate for the former.
"""


def write_page(page: Path, kind: str, text: str, introduction: str = INTRODUCTION) -> None:
    """Put a section between its markers, or at the page's end; a new page begins with an introduction."""
    begin, end = f"<!-- quality {kind}: begin -->", f"<!-- quality {kind}: end -->"
    content = page.read_text(encoding="utf-8") if page.exists() else introduction
    if begin not in content:
        content = f"{content.rstrip()}\n\n{begin}\n{end}\n"
    head, _, rest = content.partition(begin)
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def _lines(axes: Any, found: Sweep, value: Callable[[Point], float]) -> None:
    for number, method in enumerate(found.methods):
        points = found.of(method)
        shares = [100 * point.share_of_stored for point in points]
        heights = [value(point) or math.nan for point in points]  # 0 has no place on a logarithmic axis
        axes.plot(shares, heights, label=method, markersize=4, marker="osD^vPX"[number % 7])
    axes.set_xscale("log")
    axes.set_xlabel("experts' stored bytes read, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _draw_gain(found: Sweep, figure: Figure) -> None:
    axes = figure.subplots()
    axes.axhline(1, color="grey", linewidth=1)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_ylabel("gain recovered")
    _lines(axes, found, lambda point: point.gain_recovered)


def _draw_deviation(found: Sweep, figure: Figure) -> None:
    update, weights = figure.subplots(1, 2)
    _lines(update, found, lambda point: point.deviation_of_update)
    _lines(weights, found, lambda point: point.deviation_of_weights)
    for axes, title in ((update, "deviation of the update"), (weights, "deviation of the weights")):
        axes.set_yscale("log")
        axes.set_title(title, fontsize="medium")


def _score_in(domain: str) -> Callable[[Point], float]:
    return lambda point: point.scores[domain]


def _draw_domains(found: Sweep, figure: Figure) -> None:
    domains, sign = list(found.scores["base"]), found.measure.sign
    grid = figure.subplots(math.ceil(len(domains) / 2), 2, squeeze=False)
    for axes, domain in zip(grid.flat, domains, strict=False):
        own = sign * max(sign * scores[domain] for scores in found.scores.values())
        axes.axhline(found.scores["base"][domain], color="black", linewidth=1, label="base")
        axes.axhline(own, color="grey", linewidth=1, label="best expert")
        axes.set_title(domain, fontsize="medium")
        _lines(axes, found, _score_in(domain))
    figure.supylabel(found.measure.title)


def draw(found: Sweep, out: Path) -> list[str]:
    """The plots of one family; returns their paths, relative to the page's folder."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, drawing, size in (
        ("gain", _draw_gain, (7, 4.5)),
        ("deviation", _draw_deviation, (10, 4.5)),
        ("domains", _draw_domains, (10, 7)),
    ):
        figure = Figure(figsize=size, layout="constrained")
        drawing(found, figure)
        figure.savefig(out / f"{found.kind}-{name}.png", dpi=110, metadata={"Software": None})
        pictures.append(f"{out.name}/{found.kind}-{name}.png")
    return pictures


def _run(args: argparse.Namespace) -> None:
    with workspace(keep=False, parent=None) as work:
        folder = args.family
        if folder is None:
            folder = work / "family"
            make_family(Options(folder, seed=0, minutes=6, kind=KINDS["full"], source=None))
        if not (folder / "training.json").is_file():
            raise BenchError(
                f"{folder / 'training.json'} is not there: --family takes what training.py or encoder.py wrote"
            )
        found = sweep(Family(folder.resolve()), work / "store", args.methods)
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    text = section(found, draw(found, args.out))
    write_page(args.out.with_suffix(".md"), found.kind, text)
    print(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Sweep methods and budgets over a trained family, and score.")
    parser.add_argument(
        "--family", type=Path, help="what bench/training.py or bench/encoder.py wrote; trained first where not given"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "quality", help="folder for plots; the page is beside it"
    )
    parser.add_argument("--methods", nargs="*", default=[], help="only these")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        _run(args)
    except (BenchError, TrainingError, MergePipeError, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
