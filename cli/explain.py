"""``mp explain``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, open_store
from mergepipe.cli.picture import Band, can_show, legend, print_picture, terminal_width
from mergepipe.cli.plan_summary import as_json as plan_as_json
from mergepipe.cli.plan_summary import summary_lines
from mergepipe.cli.show_plan import one_line
from mergepipe.cli.tables import Row, print_table
from mergepipe.cli.terminal import say, say_json
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.merge.explain import ExpertShare, TensorExplanation

EXAMPLES: Final = """
mp explain p.json
mp explain p.json --json
"""


def command(
    plan: Annotated[Path, typer.Argument(metavar="FILE", help="The plan, as `mp plan` wrote it.")],
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a plan reads of each expert, and why not the rest.

    First as a picture: a row for each layer, and for each expert its blocks there from left to right. Then as a table:
    `read` counts the blocks that are read of those in which the expert differs from the base, and `previews` those of
    which a preview is; `kept` is how many elements a threshold leaves; `bound` is how far the tensor can be from the
    full merge's (L2). Reads no weights.
    """
    from mergepipe.merge.explain import explain, reading
    from mergepipe.merge.plan_file import read_plan

    found = read_plan(plan)
    with open_store(store) as opened:
        tensors = explain(opened, found)
        levels = reading(opened, found)
    if json:
        say_json({**plan_as_json(found, levels), "tensors": [_as_json(tensor) for tensor in tensors]})
        return
    for line in summary_lines(found, levels):
        say(line)
    say()
    if tensors:
        unicode = can_show(legend(unicode=True))
        experts = [one_line(item.name) for item in found.experts]
        print_picture(_bands(tensors, len(experts)), experts, terminal_width(), unicode=unicode)
        say(legend(unicode=unicode))
        say()
    rows = [row for tensor in tensors for row in _rows(tensor)]
    headings = ["tensor", "expert", "read", "previews", "bytes", "kept", "bound", "why"]
    print_table(headings, rows, right="read previews bytes kept bound")


def _bands(tensors: Sequence[TensorExplanation], experts: int) -> list[Band]:
    """A row for each layer; a tensor need not have all experts."""
    from mergepipe.merge.explain import by_layer

    bands = []
    for layer, members in by_layer(tensors).items():
        levels = [bytearray() for _ in range(experts)]
        for tensor in members:
            for part in tensor.experts:
                levels[part.number] += part.levels
        bands.append(Band(layer, tuple(map(bytes, levels))))
    return bands


def _rows(tensor: TensorExplanation) -> list[Row]:
    rows: list[Row] = []
    for number, part in enumerate(tensor.experts):
        kept = f"{part.kept_elements / tensor.elements:.1%}" if part.kept_elements >= 0 else "all"
        rows.append(
            [
                tensor.name if number == 0 else "",
                part.expert,
                f"{part.exact.blocks}/{part.differing}",
                f"{part.preview.blocks}" if part.preview.blocks else "",
                format_size(part.stored_bytes_read),
                kept if part.exact.blocks or part.preview.blocks else "",
                f"{tensor.bound:.3g}" if number == 0 else "",
                part.reason,
            ]
        )
    return rows


def _as_json(tensor: TensorExplanation) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "layer": tensor.layer,
        "blocks": tensor.blocks,
        "elements": tensor.elements,
        "bound": tensor.bound,
        "experts": [_expert_json(part) for part in tensor.experts],
    }


def _expert_json(part: ExpertShare) -> dict[str, Any]:
    levels = {"nothing": part.nothing, "preview": part.preview, "exact": part.exact}
    return {
        "expert": part.expert,
        "differing": part.differing,
        "levels": {
            name: {"blocks": share.blocks, "stored_bytes": share.stored_bytes} for name, share in levels.items()
        },
        "stored_bytes_read": part.stored_bytes_read,
        "stored_bytes_left": part.stored_bytes_left,
        "kept_elements": part.kept_elements,
        "reason": part.reason,
    }
