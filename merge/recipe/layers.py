"""What tensor names say of a model's layers.

A tensor belongs to the layer that the first number of its dotted name says, and to the stack that the name before the
number says: ``model.layers.3.mlp.up_proj.weight`` is in layer 3 of ``model.layers.``. A model can have several stacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_DIGITS: Final = 5  # a longer number is no layer
_FIRST: Final = frozenset({"wte", "wpe", "embd", "rotary_pos_emb", "relative_pe"})


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's place: the stack (the name before the number, with its dot), the number, and the name after it."""

    stack: str
    number: int
    rest: str


@dataclass(frozen=True, slots=True)
class SortedNames:
    """A model's tensor names, sorted by where they belong. ``stacks`` has each stack's number of layers."""

    names: frozenset[str]
    loose: tuple[str, ...]
    layers: Mapping[tuple[str, int], tuple[str, ...]]
    stacks: Mapping[str, int]

    def main(self) -> str | None:
        """The stack with the most tensors."""
        counts: Counter[str] = Counter()
        for (stack, _), rests in self.layers.items():
            counts[stack] += len(rests)
        return counts.most_common(1)[0][0] if counts else None


def layer_of(name: str) -> Layer | None:
    """Where in which stack a tensor belongs, or None for one of no layer."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) <= _DIGITS and part == str(int(part)):
            stack = "".join(f"{before}." for before in parts[:index])
            return Layer(stack, int(part), ".".join(parts[index + 1 :]))
    return None


def comes_first(name: str) -> bool:
    """Whether a tensor of no layer belongs before the layers: embeddings of tokens and positions do."""
    return any(part in _FIRST or ("embed" in part and part != "embed_out") for part in name.split("."))


def sort_names(names: Sequence[str]) -> SortedNames:
    loose: list[str] = []
    layers: dict[tuple[str, int], list[str]] = {}
    stacks: dict[str, int] = {}
    for name in names:
        layer = layer_of(name)
        if layer is None:
            loose.append(name)
            continue
        layers.setdefault((layer.stack, layer.number), []).append(layer.rest)
        stacks[layer.stack] = max(stacks.get(layer.stack, 0), layer.number + 1)
    grouped = {key: tuple(rests) for key, rests in layers.items()}
    return SortedNames(frozenset(names), tuple(loose), grouped, stacks)


def tensor_name(stack: str, number: int, rest: str) -> str:
    return f"{stack}{number}.{rest}" if rest else f"{stack}{number}"


def together(lists: Iterable[Iterable[str]]) -> Iterator[str]:
    """Everything in the lists once, in the order of first sight."""
    return iter(dict.fromkeys(name for names in lists for name in names))
