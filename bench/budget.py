"""What a budget buys: how far a merge is from the full one, by three rules for what to read, at equal expert bytes.

    python bench/budget.py              # writes docs/budget-selection.md and .png, bench/out/budget.json
    python bench/budget.py --small      # under a minute, writes bench/out/budget-small.json only

Families are made up and seeded, bfloat16, and ingested into a store of their own. Each merge is planned with a rule,
carried out, and compared with the full merge; results are float32, so nothing is rounded. A deviation is the L2 norm of
the difference over the norm of the full merge's update.

The rules: *hash*, the papers' reference code: blocks in the order of a hash of their names, as long as they fit.
*norm*, by the bound alone. *sketch*, what `mp plan --budget` does.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from harness import ROOT, Goal, print_goals, print_table, workspace, write_report
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mergepipe.merge import Expert, Plan, execute, parse_budget, plan_merge
from mergepipe.merge.build import facts_of, jobs_of_plan
from mergepipe.merge.certificate import Item
from mergepipe.merge.facts import Facts
from mergepipe.merge.method import Method
from mergepipe.merge.methods import find_method
from mergepipe.merge.planner import complete, full_bytes, items_of_model
from mergepipe.merge.selection import Selector, by_norm, select_within_bytes, within_bytes
from mergepipe.store import Store
from mergepipe.store.digest import hash_bytes

Floats = NDArray[np.float32]
Weights = dict[str, Floats]

ROWS, COLUMNS, BLOCK_BYTES = 256, 256, 16384  # 8 blocks of 8,192 elements in a matrix
EXPERTS: Final = 4
DELTA: Final = 3e-4
METHODS: Final[Mapping[str, Sequence[Mapping[str, float]]]] = {  # the experts' parameters
    "task_arithmetic": [{"weight": 0.25}] * EXPERTS,
    "linear": [{"weight": weight} for weight in (0.4, 0.3, 0.2, 0.1)],
    "ties": [{"weight": 1.0, "density": 0.2}] * EXPERTS,
}
RULES: Final = ("hash", "norm", "sketch")
LABELS: Final = {"hash": "by a hash of the name", "norm": "by norm", "sketch": "by sketch"}
PAGE: Final = ROOT / "docs" / "budget-selection.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class Extent:
    """How many matrices a model has, and the budgets, in percent of the experts' stored bytes."""

    matrices: int
    budgets: tuple[int, ...]


FULL: Final = Extent(48, (5, 10, 20, 50))
SMALL: Final = Extent(8, (10, 50))


def hash_rule(items: Sequence[Item], names: Sequence[str], budget: int) -> list[int]:
    """Items in the order of a hash of their names; one that does not fit is passed over."""
    chosen, room = [], budget
    for number in sorted(range(len(items)), key=lambda number: hash_bytes(names[number].encode()).hex()):
        if items[number].stored_bytes <= room:
            room -= items[number].stored_bytes
            chosen.append(number)
    return chosen


# Families: what each expert adds to a matrix, (K, ROWS, COLUMNS).


def _sizes(random: np.random.Generator, *shape: int) -> Floats:
    """Heavy-tailed sizes: lognormal, sigma 0.7."""
    return np.asarray(DELTA * np.exp(0.7 * random.standard_normal(shape)), np.float32)


