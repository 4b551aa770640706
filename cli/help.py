"""What ``mp --help`` and the examples below each command look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mergepipe.cli.terminal import paint

_INTRODUCTION: Final = (
    "MergePipe keeps model checkpoints as git keeps files: every block of weights is stored once, named by its "
    "hash; an expert is stored as its difference from the base; every merge remembers what it was made from. "
    "Merges read no more of the experts than their budget allows."
)
_SESSION: Final = """
mp ingest ./Qwen3-0.6B                            # makes a store in ./.mp
mp ingest ./math ./code --base Qwen3-0.6B         # stores the differences
mp plan --base Qwen3-0.6B --expert math:0.6 --expert code:0.4 \\
        --method ties --density 0.3 --budget 10% -o p.json
mp merge --plan p.json --as merged/v1             # reads what the plan says
mp log merged/v1 --graph                          # where it came from
mp export merged/v1 ./out                         # ordinary safetensors
"""


def write_overview(
    formatter: Any, groups: Mapping[str, Sequence[tuple[str, str]]], options: Sequence[tuple[str, str]]
) -> None:
    """The page that ``mp --help`` shows, into a help formatter of the command line's parser."""
    formatter.write("Usage: mp [OPTIONS] COMMAND ...\n")
    formatter.write_paragraph()
    formatter.write_text(_INTRODUCTION)
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    for heading, rows in groups.items():
        _heading(formatter, heading)
        for name, summary in rows:
            formatter.write(f"  {paint(name, 'cyan')}{' ' * (width - len(name))}  {summary}\n")
    _heading(formatter, "Options")
    shown = [(names, text) for names, text in options if "completion" not in names]
    with formatter.indentation():
        formatter.write_dl(shown)
    _heading(formatter, "An example")
    _verbatim(formatter, _SESSION)
    formatter.write("\n`mp COMMAND --help` has the details and more examples.\n")


def write_examples(formatter: Any, examples: str) -> None:
    """A command's examples, line by line as they are."""
    if examples.strip():
        _heading(formatter, "Examples")
        _verbatim(formatter, examples)


def _heading(formatter: Any, text: str) -> None:
    formatter.write_paragraph()
    formatter.write(f"{paint(text + ':', 'bold')}\n")


def _verbatim(formatter: Any, text: str) -> None:
    for line in text.strip("\n").splitlines():
        formatter.write(f"  {line}\n" if line else "\n")
