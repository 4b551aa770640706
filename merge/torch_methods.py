"""The methods' functions over tiles once more, as torch operations: the forms that run on a GPU.

A form takes a tile on the device and the coefficients that the engine computed, and returns the result (n,) float32. It
does what the kernels do, operation by operation: sums over experts in their order, float64 where they have it, and
random bits by the same hash. torch rounds each operation by itself, where the device's arithmetic is that of IEEE 754
as a kernel's is; and a division is by a tensor, as CUDA multiplies by the reciprocal of a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergepipe.merge import gram
from mergepipe.merge.method import Coefficients, Method
from mergepipe.merge.methods import METHODS
from mergepipe.merge.mix import ALWAYS, MAGNITUDE
from mergepipe.merge.torch_rows import importances, row_grams, split_rows
from mergepipe.store.errors import UsageError

_LEAST: Final = float(np.float32(1e-6))


@dataclass(slots=True)
class TorchTile:
    """A :class:`~mergepipe.merge.method.Tile` on a device: ``base`` (n,) and ``experts`` (K, n), float32.

    Both may be overwritten.
    """

    base: Tensor
    experts: Tensor
    start: int
    row: int


Form = Callable[[TorchTile, Coefficients], Tensor]
"""A method's function over tiles; it may return the tile's own memory."""


def form_of(method: Method) -> Form:
    """The torch form of a method; raises UsageError where it has none."""
    if METHODS.get(method.name) is not method:
        raise UsageError(
            f"{method.name} has no torch form, so it runs on this processor only",
            hint=f"Use --device cpu. Those with one: {', '.join(FORMS)}.",
        )
    return FORMS[method.name]


def _number(value: float, like: Tensor) -> Tensor:
    """A number to divide by."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _floats(values: NDArray[Any]) -> list[float]:
    return [float(value) for value in values]


def _weighted_sum(experts: Tensor, weights: NDArray[np.float32], divisor: float) -> Tensor:
    total = experts[0] * float(weights[0])
    for row, weight in zip(experts[1:], _floats(weights[1:]), strict=True):
        total += row * weight
    return total if divisor == 1 else total.div_(_number(divisor, total))


