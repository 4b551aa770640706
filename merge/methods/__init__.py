"""The methods of merging, by name: those that come along, one file each, and those of plug-ins.

A distribution adds methods by entry points of the group ``mergepipe.methods``, each a :class:`Method` or a tuple of
them (``docs/plugins.md``). Plug-ins are looked for where a name is none of :data:`METHODS`, or where all are listed; so
one that is broken stands in nobody's way who does not ask for it. These modules declare, and import no kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from mergepipe.merge.method import Method
from mergepipe.merge.methods.arcee_fusion import ARCEE_FUSION
from mergepipe.merge.methods.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from mergepipe.merge.methods.dare import DARE_LINEAR, DARE_TIES
from mergepipe.merge.methods.della import DELLA, DELLA_LINEAR
from mergepipe.merge.methods.karcher import KARCHER
from mergepipe.merge.methods.linear import LINEAR
from mergepipe.merge.methods.model_stock import MODEL_STOCK
from mergepipe.merge.methods.multislerp import MULTISLERP
from mergepipe.merge.methods.nearswap import NEARSWAP
from mergepipe.merge.methods.nuslerp import NUSLERP
from mergepipe.merge.methods.passthrough import PASSTHROUGH
from mergepipe.merge.methods.ram import RAM
from mergepipe.merge.methods.ramplus_tl import RAMPLUS_TL
from mergepipe.merge.methods.sce import SCE
from mergepipe.merge.methods.slerp import SLERP
from mergepipe.merge.methods.task_arithmetic import TASK_ARITHMETIC
from mergepipe.merge.methods.ties import TIES
from mergepipe.store.errors import EnvironmentalError, MergePipeError, UsageError, nearest

ENTRY_POINTS: Final = "mergepipe.methods"
METHODS: Final = {
    method.name: method
    for method in (
        LINEAR,
        TASK_ARITHMETIC,
        PASSTHROUGH,
        NEARSWAP,
        RAM,
        RAMPLUS_TL,
        DARE_LINEAR,
        DARE_TIES,
        TIES,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        DELLA,
        DELLA_LINEAR,
        SCE,
        ARCEE_FUSION,
        SLERP,
        NUSLERP,
        MULTISLERP,
        KARCHER,
        MODEL_STOCK,
    )
}
"""The methods that come along."""


@dataclass(frozen=True, slots=True)
class Plugins:
    """What plug-ins bring: their methods by name, who brings each, and what is wrong with the others."""

    methods: dict[str, Method]
    origins: dict[str, str]
    errors: tuple[MergePipeError, ...]


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        UsageError: there is none; suggests the nearest.
        EnvironmentalError: there is none, and a plug-in that may have it cannot be used.
    """
    if name in METHODS:
        return METHODS[name]
    found = plugins()
    if name in found.methods:
        return found.methods[name]
    if found.errors:
        raise found.errors[0]
    known = [*METHODS, *found.methods]
    raise UsageError(f"there is no method {name!r}", hint=nearest(name, known) or f"Known: {', '.join(known)}.")


@cache
def plugins() -> Plugins:
    """The methods of all installed plug-ins, looked for once."""
    methods: dict[str, Method] = {}
    origins: dict[str, str] = {}
    errors: list[MergePipeError] = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (_origin(point), point.name)):
        try:
            for method in _load(point):
                _check_name(method.name, point, origins)
                methods[method.name], origins[method.name] = method, _origin(point)
        except MergePipeError as error:
            errors.append(error)
    return Plugins(methods, origins, tuple(errors))


def _load(point: EntryPoint) -> Iterator[Method]:
    """The methods of one entry point; raises EnvironmentalError where it has none to give."""
    try:
        value = point.load()
    except Exception as error:  # somebody else's code: whatever it raises, the message says whose it is
        raise _broken(point, f"importing {point.value} failed: {type(error).__name__}: {error}") from error
    for method in value if isinstance(value, tuple) else (value,):
        if not isinstance(method, Method):
            raise _broken(point, f"{point.value} is {type(method).__name__}, neither a Method nor a tuple of them")
        yield method


def _check_name(name: str, point: EntryPoint, origins: dict[str, str]) -> None:
    if name in METHODS or name in origins:
        owner = origins.get(name, "mergepipe itself")
        raise _broken(point, f"it brings a method named {name!r}, a name that {owner} has taken")


def _broken(point: EntryPoint, reason: str) -> EnvironmentalError:
    return EnvironmentalError(
        f"the plug-in {_origin(point)} cannot be used: {reason}",
        hint=f"Mend, update or uninstall {_origin(point)} (entry point {point.name!r} of the group {ENTRY_POINTS!r}).",
    )


def _origin(point: EntryPoint) -> str:
    """The distribution that an entry point belongs to, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