def _independent(random: np.random.Generator, _: int) -> Floats:
    """Each expert by itself, with a size of its own in each matrix and in each eighth of it."""
    sizes = _sizes(random, EXPERTS, 1, 1) * np.repeat(_sizes(random, EXPERTS, 8, 1), ROWS // 8, 1) / DELTA
    return np.asarray(random.standard_normal((EXPERTS, ROWS, COLUMNS), np.float32) * sizes)


def _correlated(random: np.random.Generator, _: int) -> Floats:
    """A part that all share, from nothing to nearly everything of a matrix's update."""
    shared = np.float32(random.uniform(0, 0.95))
    common = random.standard_normal((1, ROWS, COLUMNS), np.float32)
    own = random.standard_normal((EXPERTS, ROWS, COLUMNS), np.float32)
    mixed = np.sqrt(shared) * common + np.sqrt(1 - shared) * own
    return np.asarray(mixed * _sizes(random, EXPERTS, 1, 1))


def _cancelling(random: np.random.Generator, number: int) -> Floats:
    """In every second matrix two experts are opposed, up to a tenth."""
    deltas = _independent(random, number)
    if number % 2:
        deltas[1] = -deltas[0] + 0.1 * deltas[1]
    return deltas


def _sparse(random: np.random.Generator, _: int) -> Floats:
    """Rank 4, half of the directions shared, and only in rows that an expert touches: a half of the matrix."""
    shared = random.standard_normal((2, COLUMNS), np.float32)
    deltas = np.zeros((EXPERTS, ROWS, COLUMNS), np.float32)
    for expert in range(EXPERTS):
        right = np.vstack([shared, random.standard_normal((2, COLUMNS), np.float32)])
        left = random.standard_normal((ROWS, 4)).astype(np.float32) / 2
        first = int(random.integers(0, 5)) * ROWS // 8
        deltas[expert, first : first + ROWS // 2] = (left @ right)[: ROWS // 2]
    return np.asarray(deltas * _sizes(random, EXPERTS, 1, 1))


FAMILIES: Final[Mapping[str, Callable[[np.random.Generator, int], Floats]]] = {
    "independent": _independent,
    "correlated": _correlated,
    "cancelling": _cancelling,
    "sparse, low rank": _sparse,
}


def make_family(folder: Path, family: str, matrices: int, seed: int) -> list[Path]:
    """Write the base and the experts as bfloat16 safetensors; returns their paths, the base first."""
    random = np.random.default_rng([seed, list(FAMILIES).index(family)])
    models: list[dict[str, NDArray[Any]]] = [{} for _ in range(1 + EXPERTS)]
    for number in range(matrices):
        base = (random.standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
        deltas = FAMILIES[family](random, number)
        for model, delta in zip(models, [np.zeros_like(deltas[0]), *deltas], strict=True):
            model[f"layers.{number:02d}.weight"] = (base.astype(np.float32) + delta).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    paths = []
    for number, model in enumerate(models):
        paths.append(folder / (f"expert{number}.safetensors" if number else "base.safetensors"))
        save_file(model, paths[-1])
    return paths


@dataclass(frozen=True, slots=True)
class Row:
    """One merge: deviations are relative to the full update; ``read`` is the share of the experts' bytes."""

    family: str
    method: str
    budget: int
    rule: str
    deviation: float
    estimate: float
    bound: float
    read: float
    plan_seconds: float


@dataclass(frozen=True, slots=True)
class Ground:
    """What a plan with a budget knows of one merge, where whole blocks alone are read."""

    method: Method
    draft: Plan
    facts: Facts
    items: Sequence[Item]

    def select(self, rule: str, limit: int) -> list[int]:
        """The numbers of the items that a rule reads within so many bytes."""
        return _selector(self, rule)(self.items, limit)

    def plan(self, chosen: Iterable[int], limit: int) -> Plan:
        """The plan that reads these items."""
        draft = replace(self.draft, budget_bytes=limit)
        return complete(draft, self.facts, self.method, (self.items, set(chosen)))


def open_ground(store: Store, experts: Sequence[Expert], method: str, **options: Any) -> Ground:
    """Gather it; ``options`` are those of :func:`plan_merge`."""
    found = find_method(method)
    draft = plan_merge(store, "base", experts, method, budget=parse_budget("0%"), **options)
    models, jobs = jobs_of_plan(store, draft)
    facts = facts_of(store, models, jobs, draft.settings, found, bounded=True)
    return Ground(found, draft, facts, items_of_model(facts, found, previews=False))


@dataclass(frozen=True, slots=True)
class Setting:
    """One family in its store and one method; ``whole`` is the full merge, and ``update`` its distance to the base."""

    store: Store
    family: str
    ground: Ground
    whole: Weights
    update: float


def open_setting(store: Store, family: str, method: str) -> Setting:
    """Merge in full, and gather what a plan with a budget knows."""
    experts = [Expert(f"expert{number}", dict(own)) for number, own in enumerate(METHODS[method], 1)]
    options: dict[str, Any] = {"dtype": "F32", "parameters": {"exact": False} if method == "ties" else {}}
    whole = _merged(store, plan_merge(store, "base", experts, method, **options))
    ground = open_ground(store, experts, method, **options)
    return Setting(store, family, ground, whole, _distance(_weights(store, "base"), whole))


def _merged(store: Store, plan: Plan) -> Weights:
    execute(store, plan, "merged")
    return _weights(store, "merged")


def measure_rule(setting: Setting, rule: str, budget: int) -> Row:
    """Plan with a rule, merge, and compare with the full merge."""
    full = full_bytes(setting.ground.facts)
    limit = full * budget // 100
    start = time.perf_counter()
    chosen = setting.ground.select(rule, limit)
    seconds = time.perf_counter() - start
    plan = setting.ground.plan(chosen, limit)
    deviation = _distance(_merged(setting.store, plan), setting.whole)
    return Row(
        family=setting.family,
        method=setting.ground.method.name,
        budget=budget,
        rule=rule,
        deviation=deviation / setting.update,
        estimate=plan.bound.estimate / setting.update,
        bound=plan.bound.absolute / setting.update,
        read=plan.costs.expert_bytes / full,
        plan_seconds=seconds,
    )


def _selector(ground: Ground, rule: str) -> Selector:
    if rule == "hash":
        names = [f"{ground.facts.tensors[item.tensor].name} {item.index} {item.groups}" for item in ground.items]
        return lambda items, budget: hash_rule(items, names, budget)
    if rule == "norm":
        return lambda items, budget: within_bytes(items, by_norm(items), budget)
    return select_within_bytes


def _weights(store: Store, ref: str) -> Weights:
    found = {}
    snapshot = store.snapshot(ref)
    for name, entry in snapshot.tensors.items():
        kind = ml_dtypes.bfloat16 if entry.dtype == "BF16" else np.float32
        found[name] = np.asarray(snapshot.read_tensor(name).view(kind), np.float32)
    return found


def _distance(one: Weights, other: Weights) -> float:
    return math.sqrt(math.fsum(float(np.square(one[name] - other[name], dtype=np.float64).sum()) for name in one))


def measure(work: Path, extent: Extent, seed: int) -> Iterator[Row]:
    """All families, methods, budgets and rules."""
    for family in FAMILIES:
        folder = work / family.replace(",", "").replace(" ", "-")
        base, *experts = make_family(folder / "models", family, extent.matrices, seed)
        with Store.create(folder / "store", block_bytes=BLOCK_BYTES) as store:
            store.ingest([base], ref="base")
            store.ingest(experts, base="base")
            for method in METHODS:
                print(f"  {family}, {method}", file=sys.stderr)
                setting = open_setting(store, family, method)
                for budget in extent.budgets:
                    yield from (measure_rule(setting, rule, budget) for rule in RULES)


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str, int], dict[str, Row]]:
    """The rules' rows side by side."""
    cases: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.family, row.method, row.budget), {})[row.rule] = row
    return cases


