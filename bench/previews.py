"""What the same stored bytes buy, as whole blocks by three rules or as previews, on families that were trained.

    python bench/previews.py DIR ...                        # what bench/training.py or bench/encoder.py wrote
    python bench/previews.py DIR ... --block-size 64KiB --methods task_arithmetic
    python bench/previews.py                                # the page alone, from the reports that are there

Budgets are shares of the experts' plain bytes, and what a merge reads is measured. Each family is ingested once without
previews and once with them, in one thread. Writes bench/out/previews-FAMILY-BLOCKSIZE.json, docs/budgets-measured.md
and its plots.

Language models are scored by their loss; encoders by the mean reciprocal rank, both of passages for surroundings and of
surroundings for passages, which is finer than recall@1. Scores are taken in bfloat16 arithmetic, which halves the time
and moves losses by 1e-4. What a share of the gain may be off by, for it is of a sample of texts, is its standard error
by the delta method for ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from budget import METHODS as BUDGET_METHODS
from budget import RULES, Ground, open_ground
from encoder import embed
from harness import BenchError, workspace
from previews_methods import Swap, swaps
from previews_page import REPORTS, write_pages
from quality import MEASURES, Scorer, Tensors, tensors_of
from setting import Family
from torch.nn import functional
from training import HeldOut

from mergepipe.merge import Expert, Plan, execute, parse_budget, plan_merge
from mergepipe.merge.audit import audit
from mergepipe.store import MergePipeError, Store
from mergepipe.store.sizes import parse_size

SHARES: Final = (0.02, 0.05, 0.1, 0.15)  # of the experts' plain bytes
ARMS: Final = (*RULES, "previews")
BLOCK_SIZE: Final = "2MiB"
ROUNDING: Final = 1 + 2.0**-16  # of float32
WEIGHTS: Final = {"full": 0.2, "lora": 0.15, "sparse": 0.1, "encoder": 0.25}  # at which the full merge gains

Values = dict[str, torch.Tensor]
"""For each domain, (R, texts): R scores of each text, of which more is better."""


def minus_losses(model: Any, held_out: HeldOut) -> Values:
    """Of each window, once."""
    model.eval()
    found = {}
    with torch.no_grad():
        for domain, windows in held_out.items():
            losses = [_window_losses(model, part) for part in torch.split(windows, 16)]
            found[domain] = -torch.cat(losses)[None]
    return found


def _window_losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows[:, :-1]).logits.flatten(0, 1)
    losses = functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(1)


def reciprocal_ranks(model: Any, held_out: HeldOut) -> Values:
    """Of each pair's passage for its surroundings, and of its surroundings for the passage."""
    model.eval()
    found = {}
    with torch.no_grad():
        for domain, pairs in held_out.items():
            parts = [embed(model, part) for part in torch.split(pairs, 32)]
            around, passages = (torch.cat(vectors) for vectors in zip(*parts, strict=True))
            likeness = around @ passages.T
            found[domain] = torch.stack([_reciprocal_rank(likeness), _reciprocal_rank(likeness.T)])
    return found


def _reciprocal_rank(likeness: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + (likeness > likeness.diagonal()[:, None]).sum(1))


def values_of(score: Scorer, tensors: Tensors) -> Values:
    values = minus_losses if score.measure.sign < 0 else reciprocal_ranks
    with torch.autocast("cpu", torch.bfloat16):
        return values(score.model_of(tensors), score.held_out)


def share_of_gain(base: Values, full: Values, merged: Values) -> tuple[float, float] | tuple[None, None]:
    """The share of the full merge's gain that another has, and its standard error; None where there is no gain."""
    before, most, here = (torch.cat([each.mean(0) for each in values.values()]) for values in (base, full, merged))
    gain = (most - before).mean().item()
    if gain <= 0:
        return None, None
    share = (here - before).mean().item() / gain
    rest = (here - before) - share * (most - before)
    return share, rest.std().item() / math.sqrt(len(rest)) / gain


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method with its parameters and the experts'."""

    method: str
    parameters: Mapping[str, float | bool]
    own: Mapping[str, Mapping[str, float]]


