"""``mp merge``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption, open_store
from mergepipe.cli.plan import as_json as plan_as_json
from mergepipe.cli.plan import summary_lines
from mergepipe.cli.progress import progress_bar
from mergepipe.cli.tables import plural, seconds_text
from mergepipe.cli.terminal import paint, say, say_json
from mergepipe.store.sizes import format_size

if TYPE_CHECKING:
    from mergepipe.merge.executor import MergeResult

EXAMPLES: Final = """
mp merge --plan p.json --as merged/v1
mp merge --plan p.json --as merged/v1 --message "a third of math"
mp merge --plan p.json --as merged/v1 --dry-run
"""


def command(
    plan: Annotated[Path, typer.Option("--plan", metavar="FILE", help="The plan, as `mp plan` wrote it.")],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="The ref that points at the result.")],
    message: Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="Why; the log shows it.")] = "",
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute every block, also those that an earlier merge has.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the plan and show it; read no weights.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Carry out a plan; the result is a commit.

    Reads what the plan names and nothing else; the bytes are measured, and more than the budget is a failure, not a
    warning. Blocks that no expert changes are referred to, blocks that were computed before are not computed again.
    """
    from mergepipe.merge.executor import execute
    from mergepipe.merge.plan import read_plan
    from mergepipe.merge.validate import check_plan

    found = read_plan(plan)
    with open_store(store) as opened:
        if dry_run:
            found = check_plan(opened, found).plan
            if json:
                say_json(plan_as_json(found))
            else:
                for line in summary_lines(found):
                    say(line)
            return
        with progress_bar(quiet=json) as progress:
            result = execute(opened, found, name, message=message, use_cache=not no_cache, progress=progress)
    if json:
        say_json({**asdict(result), "commit": result.commit.hex(), "plan": result.plan.hex()})
        return
    for line in _lines(result):
        say(line)


def _lines(result: MergeResult) -> list[str]:
    head = f"{paint(result.ref, 'green')}  {paint(result.commit.short, 'yellow')}"
    budget = f" of {format_size(result.budget_bytes)} allowed" if result.budget_bytes is not None else ""
    state = "as it was" if result.unchanged else f"{format_size(result.written_bytes)} written"
    return [
        f"{head}  {state}, {seconds_text(result.elapsed_seconds)}, {format_size(result.peak_memory_bytes)} of memory",
        f"  read {format_size(result.expert_bytes_read)} of the experts{budget}, "
        f"{format_size(result.base_bytes_read)} of the base",
        f"  {plural(result.computed_blocks, 'block')} computed, {result.cached_blocks:,} known from before, "
        f"{result.referenced_blocks:,} the base's own",
    ]