def goals(rows: Sequence[Row]) -> list[Goal]:
    """The worst ratios of one rule's deviation to another's, and of truth to bound.

    Where deltas cancel, norms may choose worse than chance: one of two that cancel is further off than neither.
    """
    cases = by_case(rows)
    plain = [case for (family, _, _), case in cases.items() if family != "cancelling"]
    return [
        Goal("deviation by sketch, to that by norm", _worst(cases.values(), "sketch", "norm"), 1.0, "x"),
        Goal("deviation by sketch, to that by hash", _worst(cases.values(), "sketch", "hash"), 1.0, "x"),
        Goal("deviation by norm, to that by hash, where none cancel", _worst(plain, "norm", "hash"), 1.0, "x"),
        Goal("true deviation, to the bound", max(row.deviation / row.bound for row in rows), 1.0, "x"),
    ]


def _worst(cases: Iterable[Mapping[str, Row]], one: str, other: str) -> float:
    return max(case[one].deviation / case[other].deviation for case in cases)


HEADER: Final = ("family", "method", "budget", "hash", "norm", "sketch", "sketch's estimate", "its bound")


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each family, method and budget."""
    lines = []
    for (family, method, budget), case in by_case(rows).items():
        ours = case["sketch"]
        figures = [*(case[rule].deviation for rule in RULES), ours.estimate, ours.bound]
        lines.append([family, method, f"{budget}%", *(f"{figure:.3f}" for figure in figures)])
    return lines


def write_page(rows: Sequence[Row]) -> None:
    """Put the table between the page's markers."""
    lines = [HEADER, ["---"] * 2 + ["--:"] * 6, *table(rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Deviations over budgets: families side by side, two methods below each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = ("task_arithmetic", "ties")
    figure, panels = pyplot.subplots(len(methods), len(FAMILIES), figsize=(12, 5.5), sharex=True, sharey=True)
    for line, method in zip(panels, methods, strict=True):
        for panel, family in zip(line, FAMILIES, strict=True):
            for rule, style in zip(RULES, ("s:", "o--", "o-"), strict=True):
                mine = [row for row in rows if (row.family, row.method, row.rule) == (family, method, rule)]
                points = [0, *(row.budget for row in mine), 100], [1.0, *(row.deviation for row in mine), 0.0]
                panel.plot(*points, style, label=LABELS[rule], markersize=4)
            panel.set_title(f"{family}: {method}", fontsize=9)
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("expert bytes read, %")
    for line in panels:
        line[0].set_ylabel("deviation / update")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--small", action="store_true", help="smaller models, two budgets, and nothing into docs/")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--workdir", type=Path, help="where to put temporary files (build/)")
    options.add_argument("--keep", action="store_true", help="leave the temporary files")
    args = options.parse_args()
    extent = SMALL if args.small else FULL
    with workspace(args.keep, args.workdir) as work:
        rows = list(measure(work, extent, args.seed))
    print_table(HEADER, table(rows))
    print()
    found = goals(rows)
    print_goals(found)
    facts = {**asdict(extent), "seed": args.seed, "experts": EXPERTS, "rows": [asdict(row) for row in rows]}
    print(f"\nwrote {write_report('budget-small' if args.small else 'budget', facts, {}, found)}")
    if not args.small:
        write_page(rows)
        draw(rows, PAGE.with_suffix(".png"))
        print(f"wrote {PAGE} and its plot")
    return 0


if __name__ == "__main__":
    sys.exit(main())
