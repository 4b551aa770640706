"""A plan: what a merge will read and do, fixed before any weight is read.

A frozen value with one canonical JSON form and an id (BLAKE3 of those bytes under the ``plan`` context). It pins the
commits, the method with its parameters, each tensor's thresholds, the access set, the costs, and the certificate. A
plan from a file is read as hostile input: every field is checked, unknown ones are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mergepipe.merge.method import Value
from mergepipe.store.canonical import dump_canonical, load_strict
from mergepipe.store.digest import Digest, hash_record
from mergepipe.store.errors import BadInputError, NotFoundError

PLAN_FORMAT: Final = 1
MAXIMUM_PLAN_BYTES: Final = 256 << 20
MAXIMUM_READS: Final = 1 << 22  # block indices, each distinct list once; a line of text could ask for billions


@dataclass(frozen=True, slots=True)
class Input:
    """One model of a merge: its commit, the name that it was asked for by, and its own parameters."""

    commit: Digest
    name: str
    parameters: Mapping[str, Value] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"commit": self.commit.hex(), "name": self.name, "parameters": dict(self.parameters)}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor.

    ``reads``: for each expert, the indices of its blocks that are read. ``kept``: for each expert, how many elements
    its threshold keeps (-1 where nothing is trimmed). ``thresholds``: float32 bit patterns, 0 where nothing is trimmed.
    ``bound``: how far (L2) the tensor can be from the full merge's.
    """

    reads: tuple[tuple[int, ...], ...]
    thresholds: tuple[int, ...]
    kept: tuple[int, ...]
    bound: float

    def as_json(self) -> dict[str, Any]:
        return {
            "reads": [format_ranges(indices) for indices in self.reads],
            "thresholds": list(self.thresholds),
            "kept": list(self.kept),
            "bound": self.bound,
        }


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes as they lie on disk, and blocks.

    ``expert_bytes_full``: what reading every differing block of every expert would take.
    """

    expert_bytes: int
    expert_bytes_full: int
    base_bytes: int
    computed_blocks: int
    referenced_blocks: int

    def as_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Bound:
    """The certificate: the L2 distance of the result from the full merge, before rounding to the output type.

    ``relative`` is ``absolute`` over ``update``, the bound on a merge that reads nothing, which is at least the size
    of the whole update.
    """

    absolute: float
    relative: float
    update: float

    def as_json(self) -> dict[str, float]:
        return {"absolute": self.absolute, "relative": self.relative, "update": self.update}


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module's head. ``tensors`` has only those that are computed; the others are the base's own."""

    base: Input
    experts: tuple[Input, ...]
    method: str
    method_version: int
    parameters: Mapping[str, Value]
    dtype: str | None
    budget_bytes: int | None
    tensors: Mapping[str, TensorPlan]
    costs: Costs
    bound: Bound

    def as_json(self) -> dict[str, Any]:
        return {
            "format": PLAN_FORMAT,
            "base": self.base.as_json(),
            "experts": [expert.as_json() for expert in self.experts],
            "method": self.method,
            "method_version": self.method_version,
            "parameters": dict(self.parameters),
            "dtype": self.dtype,
            "budget_bytes": self.budget_bytes,
            "tensors": {name: tensor.as_json() for name, tensor in self.tensors.items()},
            "costs": self.costs.as_json(),
            "bound": self.bound.as_json(),
        }

    def encode(self) -> bytes:
        """The canonical bytes; the same inputs give the same bytes on every machine."""
        return dump_canonical(self.as_json())

    @property
    def id(self) -> Digest:
        return hash_record("plan", self.encode())

    def write(self, path: Path) -> None:
        """Write the plan as a file that people can read and compare."""
        text = json.dumps(self.as_json(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def read_plan(path: Path) -> Plan:
    """A plan from a file; raises NotFoundError or BadInputError."""
    try:
        if not path.is_file() and path.exists():
            raise BadInputError(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(MAXIMUM_PLAN_BYTES + 1)
        if len(data) > MAXIMUM_PLAN_BYTES:
            raise BadInputError(f"{path}: {path.stat().st_size} bytes is more than a plan has")
    except FileNotFoundError:
        raise NotFoundError(f"there is no plan {path}", hint="Make one with `mp plan … -o p.json`.") from None
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {error.strerror}") from error
    return decode_plan(data, str(path))


def decode_plan(data: bytes, what: str) -> Plan:
    """Read a plan's bytes strictly; raises BadInputError, whose message begins with ``what``."""
    value = load_strict(data, what)
    try:
        _exactly(value, "the plan", {
            "format", "base", "experts", "method", "method_version", "parameters", "dtype", "budget_bytes",
            "tensors", "costs", "bound",
        })  # fmt: skip
        if type(value["format"]) is not int or value["format"] != PLAN_FORMAT:
            raise ValueError(f"plan format {value['format']!r} is not known here")
        experts = tuple(_input(item, f"experts[{i}]") for i, item in enumerate(_list(value["experts"], "experts")))
        ranges = _Ranges()
        return Plan(
            base=_input(value["base"], "base"),
            experts=experts,
            method=_text(value["method"], "method"),
            method_version=_natural(value["method_version"], "method_version"),
            parameters=_parameters(value["parameters"], "parameters"),
            dtype=None if value["dtype"] is None else _text(value["dtype"], "dtype"),
            budget_bytes=None if value["budget_bytes"] is None else _natural(value["budget_bytes"], "budget_bytes"),
            tensors={
                name: _tensor(item, f"tensors[{name!r}]", len(experts), ranges)
                for name, item in _dict(value["tensors"], "tensors").items()
            },
            costs=_costs(value["costs"]),
            bound=_bound(value["bound"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadInputError(f"{what}: {error}", hint="Make the plan again with `mp plan`.") from error


def format_ranges(indices: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` as ``0-2,5``: sorted, without repeats."""
    parts = []
    start = previous = -2
    for index in [*indices, -2]:
        if index != previous + 1 or index < 0:
            if start >= 0:
                parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = index
        previous = index
    return ",".join(parts)


def parse_ranges(text: str, most: int = MAXIMUM_READS) -> tuple[int, ...]:
    """Inverse of :func:`format_ranges`; raises ValueError for anything it does not write, and over ``most`` indices."""
    indices: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        begin, end = int(first), int(last or first)
        if not 0 <= begin <= end or (indices and begin <= indices[-1]):
            raise ValueError(f"{part[:80]!r} is not a range of blocks")
        if end - begin >= most - len(indices):
            raise ValueError(f"{text[:80]!r} has more blocks than a plan can read")
        indices.extend(range(begin, end + 1))
    if format_ranges(tuple(indices)) != text:
        raise ValueError(f"{text[:80]!r} is not a list of ranges")
    return tuple(indices)


class _Ranges:
    """The lists of ranges of one plan: equal ones become one tuple, and all together have a limit."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, ...]] = {}
        self._left = MAXIMUM_READS

    def parse(self, text: str) -> tuple[int, ...]:
        if text not in self._known:
            self._known[text] = parse_ranges(text, self._left)
            self._left -= len(self._known[text])
        return self._known[text]


def _input(value: Any, where: str) -> Input:
    _exactly(value, where, {"commit", "name", "parameters"})
    commit = Digest.parse(_text(value["commit"], f"{where}.commit"))
    return Input(commit, _text(value["name"], f"{where}.name"), _parameters(value["parameters"], f"{where}.parameters"))


def _tensor(value: Any, where: str, experts: int, ranges: _Ranges) -> TensorPlan:
    _exactly(value, where, {"reads", "thresholds", "kept", "bound"})
    reads = tuple(ranges.parse(_text(item, f"{where}.reads")) for item in _list(value["reads"], where))
    thresholds = tuple(_natural(item, f"{where}.thresholds") for item in _list(value["thresholds"], where))
    kept = tuple(_whole(item, f"{where}.kept") for item in _list(value["kept"], where))
    if not len(reads) == len(thresholds) == len(kept) == experts:
        raise ValueError(f"{where}: needs one entry for each of the {experts} experts")
    if any(bits > 0x7F800000 for bits in thresholds):
        raise ValueError(f"{where}: a threshold is no magnitude")
    return TensorPlan(reads, thresholds, kept, _number(value["bound"], f"{where}.bound"))


def _costs(value: Any) -> Costs:
    _exactly(value, "costs", set(Costs.__slots__))
    return Costs(**{name: _natural(value[name], f"costs.{name}") for name in Costs.__slots__})


def _bound(value: Any) -> Bound:
    _exactly(value, "bound", set(Bound.__slots__))
    return Bound(**{name: _number(value[name], f"bound.{name}") for name in Bound.__slots__})


def _exactly(value: Any, where: str, fields: set[str]) -> None:
    found = set(_dict(value, where))
    if found != fields:
        odd = sorted(found ^ fields)[0]
        raise ValueError(f"{where}: field {odd!r} is {'unknown' if odd in found else 'missing'}")


def _parameters(value: Any, where: str) -> dict[str, Value]:
    return {
        name: item if isinstance(item, bool) else _number(item, f"{where}.{name}", signed=True)
        for name, item in _dict(value, where).items()
    }


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{where} must be an object")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{where} must be a list")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where} must be text")
    return value


def _natural(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{where} must be a whole number from 0 to 2**63 - 1")
    return value


def _whole(value: Any, where: str) -> int:
    if type(value) is not int or not -1 <= value < 1 << 63:
        raise TypeError(f"{where} must be a whole number from -1 to 2**63 - 1")
    return value


def _number(value: Any, where: str, *, signed: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{where} must be a finite number")
    if value < 0 and not signed:
        raise TypeError(f"{where} must not be negative")
    return float(value)
