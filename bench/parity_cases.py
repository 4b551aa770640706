"""The cases of ``parity.py``: a grid of parameters, shapes, numbers of experts and kinds of data for each method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = Mapping[str, float | bool]
SHAPES = [(4001,), (61, 67), (5, 31, 29)]
WEIGHTS = [(1.0,), (0.6, 0.4), (0.5, 0.3, 0.25), (1.0, -0.4, 0.7, 0.2, 0.9), (0.3, 0.1, 0.7, 1.3, 0.2, 0.5, 0.9, 0.11)]
DENSITIES = [0.1, 0.33, 0.5, 0.75, 0.999]


def _own(weights: Sequence[float], **each: float) -> tuple[Values, ...]:
    """Each expert's parameters; densities spread a little around what is given."""
    return tuple({"weight": weight, **each} for weight in weights)


def cases(make: Callable[..., Any]) -> list[Any]:
    """All of them; ``make`` is ``Case``."""
    return [*_plain(make), *_sparse(make), *_random(make), *_others(make)]


def _plain(make: Callable[..., Any]) -> list[Any]:
    found = []
    for number, weights in enumerate(WEIGHTS):
        shape = SHAPES[number % 3]
        for normalize in (True, False):
            for data in ("normal", "sparse"):
                given: dict[str, Any] = {"shape": shape, "data": data, "seed": number}
                found.append(make("linear", _own(weights), {"normalize": normalize}, **given))
                for scale in (1.0, -0.7):
                    parameters = {"normalize": normalize, "lambda": scale}
                    found.append(make("task_arithmetic", _own(weights), parameters, **given))
    found.append(make("task_arithmetic", _own((0.5, -0.5)), {"normalize": True}))
    found += [make("passthrough", ({"scale": scale},), {}) for scale in (1.0, 0.5, -1.7)]
    return found


def _sparse(make: Callable[..., Any]) -> list[Any]:
    found = []
    for number, density in enumerate([*DENSITIES, 1.0, 1e-9]):
        for weights in WEIGHTS[number % 2 :: 2]:
            given: dict[str, Any] = {"shape": SHAPES[number % 3], "seed": number}
            own = _own(weights, density=density)
            found.append(make("ties", own, {}, **given))
            found.append(make("ties", own, {"normalize": False, "lambda": 1.3}, **given))
            found.append(make("ties", own, {"rescale": True}, data="full", **given))
            found.append(make("ties", own, {}, data="tied", **given))
            for method in ("breadcrumbs", "breadcrumbs_ties"):
                for gamma in (0.0, 0.01, 0.2):
                    own = _own(weights, density=density, gamma=gamma)
                    found.append(make(method, own, {"normalize": gamma == 0.01}, **given))
                found.append(make(method, own, {"rescale": True}, data="full", **given))
                found.append(make(method, own, {}, data="tied", **given))
    return found


def _random(make: Callable[..., Any]) -> list[Any]:
    found = []
    for number, density in enumerate(DENSITIES):
        for weights in WEIGHTS[number % 2 :: 2]:
            for parameters in ({}, {"normalize": True, "lambda": 0.6}, {"rescale": False}):
                for method in ("dare_linear", "dare_ties"):
                    given: dict[str, Any] = {"shape": SHAPES[number % 3], "seed": number}
                    found.append(make(method, _own(weights, density=density), parameters, **given))
                for method in ("della", "della_linear"):
                    given = {"shape": SHAPES[number % 2], "seed": number}
                    epsilon = 0.9 * min(density, 1 - density)
                    found.append(make(method, _own(weights, density=density, epsilon=epsilon), parameters, **given))
    return found


def _others(make: Callable[..., Any]) -> list[Any]:
    found = []
    for number in range(6):
        given: dict[str, Any] = {"shape": SHAPES[number % 3], "seed": number, "data": ("normal", "sparse")[number % 2]}
        experts: tuple[Values, ...] = tuple({} for _ in range(max(2, (number * 3) % 9)))
        found += [make("nearswap", ({},), {"t": t}, **given) for t in (1e-4, 3e-3, 1.0)]
        found += [make("ram", experts, {"epsilon": epsilon}, **given) for epsilon in (1e-5, 3e-3)]
        for parameters in ({}, {"r": 0.5, "alpha": 3.0, "epsilon": 1e-3}):
            found.append(make("ramplus_tl", experts, parameters, **given))
        found += [make("sce", experts, {"select_topk": share}, **given) for share in (1.0, 0.9, 0.3, 0.01)]
        found.append(make("arcee_fusion", ({},), {}, **given))
    return found
