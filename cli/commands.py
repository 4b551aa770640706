"""The list of commands, and a group that imports only the one that is asked for.

To add a command: write ``cli/NAME.py`` with a function ``command`` (its docstring's first line is the summary) and a
text ``EXAMPLES``, and add a line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from mergepipe.cli.chosen import set_default_store
from mergepipe.cli.conversion import convert_plainly
from mergepipe.cli.help import usage_words, write_examples, write_overview, write_parameters

START: Final = "Start here"
LOOK: Final = "Look"
MERGE: Final = "Merge"
KEEP: Final = "Keep house"


@dataclass(frozen=True, slots=True)
class Entry:
    """One command: its name, the heading it stands under in ``mp --help``, and its docstring's first line."""

    name: str
    group: str
    summary: str


COMMANDS: Final = (
    Entry("init", START, "Make an empty store."),
    Entry("ingest", START, "Store checkpoints; experts as differences from their base."),
    Entry("analyze", START, "Measure what ingest did not: statistics, and previews."),
    Entry("export", START, "Write a commit out again as safetensors."),
    Entry("log", LOOK, "Show where models came from, newest first."),
    Entry("ls", LOOK, "List the refs, or a commit's tensors and files."),
    Entry("show", LOOK, "Show a commit, a tensor or a file in detail."),
    Entry("blame", LOOK, "Say which experts reached each block of a tensor."),
    Entry("diff", LOOK, "Show what changed between two commits."),
    Entry("du", LOOK, "Show what the store takes on disk, and which ref holds it."),
    Entry("methods", MERGE, "List the methods of merging, or describe one."),
    Entry("plan", MERGE, "Decide what a merge will read, before anything is read."),
    Entry("explain", MERGE, "Say what a plan reads of each expert, and why not the rest."),
    Entry("merge", MERGE, "Merge: carry out a recipe or a plan; the result is a commit."),
    Entry("branch", KEEP, "List branches, or make one."),
    Entry("tag", KEEP, "List tags, or make one; tags do not move."),
    Entry("rm", KEEP, "Remove refs; what they stood for stays in the store."),
    Entry("gc", KEEP, "Free disk space: remove what no ref needs any more."),
    Entry("repack", KEEP, "Store blocks in fewer bytes; ids and contents stay the same."),
    Entry("verify", KEEP, "Check every byte of the store against its id."),
    Entry("recover", KEEP, "Rebuild a lost or damaged catalog from the objects."),
    Entry("heal", KEEP, "Put back what is damaged or lost, from a copy or a checkpoint."),
    Entry("doctor", KEEP, "Look at the store and the machine, and say what may go wrong."),
)
_SETTINGS: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_BY_NAME: Final = {entry.name: entry for entry in COMMANDS}


class Command(TyperCommand):
    """A command with plain help, whose examples are shown as they were written."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return usage_words(self.get_params(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_parameters(formatter, self.get_params(ctx))

    def get_help_option(self, ctx: Any) -> Any:
        return convert_plainly(super().get_help_option(ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  # the parser's interface
        write_examples(formatter, self.epilog or "")


class Commands(TyperGroup):
    """All commands, each imported when it is asked for."""

    def get_help_option(self, ctx: Any) -> Any:
        return convert_plainly(super().get_help_option(ctx))

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(_BY_NAME)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name in _BY_NAME and cmd_name not in self.commands:
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in _BY_NAME and not args[0].startswith("-"):
            from mergepipe.store.errors import UsageError, nearest

            hint = nearest(args[0], _BY_NAME) or "`mp --help` lists the commands."
            raise UsageError(f"there is no command {args[0]!r}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for heading in (START, LOOK, MERGE, KEEP):
            rows = [(entry.name, entry.summary) for entry in COMMANDS if entry.group == heading]
            if rows:
                groups[heading] = rows
        write_overview(formatter, groups, self.get_params(ctx))


def _load(name: str) -> Any:
    module = import_module(f"mergepipe.cli.{name}")
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, cls=Command, epilog=module.EXAMPLES, context_settings=_SETTINGS)(module.command)
    command = typer.main.get_command(alone)
    for param in command.params:
        convert_plainly(param)
    return command


def build() -> Any:
    """The whole command line, ready to parse."""
    app = typer.Typer(cls=Commands, rich_markup_mode=None, add_completion=True, context_settings=_SETTINGS)
    app.callback()(_before)
    group = typer.main.get_command(app)
    for param in group.params:
        convert_plainly(param)
    return group


def _print_version(value: bool) -> None:
    if value:
        from mergepipe.cli.terminal import say
        from mergepipe.store.version import VERSION

        say(f"mp (mergepipe) {VERSION}")
        raise typer.Exit


def _before(
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="The store, or the folder that holds it (also: MP_STORE)."),
    ] = None,
    version: Annotated[  # noqa: ARG001  # its callback does the work
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    set_default_store(store)