def recipes(kind: str, experts: Sequence[str]) -> list[Recipe]:
    """What a family is merged by. DARE divides by the density, as the paper says, which needs no norms."""
    weight = WEIGHTS[kind]
    thinned: dict[str, float | bool] = {"weight": weight / 0.5, "density": 0.5, "rescale": False}
    alike: dict[str, Mapping[str, float]] = {name: {} for name in experts}
    return [
        Recipe("linear", {}, dict(zip(experts, BUDGET_METHODS["linear"], strict=False))),
        Recipe("task_arithmetic", {"weight": weight}, alike),
        Recipe("dare_linear", thinned, alike),
        Recipe("karcher", {}, alike),
    ]


@dataclass(frozen=True, slots=True)
class Point:
    """One merge. ``deviation`` and ``bound``: shares of the full merge's true update. ``read``: of the plain bytes."""

    method: str
    share: float
    arm: str
    bytes_read: int
    read: float
    deviation: float
    bound: float
    scores: dict[str, float]
    recall: float | None
    gain: float | None
    gain_error: float | None


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of all experts: their tensors, what lies in the store of them, and their previews. Processor seconds."""

    block_bytes: int
    raw_bytes: int
    stored_bytes: int
    preview_bytes: int
    ingest_seconds: float
    ingest_seconds_with_previews: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured on one family; `points` has the merges, those that read everything with the arm `full`."""

    kind: str
    title: str
    experts: int
    parameters: int
    storage: Storage
    base: dict[str, float]
    base_recall: float | None
    points: list[Point]
    swaps: list[Swap]


def ingest(family: Family, work: Path, block_bytes: int) -> tuple[Store, Storage]:
    """Three stores in turn, the first to warm up: the last one has previews and stays."""
    seconds = []
    for number, previews in enumerate((True, False, True)):
        store = Store.create(work / f"store{number}", block_bytes=block_bytes)
        store.ingest([family.base], ref="base")
        start = time.process_time()
        results = store.ingest(family.experts, base="base", previews=previews, workers=1)
        seconds.append(time.process_time() - start)
        if number < 2:
            store.close()
    raw = sum(entry.nbytes for result in results for entry in store.snapshot(result.ref).tensors.values())
    return store, Storage(
        block_bytes=block_bytes,
        raw_bytes=raw,
        stored_bytes=sum(result.stored_bytes for result in results),
        preview_bytes=sum(result.preview_bytes for result in results),
        ingest_seconds=seconds[1],
        ingest_seconds_with_previews=seconds[2],
    )


def _scores(values: Values, sign: int) -> tuple[dict[str, float], float | None]:
    """The mean score of each domain, and recall@1 where there are ranks."""
    firsts = [(each[0] == 1).float().mean().item() for each in values.values()]
    recall = math.fsum(firsts) / len(firsts) if sign > 0 else None
    return {domain: sign * each.mean().item() for domain, each in values.items()}, recall


@dataclass(frozen=True, slots=True)
class Setting:
    """One family in its store, and one recipe. ``full`` is the merge that reads everything, ``most`` its values."""

    store: Store
    score: Scorer
    raw_bytes: int
    before: Values
    recipe: Recipe
    inputs: Sequence[Expert]
    ground: Ground
    full: Point
    most: Values


def open_setting(store: Store, score: Scorer, raw_bytes: int, before: Values, recipe: Recipe) -> Setting:
    """Merge in full, and gather what plans with a budget know."""
    inputs = [Expert(name, own) for name, own in recipe.own.items()]
    plan = plan_merge(store, "base", inputs, recipe.method, parameters=recipe.parameters)
    read = execute(store, plan, "merged", use_cache=False).expert_bytes_read
    most = values_of(score, tensors_of(store, "merged"))
    scores, recall = _scores(most, score.measure.sign)
    gain, error = share_of_gain(before, most, most)
    full = Point(recipe.method, 1.0, "full", read, read / raw_bytes, 0.0, 0.0, scores, recall, gain, error)
    ground = open_ground(store, inputs, recipe.method, parameters=recipe.parameters)
    return Setting(store, score, raw_bytes, before, recipe, inputs, ground, full, most)


