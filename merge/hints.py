"""What a user should know of how a budget can be spent."""

from __future__ import annotations

from mergepipe.merge.facts import Facts, TensorFacts
from mergepipe.merge.method import Method
from mergepipe.store.previews import LEAST_ELEMENTS


def preview_notes(facts: Facts, method: Method, *, previews: bool = True) -> list[str]:
    """What a user should know who asked for a budget: whether it can be spent on previews, and if not, why.

    ``previews``: whether that was wanted. Where everything is read there is nothing to say.
    """
    tensors = [tensor for tensor in facts.tensors if tensor.places]
    if not previews or not facts.bounded or not tensors:
        return []
    there = any(group.preview is not None for tensor in tensors for place in tensor.places for group in place.groups)
    if any(method.takes_previews(tensor.problem) for tensor in tensors):
        hint = "no previews here: after `mp analyze EXPERT --previews` the same bytes would bring more of the update"
        return [] if there or facts.adapter_bytes or not any(map(_large, tensors)) else [hint]
    if there:
        return [f"{method.name} reads exact blocks alone, no previews: {_why_exact(method)}"]
    return []


def _large(tensor: TensorFacts) -> bool:
    """Whether some block that differs is large enough for a preview."""
    entry = tensor.entry
    return any(
        entry.block_span(place.index)[1] * 8 // entry.element_type.bits >= LEAST_ELEMENTS for place in tensor.places
    )


def _why_exact(method: Method) -> str:
    if method.error == "whole":
        return "it weighs the experts' elements against each other, and no bound is known for coarse ones"
    return "as asked here it looks at single elements or rows, and no bound is known for coarse ones"
