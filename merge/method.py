"""What a merge method is: its parameters, what it needs to know of a tensor, and a function over tiles.

Every method has one shape, and that shape streams:

1. *Statistics*: values that add up over tiles (a sum, a count, a histogram, a Gram matrix). The magnitude histograms
   that ingest kept come with the :class:`Problem`; what else a method needs it declares as :class:`Pass` es.
2. *Coefficients*: a few numbers for each tensor, computed from the statistics once.
3. *Apply*: one tile of the base and the experts to one tile of the result, elementwise, or within whole rows. It knows
   nothing of blocks or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.errors import UsageError, nearest

Value = float | bool | str
Float32 = NDArray[np.float32]
_LARGEST: Final = float(np.finfo(np.float32).max)  # methods compute in float32


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: its default, its range (inclusive unless ``above``), and whether each expert may have its own.

    ``whole``: only whole numbers. ``default`` None: it has to be given.
    """

    name: str
    default: Value | None
    help: str
    minimum: float = -_LARGEST
    maximum: float = _LARGEST
    above: bool = False
    per_expert: bool = False
    whole: bool = False

    def check(self, value: Value, where: str) -> Value:
        """The value as the method takes it; raises UsageError that names ``where``."""
        if isinstance(self.default, bool):
            if not isinstance(value, bool) and value not in (0, 1):
                raise UsageError(f"{where}: {self.name} must be true or false, not {value!r}")
            return bool(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{where}: {self.name} must be a number, not {value!r}")
        number = float(value)
        low = number <= self.minimum if self.above else number < self.minimum
        if not math.isfinite(number) or low or number > self.maximum:
            left = "(" if self.above else "["
            raise UsageError(
                f"{where}: {self.name} is {value!r}, and must be a number in {left}{self.minimum:g}, {self.maximum:g}]"
            )
        if self.whole and number != int(number):
            raise UsageError(f"{where}: {self.name} must be a whole number, not {value!r}")
        return number

    def describe_range(self) -> str:
        """``(0, 1]``, ``true or false``, ``any number``."""
        if isinstance(self.default, bool):
            return "true or false"
        if self.minimum == -_LARGEST and self.maximum == _LARGEST:
            return "any number"
        left = "(" if self.above else "["
        return f"{left}{self.minimum:g}, {'∞' if self.maximum == _LARGEST else f'{self.maximum:g}'}]"


@dataclass(frozen=True, slots=True)
class Problem:
    """What a method is told of one tensor before anything is read.

    ``shape``: the tensor's. ``parameters``: those of the merge; ``experts``: each expert's own, K of them. ``based``:
    whether a base takes part. ``keys``: a 64-bit number for each expert, from the tensor's name and the expert's
    commit, for seeded masks. ``histograms``: of each expert's delta, its magnitudes counted by the upper 15 bits of
    their float32 patterns; None where the method does not ask for it, or where the expert does not differ.
    """

    shape: tuple[int, ...]
    parameters: Mapping[str, Value]
    experts: tuple[Mapping[str, Value], ...]
    based: bool
    keys: tuple[int, ...]
    histograms: Sequence[NDArray[np.int64] | None]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_elements(self) -> int:
        """Elements along the last axis."""
        return self.shape[-1] if self.shape else 1

    def own(self, name: str) -> NDArray[np.float64]:
        """One parameter of all experts, (K,)."""
        return np.array([float(expert[name]) for expert in self.experts], np.float64)

    def number(self, name: str) -> float:
        """A parameter of the merge."""
        return float(self.parameters[name])

    def flag(self, name: str) -> bool:
        """A parameter of the merge that is true or false."""
        return bool(self.parameters[name])


Coefficients = Mapping[str, NDArray[Any]]
"""What ``apply`` gets for one tensor: named arrays, (K,) in the experts' order, or scalars as 0-dimensional ones."""


@dataclass(slots=True)
class Tile:
    """A run of one tensor's elements. ``base`` is (n,), ``experts`` (K, n) float32, and may be overwritten.

    ``start``: where the run begins in the flattened tensor. ``row``: elements along the last axis; where a method asks
    for whole rows, a tile begins and ends with one.
    """

    base: Float32
    experts: Float32
    start: int
    row: int


class Looks(NamedTuple):
    """Previews of a place (:mod:`mergepipe.store.previews`).

    ``coarse``: which experts' previews are read, (K,); ``contents``: what they hold, (K, bytes), with the codes from
    ``start`` on; ``scales``: (K, S) float32, one for each segment of 1024 elements. Without any, all are empty.
    """

    coarse: NDArray[np.bool_]
    contents: NDArray[np.uint8]
    start: int
    scales: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Stack:
    """A whole block of a place where all are bfloat16: bit patterns, before anything is widened.

    ``blocks``: the experts', (K, n); ``present``: which of them have a block of their own, (K,), the others have the
    base's; ``base``: (n,). ``looks``: the previews of those that are read as such, where the method takes previews.
    """

    blocks: NDArray[np.uint16]
    present: NDArray[np.bool_]
    base: NDArray[np.uint16]
    looks: Looks


Apply = Callable[[Tile, Coefficients, Float32], None]
"""``apply(tile, coefficients, out)`` with ``out`` (n,) float32."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One reading of a whole tensor before it is merged, for statistics that add up over tiles.

    ``state(problem)``: an array of zeros (float64 or int64). ``add(tile, coefficients, state)`` adds a tile's part; the
    parts of blocks are summed in their order, so that the sum depends on neither threads nor time. ``settle(problem,
    coefficients, state)``: the coefficients that follow. ``uses``: names of the coefficients that ``add`` reads; with
    the inputs' ids and ``name`` they are the key under which the state is kept, so a sweep over any other parameter
    pays for it once. ``add_stack``: a shorter way to the same state, bit for bit, from a whole bfloat16 block.
    """

    name: str
    state: Callable[[Problem], NDArray[Any]]
    add: Callable[[Tile, Coefficients, NDArray[Any]], None]
    settle: Callable[[Problem, Coefficients, NDArray[Any]], Coefficients]
    uses: tuple[str, ...] = ()
    add_stack: Callable[[Stack, Coefficients, NDArray[Any]], None] | None = None


def _no_passes(_: Problem) -> tuple[Pass, ...]:
    return ()


def _keeps(_problem: Problem, _coefficients: Coefficients) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    ``start(problem)``: the coefficients as far as they are known before a pass. ``passes(problem)``: those that
    this tensor takes. ``takes``: whether a tile's experts are weights, or deltas to the base (``either``: deltas where
    there is a base). ``base``: whether the method has one. ``experts``: how many it takes, at least and at most.
    ``histograms``: it needs the deltas' magnitude histograms. ``rows``: it needs whole rows in a tile.

    ``error`` and ``reach``: how the certificate bounds what unread blocks can change; ``reach(problem,
    coefficients)`` is a factor for each expert, (K,). ``linear``: the result is linear in the deltas with these
    factors; ``additive``: each expert's part is at most its factor times its delta's norm; ``whole``: a place is read
    whole or not at all, and the result is then off by at most the root of the sum of (factor * norm)^2.

    ``keeps(problem, coefficients)``: whether elements in which no expert differs from the base are the base's in the
    result. ``apply_stack``: a shorter way to the same result, bit for bit, from a whole bfloat16 block to another.
    ``idempotent``: inputs that are all the same give themselves, so a tensor in which no expert differs
    anywhere stays, whatever ``keeps`` says of its places. ``previews(problem)``: whether a coarse delta can stand for
    the exact one: with the same coefficients the result then moves by no more than the expert's factor times what the
    coarse one leaves out. Without it: where the result is linear. ``pinned``: names of coefficients that a plan shows.
    """

    name: str
    version: int
    summary: str
    source: str
    parameters: tuple[Parameter, ...]
    start: Callable[[Problem], Coefficients]
    apply: Apply
    takes: Literal["weights", "deltas", "either"]
    error: Literal["linear", "additive", "whole"]
    reach: Callable[[Problem, Coefficients], NDArray[np.float64]]
    passes: Callable[[Problem], tuple[Pass, ...]] = _no_passes
    keeps: Callable[[Problem, Coefficients], bool] = _keeps
    base: Literal["needed", "optional", "unused"] = "needed"
    experts: tuple[int, int | None] = (1, None)
    histograms: bool = False
    rows: bool = False
    pinned: tuple[str, ...] = ()
    apply_stack: Callable[[Stack, Coefficients, NDArray[np.uint16]], None] | None = None
    idempotent: bool = False
    previews: Callable[[Problem], bool] | None = None

    def takes_deltas(self, *, based: bool) -> bool:
        """Whether a tile's experts are deltas."""
        return self.takes == "deltas" or (self.takes == "either" and based)

    def takes_previews(self, problem: Problem) -> bool:
        """Whether previews can be read in place of blocks."""
        return self.error == "linear" if self.previews is None else self.previews(problem)

    def stays(self, problem: Problem, coefficients: Coefficients, *, differs: bool) -> bool:
        """Whether places in which no expert differs are the base's; ``differs``: whether one does anywhere else."""
        return (self.idempotent and not differs) or self.keeps(problem, coefficients)

    def parameter(self, name: str) -> Parameter:
        """A parameter by name; raises UsageError that suggests the nearest."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = [parameter.name for parameter in self.parameters]
        raise UsageError(
            f"{self.name} has no parameter {name!r}",
            hint=nearest(name, known) or (f"It has {', '.join(known)}." if known else "It has none."),
        )

    def settle(self, given: Mapping[str, Value], where: str, *, per_expert: bool) -> dict[str, Value]:
        """All parameters of one scope with their values, defaults filled in; raises UsageError for unknown ones."""
        for name in given:
            self.parameter(name)
        return {
            parameter.name: parameter.check(_given(given, parameter, where), where)
            for parameter in self.parameters
            if parameter.per_expert == per_expert
        }

    def check_inputs(self, experts: int, *, based: bool) -> None:
        """Raises UsageError where these are not inputs that the method can take."""
        least, most = self.experts
        if self.base == "needed" and not based:
            raise UsageError(f"{self.name} needs a base model", hint="Name it with --base, or as base_model.")
        if experts < least or (most is not None and experts > most):
            wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            beside = " beside the base" if self.base == "needed" else ""
            raise UsageError(f"{self.name} takes {wanted} expert{'s' * (wanted != '1')}{beside}, not {experts}")


def _given(given: Mapping[str, Value], parameter: Parameter, where: str) -> Value:
    value = given.get(parameter.name, parameter.default)
    if value is None:
        raise UsageError(f"{where}: {parameter.name} has to be given", hint=f"{parameter.name}: {parameter.help}.")
    return value


WEIGHT: Final = Parameter("weight", 1.0, "how much this expert counts", per_expert=True)
LAMBDA: Final = Parameter("lambda", 1.0, "multiplies the mixed delta before it is added to the base")
NORMALIZE: Final = "normalize"


def scalar(value: float | bool, kind: Any = np.float32) -> NDArray[Any]:
    """A coefficient that is one number."""
    return np.array(value, kind)