def plan_of(setting: Setting, arm: str, limit: int) -> Plan:
    if arm in RULES:
        return setting.ground.plan(setting.ground.select(arm, limit), limit)
    recipe = setting.recipe
    budget = parse_budget(f"{limit}B")
    return plan_merge(setting.store, "base", setting.inputs, recipe.method, parameters=recipe.parameters, budget=budget)


def measure_arm(setting: Setting, arm: str, share: float) -> Point:
    """Plan within the share, merge, audit and score; what affords everything is the full merge."""
    limit = int(share * setting.raw_bytes)
    if limit >= setting.full.bytes_read:
        return replace(setting.full, share=share, arm=arm)
    plan = plan_of(setting, arm, limit)
    read = execute(setting.store, plan, "merged", use_cache=False).expert_bytes_read
    found = audit(setting.store, plan)
    if found.deviation > found.bound * ROUNDING:
        raise BenchError(f"{setting.recipe.method}, {arm}, {share:.0%}: further off than its bound")
    values = values_of(setting.score, tensors_of(setting.store, "merged"))
    scores, recall = _scores(values, setting.score.measure.sign)
    gain, error = share_of_gain(setting.before, setting.most, values)
    return Point(
        method=setting.recipe.method,
        share=share,
        arm=arm,
        bytes_read=read,
        read=read / setting.raw_bytes,
        deviation=found.relative,
        bound=found.bound / found.update,
        scores=scores,
        recall=recall,
        gain=gain,
        gain_error=error,
    )


def measure_recipe(setting: Setting) -> Iterator[Point]:
    """The full merge, then all arms at all shares."""
    yield setting.full
    for share in SHARES:
        for arm in ARMS:
            point = measure_arm(setting, arm, share)
            facts = f"read {point.read:.2%}, deviation {point.deviation:.3f}, gain {point.gain}"
            print(f"  {point.method} {share:.0%} {arm}: {facts}", file=sys.stderr)
            yield point


def measure(family: Family, work: Path, block_bytes: int, methods: Sequence[str] = ()) -> Report:
    """Everything on one family, in stores below ``work``; ``methods``: only these, and no swaps."""
    kind = json.loads((family.folder / "training.json").read_text())["kind"]
    score = Scorer(family, MEASURES[kind])
    store, storage = ingest(family, work, block_bytes)
    with store:
        origin = tensors_of(store, "base")
        before = values_of(score, origin)
        points: list[Point] = []
        names = [folder.name for folder in family.experts]
        for recipe in recipes(kind, names):
            if not methods or recipe.method in methods:
                points += measure_recipe(open_setting(store, score, storage.raw_bytes, before, recipe))
        base, recall = _scores(before, score.measure.sign)
        return Report(
            kind=kind,
            title="held-out loss, nats per token" if recall is None else "mean reciprocal rank",
            experts=len(names),
            parameters=sum(tensor.numel() for tensor in origin.values()),
            storage=storage,
            base=base,
            base_recall=recall,
            points=points,
            swaps=[] if methods else swaps(store, names),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure previews against block selection, at equal stored bytes.")
    parser.add_argument("families", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--block-size", default=BLOCK_SIZE, help=f"the stores' ({BLOCK_SIZE})")
    parser.add_argument("--methods", nargs="*", default=[], help="only these")
    parser.add_argument("--workdir", type=Path, help="where to put temporary files (build/)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        REPORTS.mkdir(parents=True, exist_ok=True)
        for folder in args.families:
            with workspace(keep=False, parent=args.workdir) as work:
                found = measure(Family(folder.resolve()), work, parse_size(args.block_size), args.methods)
            target = REPORTS / f"previews-{found.kind}-{args.block_size}.json"
            target.write_text(json.dumps(asdict(found), indent=1) + "\n")
            print(f"wrote {target}")
        write_pages(BLOCK_SIZE)
    except (BenchError, MergePipeError, OSError) as error:
        print(f"previews: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
