"""A plan: what a merge will read and do, fixed before any weight is read.

A frozen value with one canonical JSON form and an id (BLAKE3 of those bytes under the ``plan`` context). It pins the
commits, the method with its parameters, each tensor's coefficients, the access set, the costs, and the certificate. A
plan from a file is read as hostile input: every field is checked, unknown ones are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mergepipe.merge.job import Setting
from mergepipe.merge.method import Value
from mergepipe.merge.ranges import format_ranges
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.digest import Digest, hash_record

PLAN_FORMAT: Final = 2
KINDS: Final = ("model", "adapter", "task_vector")
CONFIG_KEYS: Final = ("num_hidden_layers", "torch_dtype")  # what a merge may change in config.json


@dataclass(frozen=True, slots=True)
class Input:
    """One model of a merge: its commit, the name that it was asked for by, and its own parameters.

    ``kind``: a whole ``model``; an ``adapter``, whose low-rank deltas go onto the model ``onto`` (None: the base); or a
    ``task_vector``, a checkpoint of deltas.
    """

    commit: Digest
    name: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    kind: str = "model"
    onto: Digest | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "commit": self.commit.hex(),
            "name": self.name,
            "parameters": dict(self.parameters),
            "kind": self.kind,
            "onto": self.onto.hex() if self.onto else None,
        }


def commits_of(inputs: Iterable[Input]) -> list[Digest]:
    """All commits that inputs are read from: their own, and those that adapters go onto."""
    return [commit for item in inputs for commit in (item.commit, item.onto) if commit is not None]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor.

    ``setting``: which of the plan's. ``sources``: the tensor's names in the reference and in each expert of the
    setting, None where they are its own. ``reads``: for each of these experts, the indices of its blocks that are read.
    ``previews``: likewise, the indices of the blocks of which the preview is read in place of the block; None where
    there are none. ``pinned``: the method's coefficients that a reader may want to see, such as thresholds. ``bound``:
    how far (L2) the tensor can be from the full merge's.
    """

    setting: int
    sources: tuple[str, ...] | None
    reads: tuple[tuple[int, ...], ...]
    pinned: Mapping[str, tuple[float | int, ...]]
    bound: float
    previews: tuple[tuple[int, ...], ...] | None = None

    @property
    def levels(self) -> tuple[tuple[frozenset[int], frozenset[int]], ...]:
        """For each expert, the blocks that are read, and those of which the preview is."""
        coarse = self.previews or ((),) * len(self.reads)
        return tuple((frozenset(a), frozenset(b)) for a, b in zip(self.reads, coarse, strict=True))

    def as_json(self) -> dict[str, Any]:
        found = {
            "setting": self.setting,
            "sources": None if self.sources is None else list(self.sources),
            "reads": [format_ranges(indices) for indices in self.reads],
            "pinned": {name: list(values) for name, values in self.pinned.items()},
            "bound": self.bound,
        }
        if self.previews is not None:
            found["previews"] = [format_ranges(indices) for indices in self.previews]
        return found


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

    ``update`` is the bound on a merge that reads nothing, which is at least the size of the whole update, and
    ``relative`` is ``absolute`` over it. ``estimate``: the likely distance. A merge that reads everything has the
    distance 0, and nobody asks how large its update is: then ``update`` is None.
    """

    absolute: float
    relative: float
    estimate: float
    update: float | None

    def as_json(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module's head.

    ``base``: what the experts are compared with. ``based``: whether it takes part as the method's base. ``variants``:
    settings of tensors that are not merged as the plan's head says; they are numbered from 1. ``complete``: whether
    ``tensors`` has all tensors of the result, or only those that are computed, the others being the base's own.
    ``files``: the model (0 is the base) whose configuration, tokenizer and other files the result gets; ``config``:
    what changes in its config.json.
    """

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
    based: bool = True
    variants: tuple[Setting, ...] = ()
    complete: bool = False
    files: int = 0
    config: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All settings; the first is what the plan's head says."""
        everyone = tuple(range(1, len(self.experts) + 1))
        own = tuple(expert.parameters for expert in self.experts)
        return (Setting(0, self.based, everyone, self.parameters, own), *self.variants)

    @property
    def models(self) -> tuple[Input, ...]:
        """The base and the experts, by their numbers."""
        return (self.base, *self.experts)

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
            "based": self.based,
            "variants": [_setting_json(setting) for setting in self.variants],
            "complete": self.complete,
            "files": self.files,
            "config": dict(self.config),
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


def _setting_json(setting: Setting) -> dict[str, Any]:
    return {
        "reference": setting.reference,
        "based": setting.based,
        "experts": list(setting.experts),
        "parameters": dict(setting.parameters),
        "own": [dict(parameters) for parameters in setting.own],
    }
