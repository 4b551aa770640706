"""``mp explain``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, open_store
from mergepipe.cli.plan_summary import as_json as plan_as_json
from mergepipe.cli.plan_summary import summary_lines
from mergepipe.cli.tables import Row, print_table
from mergepipe.cli.terminal import say, say_json
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.merge.explain import TensorExplanation

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

    Reads no weights. `read` counts the blocks that are read of those in which the expert differs from the base; `kept`
    is how many elements a threshold leaves; `bound` is how far the tensor can be from the full merge's (L2).
    """
    from mergepipe.merge.explain import explain
    from mergepipe.merge.plan_file import read_plan

    found = read_plan(plan)
    with open_store(store) as opened:
        tensors = explain(opened, found)
    if json:
        say_json({**plan_as_json(found), "tensors": [asdict(tensor) for tensor in tensors]})
        return
    for line in summary_lines(found):
        say(line)
    say()
    rows = [row for tensor in tensors for row in _rows(tensor)]
    print_table(["tensor", "expert", "read", "bytes", "kept", "bound", "why"], rows, right="read bytes kept bound")


def _rows(tensor: TensorExplanation) -> list[Row]:
    rows: list[Row] = []
    for number, part in enumerate(tensor.experts):
        kept = f"{part.kept_elements / tensor.elements:.1%}" if part.kept_elements >= 0 else "all"
        rows.append(
            [
                tensor.name if number == 0 else "",
                part.expert,
                f"{part.read}/{part.differing}",
                format_size(part.stored_bytes_read),
                kept if part.read else "",
                f"{tensor.bound:.3g}" if number == 0 else "",
                part.reason,
            ]
        )
    return rows
