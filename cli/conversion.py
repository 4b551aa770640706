"""Parameters become Python values without pydantic.

Typer converts every parameter through pydantic, whose import and schemas take as long as the whole of ``mp log``. The
few types that our commands use are converted here instead. A parameter of any other type, or a Typer that works
otherwise, is left as it is: all still works, only slower (a test sees it).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args, get_origin

import typer

_CONVERTERS: Final[dict[type, tuple[Callable[[Any], Any], str]]] = {
    str: (str, "text"),
    bool: (bool, "yes or no"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    Path: (Path, "a path"),
}


class _Plain:
    """Stands where Typer keeps a parameter's converter."""

    def __init__(self, kind: type, minimum: float | None) -> None:
        self._convert, self._what = _CONVERTERS[kind]
        self._minimum = minimum

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        is_several = bool(getattr(param, "multiple", False)) or param.nargs == -1
        if value is None:
            return () if is_several else None
        return [self._one(item, param, ctx) for item in value] if is_several else self._one(value, param, ctx)

    def _one(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            converted = self._convert(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not {self._what}", ctx=ctx, param=param) from None
        if self._minimum is not None and converted < self._minimum:
            raise typer.BadParameter(f"{value} is less than {self._minimum}", ctx=ctx, param=param)
        return converted


def convert_plainly(param: Any) -> Any:
    """Give a parameter of a plain type a plain converter; returns the parameter."""
    descriptor = getattr(param, "type_descriptor", None)
    if descriptor is None or not hasattr(param, "_runtime_param"):
        return param
    kind = descriptor.annotation
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    info = descriptor.parameter_info
    if kind in _CONVERTERS and info.parser is None and info.max is None:
        param._runtime_param = _Plain(kind, info.min)
    return param
