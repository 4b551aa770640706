"""``adapter_config.json`` as PEFT writes it for LoRA: ranks, scales and what cannot be merged as a low-rank product.

Ranks and alphas are found as PEFT finds them: the first pattern, in the file's order, that matches the end of the
module's path at a dot, else the general value. The scale is ``alpha / rank``, with ``use_rslora``
``alpha / sqrt(rank)`` (Kalajdzievski, 2023).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import regex

from mergepipe.store.canonical import load_strict
from mergepipe.store.errors import BadInputError
from mergepipe.store.snapshot import Snapshot

T = TypeVar("T", int, float)
_PATIENCE_SECONDS: Final = 5.0
CONFIG: Final = "adapter_config.json"
_MAXIMUM_BYTES: Final = 10 << 20
_LARGEST_ALPHA: Final = 1e6
_LARGEST_RANK: Final = 1 << 20
_MERGE_FIRST: Final = "Merge it into its base with PEFT's merge_and_unload, and ingest the result as a model."
_SAVE_AGAIN: Final = "Save the adapter again with PEFT (save_pretrained)."
# Settings under which a merged weight is not `weight + scale * B @ A` of the base's own weight.
_REFUSED: Final = {
    "use_dora": "DoRA rescales whole rows of the result",
    "lora_bias": "it adds biases of its own",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are no linear layer's weight",
    "trainable_token_indices": "it trains single rows of an embedding",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "kasa_config": "KaSA changes the base's weights and the product",
    "monteclora_config": "MonteCLoRA adds samples to the product",
    "arrow_config": "Arrow routes between adapters by token",
}
_CHANGES_THE_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class _Patience:
    """How long one configuration's patterns may still take: some that can be written hardly ever end."""

    seconds: float = field(default_factory=lambda: _PATIENCE_SECONDS)

    def matches(self, pattern: str, module: str) -> bool:
        """Whether the end of a module's path is of that pattern; raises BadInputError where that takes too long."""
        started = time.monotonic()
        try:
            return regex.match(_whole(pattern), module, timeout=max(self.seconds, 1e-3)) is not None
        except TimeoutError as error:
            raise BadInputError(
                f"adapter_config.json: the pattern {pattern!r} takes too long to match {module!r}",
                hint="Write it without repetitions in repetitions, as (a+)+ is.",
            ) from error
        finally:
            self.seconds -= time.monotonic() - started


def _whole(pattern: str) -> str:
    """As PEFT reads it."""
    return rf"(.*\.)?({pattern})$"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What the configuration says about an ordinary LoRA adapter. ``bias``: ``none``, ``all`` or ``lora_only``."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    bias: str
    modules_to_save: tuple[str, ...]
    patience: _Patience = field(default_factory=_Patience, compare=False)

    def rank_of(self, module: str) -> int:
        """The rank that the configuration gives a module."""
        return self._by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """What ``B @ A`` of a module is multiplied by."""
        return self._by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def _by_pattern(self, patterns: Mapping[str, T], module: str, default: T) -> T:
        for pattern, value in patterns.items():
            if self.patience.matches(pattern, module):
                return value
        return patterns.get(module, default)

    def saves(self, module: str) -> bool:
        """Whether a module is, or lies in, one whose path ends in one of ``modules_to_save``."""
        parts = module.split(".")
        paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(path.endswith(saved) for path in paths for saved in self.modules_to_save)


def read_config(snapshot: Snapshot, what: str) -> AdapterConfig:
    """The configuration of an adapter's commit.

    Raises:
        BadInputError: it is missing or cannot be understood, or asks for what is no plain low-rank product; the
            message begins with ``what``.
    """
    if CONFIG not in snapshot.files:
        raise BadInputError(f"{what} has no {CONFIG}", hint="It is no adapter: merge it as a model.")
    if snapshot.files[CONFIG].size > _MAXIMUM_BYTES:
        raise BadInputError(f"{what}: {CONFIG} has more than {_MAXIMUM_BYTES >> 20} MiB")
    where = f"{what}: {CONFIG}"
    value = load_strict(snapshot.read_file(CONFIG), where)
    if not isinstance(value, dict):
        raise BadInputError(f"{where} is no JSON object")
    _check_supported(value, where)
    saved = value.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise _wrong(where, "modules_to_save", saved, "a list of names")
    return AdapterConfig(
        rank=_rank(value.get("r"), where, "r"),
        alpha=_alpha(value.get("lora_alpha"), where, "lora_alpha"),
        rank_pattern=_patterns(value, where, "rank_pattern", _rank),
        alpha_pattern=_patterns(value, where, "alpha_pattern", _alpha),
        use_rslora=_flag(value, where, "use_rslora"),
        fan_in_fan_out=_flag(value, where, "fan_in_fan_out"),
        bias=_bias(value.get("bias", "none"), where),
        modules_to_save=tuple(saved),
    )


def refused(what: str, why: str) -> BadInputError:
    """The error for an adapter that is no plain low-rank product."""
    return BadInputError(f"{what} cannot be merged as a low-rank product: {why}", hint=_MERGE_FIRST)


def _check_supported(value: Mapping[str, Any], where: str) -> None:
    kind = value.get("peft_type")
    if kind != "LORA":
        raise refused(where, f"its peft_type is {kind!r}, and only 'LORA' is one")
    for name, setting in value.items():
        if setting and name in _REFUSED:
            raise refused(where, f"with {name}, {_REFUSED[name]}")
        if setting and name.startswith("use_") and name != "use_rslora":
            raise refused(where, f"{name} is a variant of LoRA that is not known here")
    start = value.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise BadInputError(
            f"{where}: init_lora_weights is {start!r}, which changes the base before the adapter is trained",
            hint="Save the adapter with PEFT's path_initial_model_for_weight_conversion: that gives an ordinary one. "
            + _MERGE_FIRST.replace("Merge it", "Or merge it"),
        )


def _patterns(config: Mapping[str, Any], where: str, name: str, parse: Callable[[Any, str, str], T]) -> Mapping[str, T]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise _wrong(where, name, value, "an object")
    for pattern in value:
        try:
            regex.compile(_whole(pattern))
        except (regex.error, OverflowError, RecursionError) as error:
            raise BadInputError(
                f"{where}: {name} has {pattern!r}, which is no pattern ({error})", hint=_SAVE_AGAIN
            ) from error
    return {pattern: parse(item, where, f"{name} of {pattern!r}") for pattern, item in value.items()}


def _rank(value: Any, where: str, name: str) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
        raise _wrong(where, name, value, "a rank, a whole number from 1 on")
    return value


def _alpha(value: Any, where: str, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST_ALPHA:
        raise _wrong(where, name, value, f"a number up to {_LARGEST_ALPHA:g}")
    return float(value)


def _flag(config: Mapping[str, Any], where: str, name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(where, name, value, "true or false")
    return bool(value)


def _bias(value: Any, where: str) -> str:
    if value not in ("none", "all", "lora_only"):
        raise _wrong(where, "bias", value, "'none', 'all' or 'lora_only'")
    return str(value)


def _wrong(where: str, name: str, value: Any, expected: str) -> BadInputError:
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    return BadInputError(
        f"{where}: {name} is {shown}, not {expected}" if value is not None else f"{where} has no {name}",
        hint=_SAVE_AGAIN,
    )
