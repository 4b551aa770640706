"""Low-rank adapters (PEFT's LoRA) as experts: a delta ``scale * B @ A`` for each tensor that the adapter changes.

An adapter is stored as it comes: ``adapter_config.json`` and tensors such as
``base_model.model.<module>.lora_A.weight``. :func:`read_adapter` says, from the manifest and the configuration,
which tensors of a base it changes and how. :class:`AdapterReader` computes any part of a delta from its two
factors; the whole delta never exists, and what is read is the adapter's bytes.

Configuration and names are a stranger's: what cannot be honoured exactly (DoRA, convolutions, trained biases, adapters
that start from changed weights) is an error, never left out. The result is that of PEFT's ``merge_and_unload`` in
float32.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import adapter_kernels
from mergepipe.merge.adapter_config import CONFIG, AdapterConfig, read_config, refused
from mergepipe.store.chunking import block_elements
from mergepipe.store.codecs import scratch
from mergepipe.store.convert import from_float32
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BadInputError, nearest
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.statistics import to_float32
from mergepipe.store.store import Store

Floats = NDArray[np.float32]
DEFAULT_CACHE_BYTES: Final = 256 << 20
_KEPT: Final = 2  # the most recent factors stay whatever their size: a tensor's blocks come one after another
_PREFIX: Final = "base_model.model."
_KEY: Final = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(.+))?")
_SAVED: Final = re.compile(r"(.+)\.modules_to_save\.(.+)")


@dataclass(frozen=True, slots=True)
class LowRank:
    """``scale * B @ A`` or its transpose: the delta of one tensor of the base.

    ``a``: (rank, columns), ``b``: (rows, rank), with 1s behind where they are those of a 1 x 1 convolution.
    ``transposed``: the target is stored as (columns, rows). ``shape``: the target's.
    """

    a: TensorEntry
    b: TensorEntry
    scale: float
    transposed: bool
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def elements(self) -> int:
        """Of the delta."""
        return self.a.shape[1] * self.b.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter does to a base, by the names of the base's tensors; no name is in both.

    ``replaced``: whole tensors (``modules_to_save``) that stand in the adapter and take the place of the base's.
    """

    deltas: Mapping[str, LowRank]
    replaced: Mapping[str, TensorEntry]


def is_adapter(snapshot: Snapshot) -> bool:
    """Whether a commit holds a PEFT adapter rather than a whole model."""
    return CONFIG in snapshot.files


def read_adapter(store: Store, snapshot: Snapshot, base: Mapping[str, TensorEntry]) -> Adapter:
    """Which tensors of ``base`` an adapter changes, and how.

    Weights are read in one case alone: where the adapter carries a copy of an embedding that it also has a delta for.

    Raises:
        BadInputError: the configuration or the tensors are wrong, do not fit the base, or are no plain low-rank
            product.
    """
    what = f"adapter {snapshot.commit_id.short}"
    config = read_config(snapshot, what)
    modules, whole = _sort(snapshot.tensors, config, what)
    if not modules and not whole:
        raise BadInputError(f"{what} has no LoRA tensors", hint="Is its adapter_model.safetensors empty?")
    names = _targets({module: [f"{module}.weight"] for module in modules}, base, what)
    deltas = _deltas({names[module]: pair for module, pair in modules.items()}, config, base, what)
    places = _targets({key: _places(key) for key in whole}, base, what)
    replaced = {}
    for key, entry in whole.items():
        name = places[key]
        if entry.shape != base[name].shape:
            raise _mismatch(f"{what}: {key} is {list(entry.shape)}", name, base[name].shape)
        if name not in deltas:
            replaced[name] = entry
        elif not _is_copy(store.reader, entry, base[name]):
            raise refused(f"{what}: {key}", "it replaces a tensor that the adapter has a delta for as well")
    return Adapter(deltas, replaced)


class _Pair(NamedTuple):
    """The two factors of a module, whose path in the model is ``module``."""

    module: str
    a: TensorEntry
    b: TensorEntry
    is_embedding: bool


def _sort(
    tensors: Mapping[str, TensorEntry], config: AdapterConfig, what: str
) -> tuple[dict[str, _Pair], dict[str, TensorEntry]]:
    """The adapter's tensors: pairs of factors by module, and whole tensors by name, both without PEFT's prefix."""
    factors: dict[str, dict[str, TensorEntry]] = {}
    whole = {}
    for key, entry in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _KEY.fullmatch(name)
        if match is None:
            if name.endswith(".bias") and config.bias != "none" and not config.saves(name.removesuffix(".bias")):
                raise refused(f"{what}: {key}", f"it is a trained bias (bias={config.bias!r})")
            whole[name] = entry
            continue
        module, kind, rest = match.groups()
        _check_factor(f"{what}: {key}", kind, rest or "", entry)
        if kind in factors.setdefault(module, {}):
            raise BadInputError(f"{what} has more than one {kind} for {module}", hint="Save its adapters one by one.")
        factors[module][kind] = entry
    return {module: _pair(module, found, what) for module, found in factors.items()}, whole


