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


def write_overview(formatter: Any, groups: Mapping[str, Sequence[tuple[str, str]]], params: Sequence[Any]) -> None:
    """The page that ``mp --help`` shows, into a help formatter of the command line's parser."""
    formatter.write("Usage: mp [OPTIONS] COMMAND ...\n")
    formatter.write_paragraph()
    formatter.write_text(_INTRODUCTION)
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    for heading, rows in groups.items():
        _heading(formatter, heading)
        for name, summary in rows:
            formatter.write(f"  {paint(name, 'cyan')}{' ' * (width - len(name))}  {summary}\n")
    write_parameters(formatter, [param for param in params if "completion" not in param.name])
    _heading(formatter, "An example")
    _verbatim(formatter, _SESSION)
    formatter.write("\n`mp COMMAND --help` has the details and more examples.\n")


def usage_words(params: Sequence[Any]) -> list[str]:
    """What follows the command's name in its usage line."""
    return ["[OPTIONS]", *(param.metavar for param in params if param.param_type_name == "argument")]


def write_parameters(formatter: Any, params: Sequence[Any]) -> None:
    """A command's arguments and options, each with what it means."""
    arguments = [(p.metavar, p.help or "") for p in params if p.param_type_name == "argument"]
    options = [(_option_names(p), _option_text(p)) for p in params if p.param_type_name == "option" and not p.hidden]
    for heading, rows in (("Arguments", arguments), ("Options", options)):
        if rows:
            _heading(formatter, heading)
            with formatter.indentation():
                formatter.write_dl(rows)


def _option_names(option: Any) -> str:
    names = "/".join([", ".join(sorted(option.opts, key=len)), *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar or 'NUMBER'}"


def _option_text(option: Any) -> str:
    is_plain = option.is_flag or option.required or option.multiple or option.default in (None, "")
    extra = "  [required]" if option.required else "" if is_plain else f"  [default: {option.default}]"
    return f"{option.help or ''}{extra}"


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
