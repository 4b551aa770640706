"""A plan from a file or an object: read as hostile input, every field checked, unknown ones refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from mergepipe.merge.job import Setting
from mergepipe.merge.method import Value
from mergepipe.merge.plan import CONFIG_KEYS, KINDS, PLAN_FORMAT, Bound, Costs, Input, Plan, TensorPlan
from mergepipe.merge.ranges import Ranges
from mergepipe.store.canonical import brief, load_strict
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, NotFoundError

MAXIMUM_PLAN_BYTES: Final = 256 << 20
MAXIMUM_VARIANTS: Final = 1 << 16
_FIELDS: Final = {
    "format", "base", "experts", "method", "method_version", "parameters", "dtype", "budget_bytes", "based",
    "variants", "complete", "files", "config", "tensors", "costs", "bound",
}  # fmt: skip


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
        return _plan(value)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadInputError(f"{what}: {brief(error)}", hint="Make the plan again with `mp plan`.") from error


def _plan(value: Any) -> Plan:
    if isinstance(value, dict) and value.get("format", PLAN_FORMAT) != PLAN_FORMAT:
        raise ValueError(f"plan format {value.get('format')!r} is not known here")
    _exactly(value, "the plan", _FIELDS)
    _natural(value["format"], "format")
    experts = tuple(_input(item, f"experts[{i}]") for i, item in enumerate(_list(value["experts"], "experts")))
    variants = _list(value["variants"], "variants")
    if len(variants) > MAXIMUM_VARIANTS:
        raise ValueError(f"{len(variants)} variants are more than a plan has")
    settings = tuple(_setting(item, f"variants[{i}]", len(experts)) for i, item in enumerate(variants))
    counts = [len(experts), *(len(setting.experts) for setting in settings)]
    ranges = Ranges()
    return Plan(
        base=_input(value["base"], "base"),
        experts=experts,
        method=_text(value["method"], "method"),
        method_version=_natural(value["method_version"], "method_version"),
        parameters=_parameters(value["parameters"], "parameters"),
        dtype=None if value["dtype"] is None else _text(value["dtype"], "dtype"),
        budget_bytes=None if value["budget_bytes"] is None else _natural(value["budget_bytes"], "budget_bytes"),
        tensors={
            name: _tensor(item, f"tensors[{name!r}]", counts, ranges)
            for name, item in _dict(value["tensors"], "tensors").items()
        },
        costs=_costs(value["costs"]),
        bound=_bound(value["bound"]),
        based=_flag(value["based"], "based"),
        variants=settings,
        complete=_flag(value["complete"], "complete"),
        files=_below(value["files"], "files", len(experts) + 1),
        config=_config(value["config"]),
    )


def _input(value: Any, where: str) -> Input:
    _exactly(value, where, {"commit", "name", "parameters", "kind", "onto"})
    commit = Digest.parse(_text(value["commit"], f"{where}.commit"))
    kind = _text(value["kind"], f"{where}.kind")
    if kind not in KINDS:
        raise ValueError(f"{where}.kind is none of {', '.join(KINDS)}")
    onto = None if value["onto"] is None else Digest.parse(_text(value["onto"], f"{where}.onto"))
    if onto is not None and kind != "adapter":
        raise ValueError(f"{where}: only an adapter goes onto a model")
    parameters = _parameters(value["parameters"], f"{where}.parameters")
    return Input(commit, _text(value["name"], f"{where}.name"), parameters, kind, onto)


def _setting(value: Any, where: str, experts: int) -> Setting:
    _exactly(value, where, {"reference", "based", "experts", "parameters", "own"})
    numbers = tuple(_below(item, f"{where}.experts", experts + 1) for item in _list(value["experts"], where))
    own = tuple(_parameters(item, f"{where}.own") for item in _list(value["own"], where))
    if len(own) != len(numbers):
        raise ValueError(f"{where}: needs parameters for each of its {len(numbers)} experts")
    reference = _below(value["reference"], f"{where}.reference", experts + 1)
    parameters = _parameters(value["parameters"], f"{where}.parameters")
    return Setting(reference, _flag(value["based"], f"{where}.based"), numbers, parameters, own)


def _tensor(value: Any, where: str, counts: list[int], ranges: Ranges) -> TensorPlan:
    coarse = {"previews"} & set(_dict(value, where))
    _exactly(value, where, {"setting", "sources", "reads", "pinned", "bound"} | coarse)
    setting = _below(value["setting"], f"{where}.setting", len(counts))
    reads = tuple(ranges.parse(_text(item, f"{where}.reads")) for item in _list(value["reads"], where))
    if len(reads) != counts[setting]:
        raise ValueError(f"{where}: needs reads for each of the {counts[setting]} experts")
    previews = None
    if coarse:
        previews = tuple(ranges.parse(_text(item, f"{where}.previews")) for item in _list(value["previews"], where))
        if len(previews) != counts[setting] or not any(previews):
            raise ValueError(f"{where}: needs previews for each of the {counts[setting]} experts, or none at all")
        if any(set(exact) & set(coarse) for exact, coarse in zip(reads, previews, strict=True)):
            raise ValueError(f"{where}: reads a block and its preview as well")
    sources = None
    if value["sources"] is not None:
        sources = tuple(_text(item, f"{where}.sources") for item in _list(value["sources"], where))
        if len(sources) != counts[setting] + 1:
            raise ValueError(f"{where}: needs a source for the reference and each of the {counts[setting]} experts")
    pinned = {
        name: tuple(_finite(item, f"{where}.pinned") for item in _list(values, where))
        for name, values in _dict(value["pinned"], f"{where}.pinned").items()
    }
    return TensorPlan(setting, sources, reads, pinned, _number(value["bound"], f"{where}.bound"), previews)


def _config(value: Any) -> dict[str, str | int]:
    for name, item in _dict(value, "config").items():
        if name not in CONFIG_KEYS:
            raise ValueError(f"config: {name!r} is nothing that a merge changes")
        if name == "torch_dtype":
            _text(item, "config.torch_dtype")
        else:
            _natural(item, f"config.{name}")
    return dict(value)


def _costs(value: Any) -> Costs:
    _exactly(value, "costs", set(Costs.__slots__))
    return Costs(**{name: _natural(value[name], f"costs.{name}") for name in Costs.__slots__})


def _bound(value: Any) -> Bound:
    _exactly(value, "bound", set(Bound.__slots__))
    update = None if value["update"] is None else _number(value["update"], "bound.update")
    absolute, relative, estimate = (_number(value[name], f"bound.{name}") for name in Bound.__slots__[:3])
    return Bound(absolute, relative, estimate, update)


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


def _below(value: Any, where: str, limit: int) -> int:
    number = _natural(value, where)
    if number >= limit:
        raise ValueError(f"{where} is {number}, and there are {limit}")
    return number


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{where} must be true or false")
    return value


def _finite(value: Any, where: str) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{where} must hold finite numbers")
    return value


def _number(value: Any, where: str, *, signed: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{where} must be a finite number")
    if value < 0 and not signed:
        raise TypeError(f"{where} must not be negative")
    return float(value)