def _check_factor(where: str, kind: str, rest: str, entry: TensorEntry) -> None:
    if kind == "lora_magnitude_vector":
        raise refused(where, "DoRA rescales whole rows of the result")
    if rest == "bias" or rest.endswith(".bias"):
        raise refused(where, "it adds biases of its own (lora_bias)")
    # `weight`, or with the adapter's name before it; an embedding's factors are parameters: the name alone, or nothing
    if rest.count(".") > 1 or ("embedding" not in kind and rest != "weight" and not rest.endswith(".weight")):
        raise BadInputError(f"{where} is no tensor that a LoRA adapter has", hint="Save it again with PEFT.")
    if not entry.element_type.has_statistics:
        raise BadInputError(f"{where} is {entry.dtype}", hint="Save the adapter in BF16, F16 or F32.")


def _pair(module: str, found: Mapping[str, TensorEntry], what: str) -> _Pair:
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if set(found) == {a, b}:
            return _Pair(module, found[a], found[b], is_embedding="embedding" in a)
    raise BadInputError(
        f"{what}: {module} has {' and '.join(sorted(found))}, which is not a pair of factors A and B",
        hint="The adapter is not whole. Save or download it again.",
    )


def _places(key: str) -> list[str]:
    """What a whole tensor may be called in the base: without the wrappers that PEFT puts around its module."""
    match = _SAVED.fullmatch(key)
    if match is None:
        return [key.replace(".base_layer.", ".")]
    module, rest = match.groups()
    return [f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"]  # perhaps with the adapter's name in between


def _targets(wanted: Mapping[str, list[str]], base: Mapping[str, TensorEntry], what: str) -> dict[str, str]:
    """The base's tensor for each of the adapter's, which may be called any of some names."""
    found: dict[str, str] = {}
    missing = []
    for key, names in wanted.items():
        name = next(filter(None, (_find(name, base, what) for name in names)), None)
        if name is None:
            missing.append(names[0])
        elif name in found.values():
            raise BadInputError(f"{what} has two entries for the base's {name}: {key} is the second")
        else:
            found[key] = name
    if missing:
        raise BadInputError(
            f"{what} changes {_some(missing)}, which the base does not have",
            hint=" ".join(filter(None, (nearest(name, base) for name in missing[:3])))
            or "The adapter was trained for another model.",
        )
    return found


def _find(name: str, base: Mapping[str, TensorEntry], what: str) -> str | None:
    """The name as it is, else with one ``model.`` more or less in front."""
    if name in base:
        return name
    others = [other for other in (f"model.{name}", name.removeprefix("model.")) if other in base]
    if len(others) > 1:
        raise BadInputError(f"{what} changes {name}, which may be the base's {others[0]} or {others[1]}")
    return others[0] if others else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _deltas(
    pairs: Mapping[str, _Pair], config: AdapterConfig, base: Mapping[str, TensorEntry], what: str
) -> dict[str, LowRank]:
    """The deltas by the target's name. Where shapes leave it open, the configuration says which are transposed.

    PEFT writes one ``fan_in_fan_out`` for all modules, and in a model that mixes both kinds it is that of the last.
    """
    fits = {name: _orientations(pair, name, base[name], config, what) for name, pair in pairs.items()}
    linear = {name: found for name, found in fits.items() if _is_linear(pairs[name], base[name])}
    unclear = [name for name, found in linear.items() if len(found) > 1]
    if unclear and any(config.fan_in_fan_out not in found for found in linear.values()):
        raise BadInputError(
            f"{what}: fan_in_fan_out is {config.fan_in_fan_out}, which shapes of other tensors contradict, so that it"
            f" is not known how {_some(unclear)} is stored",
            hint="Save an adapter for each kind of layer.",
        )
    deltas = {}
    for name, pair in pairs.items():
        transposed = config.fan_in_fan_out if len(fits[name]) > 1 else fits[name][0]
        scale = config.scale_of(pair.module, pair.a.shape[0])
        deltas[name] = LowRank(pair.a, pair.b, scale, transposed, base[name].shape)
    return deltas


def _orientations(pair: _Pair, name: str, target: TensorEntry, config: AdapterConfig, what: str) -> list[bool]:
    """Whether the target can be ``B @ A`` (False) and its transpose (True); never empty."""
    if not target.element_type.has_statistics:
        raise BadInputError(
            f"{what} changes {name}, which the base has as {target.dtype}",
            hint="Take the model as it was before it was quantised for a base.",
        )
    a, b, shape = (_matrix(entry.shape) for entry in (pair.a, pair.b, target))
    if a is None or b is None or shape is None:
        raise refused(
            f"{what}: {pair.module}",
            f"A is {list(pair.a.shape)}, B is {list(pair.b.shape)}, the base's {name} is {list(target.shape)};"
            " convolutions larger than 1 x 1 are no matrix products",
        )
    rank = config.rank_of(pair.module)
    if not rank == a[0] == b[1]:
        raise BadInputError(
            f"{what}: {pair.module} has A of rank {a[0]} and B of rank {b[1]}, where {CONFIG} says {rank}",
            hint="The configuration and the weights are of different adapters. Download it again.",
        )
    product = (b[0], a[1])
    may_transpose = pair.is_embedding or _is_linear(pair, target)
    fits = [False] * (not pair.is_embedding and shape == product) + [True] * (may_transpose and shape == product[::-1])
    if not fits:
        raise _mismatch(f"{what}: B @ A of {pair.module} is {list(product)}", name, target.shape)
    return fits


def _is_linear(pair: _Pair, target: TensorEntry) -> bool:
    """Whether ``fan_in_fan_out`` is about it: an embedding is always transposed, a convolution never."""
    return not pair.is_embedding and len(target.shape) == 2


def _matrix(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """A matrix's shape, also that of a 1 x 1 convolution; None for anything else."""
    return (shape[0], shape[1]) if len(shape) >= 2 and set(shape[2:]) <= {1} else None


def _mismatch(says: str, name: str, shape: Iterable[int]) -> BadInputError:
    return BadInputError(
        f"{says}, where the base's {name} is {list(shape)}",
        hint="The adapter was trained for another model, or one whose vocabulary was resized.",
    )


def _is_copy(reader: ObjectReader, entry: TensorEntry, base: TensorEntry) -> bool:
    """Whether a tensor is the base's, rounded to the type that it was saved in."""
    if entry.dtype == base.dtype and entry.blocks == base.blocks:
        return True
    if not entry.element_type.has_statistics:
        return False
    own, other = _read(reader, entry, Role.EXPERT), _read(reader, base, Role.BASE)
    rounded = np.empty(entry.nbytes, np.uint8)
    from_float32(other, entry.element_type, rounded)
    to_float32(rounded, entry.element_type, 0, entry.elements, other)
    return own.tobytes() == other.tobytes()


def _read(reader: ObjectReader, entry: TensorEntry, role: Role) -> Floats:
    """A whole tensor as float32, flattened."""
    out = np.empty(entry.elements, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is infinite
        for index, digest in enumerate(entry.blocks):
            start, count = block_elements(entry.shape, entry.chunks, index)
            block = scratch.bytes("factor", entry.element_type.nbytes(count))
            reader.read_block(digest, block, role)
            to_float32(block, entry.element_type, 0, count, out[start : start + count])
    return out


class _Factors(NamedTuple):
    """The delta without its scale is ``left @ right``: (rows, rank) and (rank, columns) of the target."""

    left: Floats
    right: Floats


@dataclass(slots=True)
class _Slot:
    """A pair of factors in the cache; the lock is held while they are read, so that only one thread reads them."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    factors: _Factors | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.factors is None else self.factors.left.nbytes + self.factors.right.nbytes


class AdapterReader:
    """Computes parts of deltas. Safe to share between threads.

    Factors are read once (counted as the expert's) and kept as float32 up to ``cache_bytes``; the least recently used
    go first, and are read again when they are needed again.
    """

    def __init__(self, reader: ObjectReader, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._reader = reader
        self._limit = cache_bytes
        self._slots: OrderedDict[tuple[Digest, Digest, bool], _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def delta_into(self, low: LowRank, start: int, out: Floats) -> None:
        """Elements ``start`` to ``start + out.size`` of the flattened delta; ``out`` is contiguous, of one dimension.

        The bits of an element do not depend on ``start`` and ``out.size``, on threads, or on the machine.

        Raises:
            DamagedError: a factor is missing or not what it was.
            ValueError: the delta has no such elements.
        """
        if start < 0 or start + out.size > low.elements:
            raise ValueError(f"elements {start} to {start + out.size} of a delta that has {low.elements}")
        left, right = self._factors(low)
        adapter_kernels.low_rank(left, right, np.float32(low.scale), start, out)

    def _factors(self, low: LowRank) -> _Factors:
        key = (low.a.id, low.b.id, low.transposed)
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
        with slot.lock:
            if slot.factors is None:
                slot.factors = _load(self._reader, low)
                self._shrink()
            return slot.factors

    def _shrink(self) -> None:
        """Let the oldest go until the rest are within the limit."""
        with self._lock:
            held = sum(slot.nbytes for slot in self._slots.values())
            for key in list(self._slots)[:-_KEPT]:
                if held <= self._limit:
                    break
                if self._slots[key].factors is not None:  # else a thread is just reading them
                    held -= self._slots.pop(key).nbytes


def _load(reader: ObjectReader, low: LowRank) -> _Factors:
    a = _read(reader, low.a, Role.EXPERT).reshape(low.rank, -1)
    b = _read(reader, low.b, Role.EXPERT).reshape(-1, low.rank)
    if low.transposed:
        return _Factors(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
    return _Factors(b, a)
