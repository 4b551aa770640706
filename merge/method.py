"""What a merge method is: its parameters, what it needs to know of a tensor, and a function over tiles.

A method's work has three steps. *Statistics* come from the catalog, where ingest put them. *Coefficients* are a few
numbers for each tensor, computed from them once, and pinned by the plan. *Apply* maps one tile of the base and the
experts to one tile of the result, elementwise, and knows nothing of blocks or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.errors import UsageError, nearest

Value = float | bool
_LARGEST: Final = float(np.finfo(np.float32).max)  # methods compute in float32


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: its default, its range (inclusive unless ``above``), and whether each expert may have its own."""

    name: str
    default: Value
    help: str
    minimum: float = -_LARGEST
    maximum: float = _LARGEST
    above: bool = False
    per_expert: bool = False

    def check(self, value: Value, where: str) -> Value:
        """The value as the method takes it; raises UsageError that names ``where``."""
        if isinstance(self.default, bool):
            if not isinstance(value, bool) and value not in (0, 1):
                raise UsageError(f"{where}: {self.name} must be true or false, not {value!r}")
            return bool(value)
        if isinstance(value, bool):
            raise UsageError(f"{where}: {self.name} must be a number, not {value!r}")
        number = float(value)
        low = number <= self.minimum if self.above else number < self.minimum
        if not math.isfinite(number) or low or number > self.maximum:
            left = "(" if self.above else "["
            raise UsageError(
                f"{where}: {self.name} is {value!r}, and must be a number in {left}{self.minimum:g}, {self.maximum:g}]"
            )
        return number


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What ``apply`` gets for one tensor. Arrays are (K,), in the experts' order.

    ``weights`` float32; ``thresholds`` float32 bit patterns of the smallest magnitudes to keep; ``scale`` multiplies
    the mixed delta; ``divisor`` divides a mean.
    """

    weights: NDArray[np.float32]
    thresholds: NDArray[np.uint32]
    scale: np.float32
    divisor: np.float32
    normalize: bool


Apply = Callable[[NDArray[np.float32], NDArray[np.float32], Coefficients, NDArray[np.float32]], None]
"""``apply(base, experts, coefficients, out)``: (n,), (K, n), and (n,) float32. May overwrite ``experts``."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    ``takes``: whether ``experts`` are weights or deltas to the base. ``thresholds``: whether it keeps the largest
    magnitudes of a whole tensor, and so needs its histogram. ``error``: how the certificate bounds what an unread
    block can change: ``additive`` (``|coefficient| * norm`` for each), or ``consensus`` (see
    :mod:`mergepipe.merge.certificate`).
    """

    name: str
    version: int
    summary: str
    source: str
    parameters: tuple[Parameter, ...]
    takes: Literal["weights", "deltas"]
    error: Literal["additive", "consensus"]
    apply: Apply
    thresholds: bool = False

    def parameter(self, name: str) -> Parameter:
        """A parameter by name; raises UsageError that suggests the nearest."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = [parameter.name for parameter in self.parameters]
        raise UsageError(
            f"{self.name} has no parameter {name!r}",
            hint=nearest(name, known) or f"It has {', '.join(known)}.",
        )

    def settle(self, given: Mapping[str, Value], where: str, *, per_expert: bool) -> dict[str, Value]:
        """All parameters of one scope with their values, defaults filled in; raises UsageError for unknown ones."""
        for name in given:
            self.parameter(name)
        return {
            parameter.name: parameter.check(given.get(parameter.name, parameter.default), where)
            for parameter in self.parameters
            if parameter.per_expert == per_expert
        }


WEIGHT: Final = Parameter("weight", 1.0, "how much this expert counts", per_expert=True)
LAMBDA: Final = Parameter("lambda", 1.0, "multiplies the mixed delta before it is added to the base")
