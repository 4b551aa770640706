"""The recipes of bench/merge.py are ones that both sides take, and its report says what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from merge_plot import draw
from merge_recipes import METHODS, SPEEDUP, SPEEDUP_TENTH, recipe_text

from mergepipe.merge.methods import find_method
from mergepipe.merge.recipe import parse_recipe
from mergepipe.merge.recipe.outline import outline

NAMES = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(6)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changed", [None, 3])
def test_recipes_are_taken(method: str, changed: int | None) -> None:
    found = find_method(method)
    count = 1 if METHODS[method].experts == 1 else 4
    [document] = parse_recipe(recipe_text(method, "base", [f"e{k}" for k in range(count)], changed), "r.yml").documents
    shared = frozenset(parameter.name for parameter in found.parameters if not parameter.per_expert)
    own = frozenset(parameter.name for parameter in found.parameters if parameter.per_expert)
    tensors = outline(document, dict.fromkeys(document.models_used(), NAMES), shared, own).tensors
    assert len(tensors) == len(NAMES)
    weights = [dict(tensor.own[0]).get("weight") for tensor in tensors]
    if METHODS[method].layered and changed is not None:
        assert weights == [0.4 if number == changed else 0.5 for number in range(6)]
    elif METHODS[method].layered:
        assert weights == [0.5] * 6


def test_every_goal_has_its_recipe() -> None:
    assert SPEEDUP.keys() == METHODS.keys()
    assert SPEEDUP_TENTH.keys() <= METHODS.keys()


def test_curves_are_drawn_from_reports(tmp_path: Path) -> None:
    run = '{"seconds": 1.5, "peak_bytes": 250000000}'
    report = tmp_path / "merge.json"
    report.write_text(
        f'{{"runs": {{"ties K=2 mp": [{run}], "ties K=4 mp": [{run}, {run}], "ties K=2 mergekit": [{run}]}}}}'
    )
    draw([report], tmp_path / "plots" / "merge.png")
    assert (tmp_path / "plots" / "merge.png").read_bytes().startswith(b"\x89PNG")
