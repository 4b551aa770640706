"""``mp methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mergepipe.cli.options import JsonOption, StoreOption
from mergepipe.cli.tables import Cell, print_table
from mergepipe.cli.terminal import note, paint, say, say_json

if TYPE_CHECKING:
    from mergepipe.merge.method import Method, Parameter

EXAMPLES: Final = """
mp methods
mp methods ties
mp methods slerp --json
"""
_BASES: Final = {"needed": "needed", "optional": "optional", "unused": "not used"}
_BOUNDS: Final = {
    "linear": "exact factors: the result is linear in the experts' deltas",
    "additive": "a sum over what is not read: each expert's part is at most a factor times its delta's norm",
    "whole": "loose: a place is read of all experts or of none, and then off by what its deltas could do at most",
}
_EXAMPLE_VALUES: Final = {"t": "0.5"}  # for parameters that have no default


def command(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Describe this one.")] = None,
    store: StoreOption = None,  # noqa: ARG001  # every command takes it; methods do not depend on it
    json: JsonOption = False,
) -> None:
    """List the methods of merging, or describe one.

    Those that come along, and those that installed plug-ins bring. A description has the method's parameters, the
    inputs that it takes, how a budget's error bound is had, where it was published, and a command to begin with.
    """
    from mergepipe.merge.methods import METHODS, find_method, plugins

    if name is not None:
        found = find_method(name)
        origin = None if name in METHODS else plugins().origins.get(name)
        if json:
            say_json(as_json(found, origin))
        else:
            _describe(found, origin)
        return
    others = plugins()
    every = [*METHODS.values(), *others.methods.values()]
    if json:
        say_json([as_json(method, others.origins.get(method.name)) for method in every])
    else:
        rows = [_row(method, others.origins.get(method.name, "")) for method in every]
        print_table(["method", "what it does", "base", "experts", "source", "plug-in"], rows)
    for error in others.errors:
        note(f"note: {error.message}. {error.hint}")


def _row(method: Method, origin: str) -> list[str | Cell]:
    name = Cell(method.name, "cyan")
    return [name, method.summary, _BASES[method.base], experts_text(method), method.source, origin]


def experts_text(method: Method) -> str:
    """How many experts a method takes: ``1``, ``2 or more``."""
    least, most = method.experts
    if most is None:
        return f"{least} or more"
    return str(least) if least == most else f"{least} to {most}"


def _describe(method: Method, origin: str | None) -> None:
    say(f"{paint(method.name, 'bold')}  {method.summary}")
    say()
    rows = [
        ["  source", method.source],
        ["  base", _BASES[method.base]],
        ["  experts", experts_text(method)],
        ["  bound", _BOUNDS[method.error]],
        ["  version", str(method.version)],
        ["  plug-in", origin or ""],
    ]
    print_table(["", ""], [row for row in rows if row[1]])
    if method.parameters:
        say()
        print_table(
            ["  parameter", "default", "range", "for", "meaning"],
            [_parameter_row(parameter) for parameter in method.parameters],
        )
    say()
    say(f"  {example(method)}")


def _parameter_row(parameter: Parameter) -> list[str | Cell]:
    scope = "each expert" if parameter.per_expert else "the merge"
    return [
        Cell(f"  {parameter.name}", "cyan"), default_text(parameter), parameter.describe_range(), scope, parameter.help,
    ]  # fmt: skip


def default_text(parameter: Parameter) -> str:
    """A parameter's default as it is written on the command line; ``required`` where there is none."""
    default = parameter.default
    if default is None:
        return "required"
    if isinstance(default, bool | str):
        return str(default).lower() if isinstance(default, bool) else default
    return f"{default:g}"


def example(method: Method) -> str:
    """A command that plans a merge by this method, with the parameters that it cannot do without."""
    least, most = method.experts
    names = ["math", "code", "chat"][: max(least, min(2, most or 2))]
    base = [] if method.base == "unused" else ["--base Qwen3-0.6B"]
    needed = [
        f"--param {parameter.name}={_EXAMPLE_VALUES.get(parameter.name, '1')}"
        for parameter in method.parameters
        if parameter.default is None
    ]
    words = ["mp plan", *base, *(f"--expert {name}" for name in names), f"--method {method.name}", *needed, "-o p.json"]
    return " ".join(words)


def as_json(method: Method, origin: str | None) -> dict[str, Any]:
    """A method's declaration; ``plugin`` is null for one that comes along."""
    return {
        "name": method.name,
        "version": method.version,
        "summary": method.summary,
        "source": method.source,
        "plugin": origin,
        "base": method.base,
        "experts": {"least": method.experts[0], "most": method.experts[1]},
        "takes": method.takes,
        "bound": method.error,
        "example": example(method),
        "parameters": [
            {
                "name": parameter.name,
                "default": parameter.default,
                "range": parameter.describe_range(),
                "per_expert": parameter.per_expert,
                "help": parameter.help,
            }
            for parameter in method.parameters
        ],
    }
