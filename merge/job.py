"""What there is to do for one output tensor: which tensors of which models go in, and under which setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mergepipe.merge.method import Problem, Value
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.manifest import TensorEntry


@dataclass(frozen=True, slots=True)
class Setting:
    """How some tensors are merged. Models are numbers: 0 is the plan's base, 1 its first expert.

    ``reference``: the model that a tensor's blocks are compared with, and stored against; an unread block counts as
    its. ``based``: whether the reference takes part as the method's base. ``parameters``: of the merge; ``own``: of
    each expert.
    """

    reference: int
    based: bool
    experts: tuple[int, ...]
    parameters: Mapping[str, Value] = field(default_factory=dict)
    own: tuple[Mapping[str, Value], ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor.

    ``setting``: its number in the plan. ``sources``: the tensor's names in the reference and in each expert, None
    where they are all ``name``. ``keys``: for each expert the seed of its masks in this tensor.
    """

    name: str
    setting: int
    sources: tuple[str, ...] | None
    reference: TensorEntry
    experts: tuple[TensorEntry, ...]
    keys: tuple[int, ...]

    def problem(self, setting: Setting) -> Problem:
        """What the method is told of it, without histograms."""
        return Problem(
            self.reference.shape, setting.parameters, setting.own, setting.based, self.keys, (None,) * len(self.experts)
        )


def mask_key(tensor: str, commit: Digest) -> int:
    """The seed of an expert's masks in a tensor: 64 bits of the hash of its commit and the tensor's name."""
    return int.from_bytes(hash_bytes(commit + tensor.encode())[:8], "little")