def _linear(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    return _weighted_sum(tile.experts, coefficients["weights"], float(coefficients["divisor"]))


def _task_arithmetic(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    total = _weighted_sum(tile.experts, coefficients["weights"], float(coefficients["divisor"]))
    return tile.base + total.mul_(float(coefficients["scale"]))


def _passthrough(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    return tile.experts[0] * float(coefficients["scale"][0])


def _nearswap(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    """Comparisons are the kernel's, so that a NaN takes the same way."""
    base, expert = tile.base, tile.experts[0]
    distance = (base - expert).abs_()
    distance = torch.where(distance < _LEAST, _LEAST, distance)
    share = distance.reciprocal_().mul_(float(coefficients["t"]))
    share = torch.where(share < 0, 0.0, share)
    share = torch.where(share > 1, 1.0, share)
    mixed = share * expert + (1 - share) * base
    low, high = torch.where(base < expert, base, expert), torch.where(expert < base, base, expert)
    mixed = torch.where(mixed < low, low, mixed)
    return torch.where(mixed > high, high, mixed)


def _reinforced(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    epsilon = float(coefficients["epsilon"])
    counts = torch.zeros_like(tile.base)
    for row in tile.experts:
        counts += row.abs() > epsilon
    alone = counts == 1
    counts.clamp_(min=1)
    total = torch.zeros_like(tile.base)
    for row, gain in zip(tile.experts, _floats(coefficients["gains"]), strict=True):
        value = row * (row.abs() > epsilon)
        value *= torch.ones_like(value).masked_fill_(alone, gain)
        total += value.div_(counts)
    return tile.base + total


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """The upper 31 of each element's 32 random bits, (count,) int32: ``mask_kernels.hash_pair`` in wrapping int64."""
    z = torch.arange(start >> 1, ((start + count - 1) >> 1) + 1, dtype=torch.int64, device=device)
    z.add_(1).mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
    z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(0x94D049BB133111EB))
    z.bitwise_xor_(_shifted(z, 31))
    halves = torch.stack([(z >> 1) & MAGNITUDE, (z >> 33) & MAGNITUDE], dim=1).to(torch.int32)
    return halves.reshape(-1)[start & 1 :][:count]


def _signed(bits: int) -> int:
    """64 bits as torch takes them."""
    return bits - (1 << 64) if bits >> 63 else bits


def _shifted(values: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (values >> by).bitwise_and_((1 << (64 - by)) - 1)


def _drop(tile: TorchTile, keys: NDArray[np.uint64], chances: NDArray[np.uint32]) -> None:
    """DARE's masks, in place."""
    for row, key, chance in zip(tile.experts, keys, chances, strict=True):
        if chance < ALWAYS:
            bits = random_bits(int(key), tile.start, row.numel(), row.device)
            row.masked_fill_(bits >= int(chance), 0)


def _keep_between(tile: TorchTile, floors: NDArray[np.uint32], ceilings: NDArray[np.uint32]) -> None:
    """Masks by magnitude, in place."""
    for row, floor, ceiling in zip(tile.experts, floors, ceilings, strict=True):
        if floor > MAGNITUDE:
            row.zero_()
        elif floor > 0 or ceiling < MAGNITUDE:
            magnitudes = row.view(torch.int32) & MAGNITUDE
            outside = (magnitudes < int(floor)) | (magnitudes > min(int(ceiling), MAGNITUDE))
            row.masked_fill_(outside, 0)


def _drop_by_rank(tile: TorchTile, keys: NDArray[np.uint64], chances: NDArray[np.uint32]) -> None:
    """DELLA's masks on whole rows, in place."""
    width = tile.row
    for row, key, (low, high) in zip(tile.experts, keys, chances.astype(np.float64), strict=True):
        if low >= ALWAYS:
            continue
        rows = split_rows(row, width)
        order = torch.argsort(rows.view(torch.int32) & MAGNITUDE, dim=1, stable=True)
        places = torch.arange(width, device=row.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, places).to(torch.float64)
        step = (float(high) - float(low)) / (width - 1) if width > 1 else 0.0
        lowest = float(low) if width > 1 else (float(low) + float(high)) / 2
        chance = ranks.mul_(step).add_(lowest).to(torch.int64)
        bits = random_bits(int(key), tile.start, row.numel(), row.device)
        rows.masked_fill_(split_rows(bits, width) >= chance, 0)


def _mixed(tile: TorchTile, coefficients: Coefficients, *, consensus: bool) -> Tensor:
    """The base and the mix of what the masks left."""
    weights = _floats(coefficients["weights"])
    for row, factor, weight in zip(tile.experts, _floats(coefficients["factors"]), weights, strict=True):
        if factor != 1:
            row *= factor
        row *= weight
    total = torch.zeros_like(tile.base)
    for row in tile.experts:
        total += row
    if consensus:
        total = _agreed(tile.experts, total, weights, normalize=bool(coefficients["normalize"]))
    else:
        total /= _number(float(coefficients["divisor"]), total)
    return tile.base + total.mul_(float(coefficients["scale"]))


def _agreed(weighted: Tensor, sums: Tensor, weights: Sequence[float], *, normalize: bool) -> Tensor:
    """The sum of those that have the sign of ``sums``; normalized, over the sum of their weights."""
    sign = _signs(sums)
    total, divisor = torch.zeros_like(sums), torch.zeros_like(sums)
    for row, weight in zip(weighted, weights, strict=True):
        agrees = (row * sign > 0).to(torch.float32)
        total += row * agrees
        divisor += agrees.mul_(weight)
    return total.div_(divisor.masked_fill_(divisor == 0, 1)) if normalize else total


def _signs(sums: Tensor) -> Tensor:
    """1 where a sum is not negative, -1 elsewhere."""
    return (sums >= 0).to(torch.float32).mul_(2).sub_(1)


def _between(tile: TorchTile, coefficients: Coefficients, *, consensus: bool) -> Tensor:
    _keep_between(tile, coefficients["thresholds"], coefficients["ceilings"])
    return _mixed(tile, coefficients, consensus=consensus)


def _dare(tile: TorchTile, coefficients: Coefficients, *, consensus: bool) -> Tensor:
    _drop(tile, coefficients["keys"], coefficients["chances"])
    return _mixed(tile, coefficients, consensus=consensus)


def _della(tile: TorchTile, coefficients: Coefficients, *, consensus: bool) -> Tensor:
    _drop_by_rank(tile, coefficients["keys"], coefficients["chances"])
    return _mixed(tile, coefficients, consensus=consensus)


def _variances(experts: Tensor) -> Tensor:
    """The experts' variance at each element, in float64, rounded to float32."""
    mean = torch.zeros_like(experts[0], dtype=torch.float64)
    count = _number(len(experts), mean)
    for row in experts:
        mean += row
    mean /= count
    sums = torch.zeros_like(mean)
    for row in experts:
        off = row - mean
        sums += off.mul_(off)
    return sums.div_(count).to(torch.float32)


def _sce(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    floor = int(coefficients["floor"])
    sums = torch.zeros_like(tile.base)
    for row in tile.experts:
        sums += row
    sign = _signs(sums)
    total, divisor = torch.zeros_like(sums), torch.zeros_like(sums)
    for row, weight in zip(tile.experts, _floats(coefficients["weights"]), strict=True):
        share = (row * sign > 0).to(torch.float32).mul_(weight)
        total += row * share
        divisor += share
    total /= divisor.clamp_(min=_LEAST)
    if floor:
        patterns = _variances(tile.experts).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        total.masked_fill_(patterns < floor, 0)
    return tile.base + total


def _arcee_fusion(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    expert = tile.experts[0]
    taken = importances(expert, tile.base, tile.row) >= float(coefficients["threshold"])
    return tile.base + (expert - tile.base) * taken


def _combine(tile: TorchTile, base_factor: float, factors: Sequence[float] | Tensor) -> Tensor:
    """A linear combination in float64, rounded once. ``factors``: K numbers, or (K, rows) of each row."""
    width = 1 if isinstance(factors, Sequence) else tile.row
    base = split_rows(tile.base, width).to(torch.float64)
    total = base.mul_(base_factor) if base_factor != 0 else torch.zeros_like(base)
    for row, factor in zip(tile.experts, factors, strict=True):
        own = factor[:, None] if isinstance(factor, Tensor) else factor
        total += split_rows(row, width).to(torch.float64).mul_(own)
    return total.to(torch.float32).reshape(-1)


def _combine_all(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    return _combine(tile, float(coefficients["base_factor"]), _floats(coefficients["factors"]))


def _combine_columns(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    """Each column has its own factors, (2, columns)."""
    own = torch.tensor(coefficients["factors"], dtype=torch.float64, device=tile.base.device)
    places = torch.arange(tile.start, tile.start + tile.base.numel(), device=tile.base.device) % own.shape[1]
    first, second = (row.to(torch.float64).mul_(own[k][places]) for k, row in enumerate(tile.experts))
    total: Tensor = first.add_(second)
    base_factor = float(coefficients["base_factor"])
    if base_factor != 0:
        total += tile.base.to(torch.float64).mul_(base_factor)
    return total.to(torch.float32)


def _combine_rows(
    tile: TorchTile, base_factor: float, factors_of: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> Tensor:
    """Each row has its own factors; those follow from its Gram matrix on the processor, as they do for the kernels."""
    if not tile.base.numel():
        return tile.base
    grams = row_grams(tile.experts, tile.row).cpu().numpy()
    factors = torch.from_numpy(gram.firm(factors_of(grams))).to(tile.base.device)
    return _combine(tile, base_factor, factors)


def _nuslerp(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    def of_rows(grams: NDArray[np.float64]) -> NDArray[np.float64]:
        return gram.nuslerp(grams[0, 0], grams[0, 1], grams[1, 1], float(coefficients["t"]))

    if "factors" not in coefficients:
        return _combine_rows(tile, float(coefficients["base_factor"]), of_rows)
    if coefficients["factors"].ndim == 1:
        return _combine_all(tile, coefficients)
    return _combine_columns(tile, coefficients)


def _model_stock(tile: TorchTile, coefficients: Coefficients) -> Tensor:
    def of_rows(grams: NDArray[np.float64]) -> NDArray[np.float64]:
        share = gram.model_stock(grams) / len(grams)
        return np.broadcast_to(share, (len(grams), *share.shape))

    return _combine_all(tile, coefficients) if "factors" in coefficients else _combine_rows(tile, 1.0, of_rows)


FORMS: Final[Mapping[str, Form]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "passthrough": _passthrough,
    "nearswap": _nearswap,
    "ram": _reinforced,
    "ramplus_tl": _reinforced,
    "dare_linear": partial(_dare, consensus=False),
    "dare_ties": partial(_dare, consensus=True),
    "ties": partial(_between, consensus=True),
    "breadcrumbs": partial(_between, consensus=False),
    "breadcrumbs_ties": partial(_between, consensus=True),
    "della": partial(_della, consensus=True),
    "della_linear": partial(_della, consensus=False),
    "sce": _sce,
    "arcee_fusion": _arcee_fusion,
    "slerp": _combine_all,
    "nuslerp": _nuslerp,
    "multislerp": _combine_all,
    "karcher": _combine_all,
    "model_stock": _model_stock,
}
"""By the method's name: all that come along have one."""
