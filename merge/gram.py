"""Coefficients from inner products: what slerp, nuslerp, multislerp, karcher and model_stock compute of a tensor.

Each of these methods gives a linear combination of its inputs, and its coefficients follow from the inputs' Gram matrix
(their inner products, float64) alone. Where many rows or columns have coefficients of their own, the arguments and
results carry one more axis for them. The norm of a combination ``c`` is ``sqrt(c' G c)``; it comes out with an absolute
error of about 1e-8 of the largest summand, so what is smaller than that is no direction (:data:`BLUR`).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLUR: Final = 2.0**-24
"""A float32 cannot tell a cosine from 1 that is nearer to it than half of this, nor can the norms below resolve it."""
_KEPT_BITS: Final = 32
_quiet = np.errstate(invalid="ignore", over="ignore")  # what is not finite gives coefficients that are not


def firm(factors: Array) -> Array:
    """Coefficients without their last bits, in which one machine's sine or square root may differ from another's."""
    mantissa, exponent = np.frexp(factors)
    return np.asarray(np.ldexp(np.rint(np.ldexp(mantissa, _KEPT_BITS)), exponent - _KEPT_BITS))


def mirrored(gram: NDArray[Any]) -> Array:
    """The whole matrix from its upper triangle."""
    upper = np.asarray(gram, np.float64)
    return upper + np.triu(upper, 1).T


def cosine(aa: Array, ab: Array, bb: Array, least: float) -> Array:
    """The cosine of two vectors; a norm below ``least`` counts as that."""
    norms = np.maximum(np.sqrt(aa), least) * np.maximum(np.sqrt(bb), least)
    return np.asarray(np.clip(ab / norms, -1.0, 1.0))


@_quiet
def slerp(aa: float, ab: float, bb: float, t: float) -> Array:
    """The two factors of spherical interpolation (2,): straight where ``|cos|`` is above 0.9995.

    A norm of at most 1e-8 counts as 1.
    """
    norms = [math.sqrt(square) if math.sqrt(square) > 1e-8 else 1.0 for square in (aa, bb)]
    cos = min(max(ab / (norms[0] * norms[1]), -1.0), 1.0)
    straight = np.float32(abs(cos)) > np.float32(0.9995)
    return np.array([1 - t, t]) if straight else _arc(np.array(cos), t)


@_quiet
def nuslerp(aa: Array, ab: Array, bb: Array, t: float) -> Array:
    """The two factors (2, ...) of spherical interpolation: straight only where a float32 takes them for collinear."""
    cos = cosine(aa, ab, bb, 1e-7)
    straight = np.abs(cos).astype(np.float32) == 1
    arc = _arc(np.where(straight, 0.0, cos), t)
    line = np.array([1 - t, t]).reshape(2, *[1] * cos.ndim)
    return np.where(straight, line, arc)


def _arc(cos: Array, t: float) -> Array:
    sin = np.sqrt((1 - cos) * (1 + cos))
    theta = np.arctan2(sin, cos)
    return np.stack([np.sin((1 - t) * theta), np.sin(t * theta)]) / sin


@_quiet
def multislerp(gram: Array, weights: Array, eps: float) -> Array | None:
    """The factors (K,) of the interpolation in the tangent space at the weighted mean of the directions.

    There the weighted sum of the tangents is zero, whatever the weights are: it is the sum of the weighted directions
    less its own projection on the mean, which is the same direction. What remains is the mean at the weighted average
    of the lengths. None where the weighted directions cancel out, so that there is no mean.
    """
    norms = np.sqrt(np.diagonal(gram))
    parts = weights / np.where(norms + eps > 0, norms + eps, 1.0)
    length = _norm(gram, parts)
    if length < eps or length <= BLUR * float(np.sum(np.abs(weights))):
        return None
    return parts * (float(norms @ weights) * math.cos(eps) / length)


@_quiet
def karcher(gram: Array, max_iter: int, tol: float) -> Array:
    """The factors (K,) of the Karcher mean of the directions, at the average of the lengths; all experts count alike.

    Fixed-point iteration on the sphere, every vector given by its coefficients on the directions. Directions of inputs
    no longer than ``tol`` do not count.
    """
    norms = np.sqrt(np.diagonal(gram))
    factors = np.zeros(len(norms))
    valid = np.flatnonzero(~(norms <= tol))
    if valid.size:
        lengths = norms[valid]
        units = gram[np.ix_(valid, valid)] / np.outer(lengths, lengths)
        np.fill_diagonal(units, 1.0)
        factors[valid] = _karcher_of_units(units, max_iter, tol) * norms.mean() / lengths
    return factors


def _karcher_of_units(units: Array, max_iter: int, tol: float) -> Array:
    count = len(units)
    mean = np.full(count, 1.0 / count)
    length = _norm(units, mean)
    mean = np.eye(count)[0] if length < max(tol, BLUR) else mean / length
    for _ in range(max_iter):
        tangent = _tangent(units, mean, tol)
        step = _norm(units, tangent)
        if not step >= max(tol, BLUR):
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / _norm(units, mean)
    return mean


def _tangent(units: Array, mean: Array, tol: float) -> Array:
    """The mean of the directions as seen from ``mean``: each along its great circle, as long as its angle."""
    dots = np.clip(units @ mean, -1.0, 1.0)
    sines = np.sqrt((1 - dots) * (1 + dots))
    angles = np.arctan2(sines, dots)
    seen = (angles >= tol) & (sines > BLUR)  # straight opposite there is no way that is the nearest
    pulls = np.where(seen, angles / np.where(seen, sines, 1.0), 0.0) / len(units)
    return pulls - float(pulls @ dots) * mean


def _norm(gram: Array, factors: Array) -> float:
    return math.sqrt(max(float(factors @ gram @ factors), 0.0))


@_quiet
def model_stock(gram: Array) -> Array:
    """How far to go from the base to the experts' mean: ``K c / (1 + (K - 1) c)``, ``c`` the mean cosine of deltas.

    ``gram`` is (K, K, ...), its upper triangle is used. A product of norms below 1e-6 counts as that; where the
    denominator is below 1e-6 there is no estimate, and the base stays.
    """
    count = gram.shape[0]
    above = np.triu_indices(count, 1)
    lengths = np.sqrt(gram[np.arange(count), np.arange(count)])
    products = np.maximum(lengths[above[0]] * lengths[above[1]], 1e-6)
    cos = np.clip(gram[above] / products, -1.0, 1.0).mean(axis=0)
    denominator = 1 + (count - 1) * cos
    singular = np.abs(denominator) < 1e-6
    return np.asarray(np.where(singular, 0.0, count * cos / np.where(singular, 1.0, denominator)))
