"""What needs whole rows, in torch: their Gram matrices, and the divergence of two rows' softmaxes (Arcee Fusion).

Sums run in the order of the kernels' (:mod:`mergepipe.merge.gram_kernels`, :mod:`mergepipe.merge.row_kernels`): all
lanes and all rows at once, one piece of the rows after the other. Rows go through in batches, which bounds what float64
takes of the device's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

_BATCH_ELEMENTS: Final = 4 << 20
_PIECE: Final = 512
_LANES: Final = 16
_EPSILON: Final = 1e-8


def split_rows(values: Tensor, width: int) -> Tensor:
    """(n,) as (rows, width), in the same memory."""
    return values.view(-1, width)


def _batches(rows: int, width: int) -> Iterator[slice]:
    step = max(_BATCH_ELEMENTS // width, 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def row_grams(experts: Tensor, width: int) -> Tensor:
    """The Gram matrices of (K, n) vectors' rows, (K, K, rows) float64; only their upper triangles."""
    count = len(experts)
    rows = [split_rows(row, width) for row in experts]
    grams = torch.zeros((count, count, len(rows[0])), dtype=torch.float64, device=experts.device)
    for batch in _batches(len(rows[0]), width + -width % _PIECE):
        for a in range(count):
            first = _widened(rows[a][batch])
            for b in range(a, count):
                second = _widened(rows[b][batch]) if b > a else first
                grams[a, b, batch] = _row_products(first, second)
    return grams


def _widened(rows: Tensor) -> Tensor:
    """As float64, with zeros behind each row to whole pieces."""
    return pad(rows.to(torch.float64), (0, -rows.shape[1] % _PIECE))


def _row_products(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of the rows of two (rows, m * 512) matrices: along a tree within a piece, piece after piece."""
    eighths = (first * second).view(len(first), -1, 4, 2, _PIECE // 8)
    pairs = eighths[:, :, :, 0] + eighths[:, :, :, 1]
    lanes = ((pairs[:, :, 0] + pairs[:, :, 1]) + pairs[:, :, 2]) + pairs[:, :, 3]
    for half in (32, 16, 8):
        lanes = lanes[..., :half] + lanes[..., half:]
    while lanes.shape[-1] > 1:
        lanes = lanes[..., 0::2] + lanes[..., 1::2]
    return _in_order(lanes.squeeze(-1).unbind(1), lanes.new_zeros(len(first)))


def _in_order(terms: tuple[Tensor, ...], total: Tensor) -> Tensor:
    for term in terms:
        total += term
    return total


def importances(expert: Tensor, base: Tensor, width: int) -> Tensor:
    """``|expert - base|`` times the divergence of its row, for whole rows of ``width``."""
    new, old = split_rows(expert, width), split_rows(base, width)
    found = (new - old).abs_()
    for batch in _batches(len(new), width):
        found[batch] *= _divergences(new[batch], old[batch])[:, None]
    return found.view(-1)


def _divergences(expert: Tensor, base: Tensor) -> Tensor:
    """Kullback-Leibler divergences of the rows' softmaxes, each with 1e-8 added, (rows,) float32."""
    p, q = _softmax(expert), _softmax(base)
    return _row_sums(p.mul_(_logarithm(p / q))).clamp_(min=0).to(torch.float32)


def _softmax(rows: Tensor) -> Tensor:
    wide = rows.to(torch.float64)
    powers = _exponential(wide - wide.amax(dim=1, keepdim=True))
    return powers.div_(_row_sums(powers)[:, None]).add_(_EPSILON)


def _row_sums(rows: Tensor) -> Tensor:
    """Sums of rows in 16 lanes, (rows,)."""
    groups = pad(rows, (0, -rows.shape[1] % _LANES)).view(len(rows), -1, _LANES)
    lanes = _in_order(groups.unbind(1), rows.new_zeros(len(rows), _LANES))
    return _in_order(lanes.unbind(1), rows.new_zeros(len(rows)))


def _divided(values: Tensor, by: float) -> Tensor:
    return values / torch.full((), by, dtype=values.dtype, device=values.device)


def _exponential(x: Tensor) -> Tensor:
    """``exp(x)`` for x <= 0 as ``row_kernels`` has it: the same polynomial in the same order."""
    x = x.clamp(min=-700.0)
    whole = torch.floor(x * 1.4426950408889634 + 0.5)
    r = (x - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10
    p = 1.0 + _divided(r, 13.0)
    p = 1.0 + _divided(r * p, 12.0)
    for order in range(11, 1, -1):
        p = 1.0 + r * p * (1.0 / order)
    p = 1.0 + r * p
    return p * ((whole.to(torch.int64) + 1023) << 52).view(torch.float64)


def _logarithm(x: Tensor) -> Tensor:
    """``log(x)`` for normal x > 0, likewise."""
    bits = x.view(torch.int64)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (exponent << 52)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    p = 1.0 / 21.0 + t * (1.0 / 23.0)
    for odd in range(19, 1, -2):
        p = 1.0 / odd + t * p
    return exponent.to(torch.float64) * 0.6931471805599453 + 2.0 * s * (1.0 + t * p)
