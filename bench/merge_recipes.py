"""The recipes of bench/merge.py: one for each method, as mergekit and `mp` both take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Recipe:
    """``experts``: the fewest that it takes (1: exactly one). ``own`` and ``shared``: parameters as YAML.

    ``based``: it names a base model. ``listed``: the base is one of the models. ``layered``: it has a weight for each
    expert, so that one layer's can be changed.
    """

    experts: int = 2
    own: str = "weight: 0.5"
    shared: str = ""
    based: bool = True
    listed: bool = False
    layered: bool = True


METHODS: Mapping[str, Recipe] = MappingProxyType(
    {
        "linear": Recipe(based=False),
        "task_arithmetic": Recipe(),
        "ties": Recipe(own="weight: 0.5, density: 0.5"),
        "dare_ties": Recipe(own="weight: 0.5, density: 0.5"),
        "slerp": Recipe(experts=1, own="", shared="t: 0.4", listed=True, layered=False),
        "model_stock": Recipe(own="", layered=False),
    }
)
SPEEDUP = {"ties": 25, "dare_ties": 15, "task_arithmetic": 5, "linear": 4, "slerp": 5, "model_stock": 5}
SPEEDUP_TENTH = {"ties": 80, "task_arithmetic": 12}


def recipe_text(method: str, base: str, experts: Sequence[str], changed_layer: int | None = None) -> str:
    """The recipe as YAML. ``changed_layer``: the first expert's weight is another in that layer."""
    recipe = METHODS[method]
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if recipe.based:
        lines.append(f"base_model: {base}")
    lines.append("models:")
    if recipe.listed:
        lines.append(f"  - model: {base}")
    for number, expert in enumerate(experts):
        lines.append(f"  - model: {expert}")
        own = recipe.own
        if changed_layer is not None and number == 0:
            layer = f"[{{filter: layers.{changed_layer}., value: 0.4}}, {{value: 0.5}}]"
            own = own.replace("weight: 0.5", f"weight: {layer}")
        if own:
            lines.append(f"    parameters: {{{own}}}")
    if recipe.shared:
        lines.append(f"parameters: {{{recipe.shared}}}")
    return "\n".join(lines) + "\n"
