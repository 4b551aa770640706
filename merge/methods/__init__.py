"""The methods of merging, by name. One file each."""

from __future__ import annotations

from typing import Final

from mergepipe.merge.method import Method
from mergepipe.merge.methods.linear import LINEAR
from mergepipe.merge.methods.task_arithmetic import TASK_ARITHMETIC
from mergepipe.merge.methods.ties import TIES
from mergepipe.store.errors import UsageError, nearest

METHODS: Final = {method.name: method for method in (LINEAR, TASK_ARITHMETIC, TIES)}


def find_method(name: str) -> Method:
    """A method by name; raises UsageError that suggests the nearest."""
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(
            f"there is no method {name!r}", hint=nearest(name, METHODS) or f"Known: {', '.join(METHODS)}."
        ) from None
