"""Write docs/cli.md from the commands' own help, and the tables of parameters in docs/methods.md.

python docs/generate.py            # writes both
python docs/generate.py --check    # exit code 1 where they are not up to date
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Final

PAGE: Final = Path(__file__).parent / "cli.md"
METHODS_PAGE: Final = PAGE.with_name("methods.md")
_TABLE: Final = re.compile(r"(<!-- parameters of (\w+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
_WIDTH: Final = 100
_HEAD: Final = """\
# The command line

This page is generated from the help texts: `make docs` writes it. `mp --help` and `mp COMMAND --help` show the same.

## For all commands

- **The store** is found upwards from the working directory (`.mp/`), or named by `--store DIR` or `MP_STORE`.
- **`--json`** prints one JSON value on stdout and nothing else there; notes and progress go to stderr. A command that
  fails prints one JSON object instead, as the last line of stderr:
  `{"error": KIND, "message": TEXT, "hint": TEXT or null}`.
- **A commit** is named by a ref (`experts/math`), the first digits of its id (four or more), or either with steps
  behind it: `math~2` is two commits back, `math^2` the second parent, `math@{1}` where the ref was one move ago.
- **Sizes** are read as `500MB` or `2GiB`, and printed in binary units.
- **Ctrl-C** leaves the store as it was.
- `MP_AUTHOR` is who commits are by (else the login name). `NO_COLOR` and `FORCE_COLOR` are heeded.
- `mp --install-completion` teaches your shell to complete commands, options and refs.

## Exit codes

| code | kind | meaning |
|---|---|---|
| 0 | | all is well |
"""
_MEANINGS: Final = {
    "usage": "the command line cannot be understood, or asks for what is not possible",
    "not_found": "a ref, commit, tensor, file or store that is not there",
    "bad_input": "a checkpoint or plan that cannot be trusted or understood; the message names the file and tensor",
    "damaged": "the store's own bytes are not what they were; `mp verify` found something, or a read did",
    "conflict": "somebody else moved what was about to be moved, or a name is taken",
    "budget": "a budget that cannot be met",
    "environment": "disk full, no permission, a filesystem that will not do",
}
_TAIL: Final = """\
| 1 | internal | a mistake in mp itself |
| 130 | interrupted | Ctrl-C |
| 141 | | nobody reads the output any more |
| 143 | | SIGTERM |
"""


def page() -> str:
    """The whole page."""
    os.environ["NO_COLOR"] = "1"
    from mergepipe.cli.commands import COMMANDS, build

    group = build()
    top = group.make_context("mp", [], resilient_parsing=True, terminal_width=_WIDTH)
    parts = [_HEAD + _exit_codes() + _TAIL, _section("mp", group.get_help(top))]
    for entry in COMMANDS:
        command: Any = group.get_command(top, entry.name)
        context = command.make_context(entry.name, [], parent=top, resilient_parsing=True, terminal_width=_WIDTH)
        parts.append(_section(f"mp {entry.name}", command.get_help(context)))
    return "\n".join(parts)


def _exit_codes() -> str:
    from mergepipe.store.errors import MergePipeError

    errors = sorted(MergePipeError.__subclasses__(), key=lambda error: error.exit_code)
    own = [error for error in errors if error.__module__ == "mergepipe.store.errors"]
    return "".join(f"| {error.exit_code} | {error.kind} | {_MEANINGS[error.kind]} |\n" for error in own)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text}\n```\n"


def methods_page(text: str) -> str:
    """docs/methods.md with what stands between the marks of each method's table written anew."""
    from mergepipe.merge.methods import METHODS

    named = [match[2] for match in _TABLE.finditer(text)]
    if sorted(named) != sorted(METHODS):
        raise SystemExit(f"{METHODS_PAGE}: tables of {sorted(set(named) ^ set(METHODS))} are missing, or too many")
    return _TABLE.sub(lambda match: f"{match[1]}{_facts(METHODS[match[2]])}{match[4]}", text)


def _facts(method: Any) -> str:
    from mergepipe.cli.methods import default_text, experts_text

    base = {"needed": "a base and", "optional": "a base or none, and", "unused": "no base,"}[method.base]
    count = experts_text(method)
    takes = f"Takes {base} {count} expert{'s' * (count != '1')}. Source: {method.source}."
    if not method.parameters:
        return f"\n{takes} It has no parameters.\n\n"
    rows = [
        f"| `{parameter.name}` | {default_text(parameter)} | {parameter.describe_range()} | "
        f"{'each expert' if parameter.per_expert else 'the merge'} | {parameter.help} |\n"
        for parameter in method.parameters
    ]
    head = "| parameter | default | range | for | meaning |\n|---|---|---|---|---|\n"
    return f"\n{takes}\n\n{head}{''.join(rows)}\n"


def main() -> int:
    pages = {PAGE: page(), METHODS_PAGE: methods_page(METHODS_PAGE.read_text(encoding="utf-8"))}
    stale = [file for file, text in pages.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file} is not up to date: run `make docs`", file=sys.stderr)
        return int(bool(stale))
    for file, text in pages.items():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
