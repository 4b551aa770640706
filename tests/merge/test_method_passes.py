"""What methods promise beside their formulas: tiles cut anywhere, masks that repeat, exact thresholds, valid bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mergepipe.merge.method import Method
from mergepipe.merge.methods import METHODS
from mergepipe.store.errors import UsageError
from support.methods import coefficients_of, problem_of, run_method

Floats = NDArray[np.float32]
SPARSE = ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear")
OTHERS = ("linear", "task_arithmetic", "passthrough", "nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion")
PARAMETERS: Mapping[str, Mapping[str, float]] = {"nearswap": {"t": 1e-3}, "sce": {"select_topk": 0.4}}


def family(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[Floats, list[Floats]]:
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(shape).astype(np.float32)
    deltas = generator.standard_normal((count, *shape)) * 10.0 ** -generator.integers(1, 4, (count, *[1] * len(shape)))
    return base, [base + delta.astype(np.float32) for delta in deltas]


def inputs(
    method: Method, shape: tuple[int, ...], seed: int = 0
) -> tuple[Floats, list[Floats], list[dict[str, float]]]:
    count = min(method.experts[1] or 3, 3)
    base, experts = family(shape, count, seed)
    own: dict[str, float] = {"weight": 0.7, "density": 0.4, "epsilon": 0.2, "gamma": 0.05, "scale": 1.5}
    known = {parameter.name for parameter in method.parameters if parameter.per_expert}
    return base, experts, [{name: value for name, value in own.items() if name in known} for _ in experts]


@pytest.mark.parametrize("name", [*SPARSE, *OTHERS])
@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    block=st.none() | st.integers(100, 4000),
)
def test_a_result_does_not_depend_on_where_tiles_are_cut(
    name: str, shape: tuple[int, ...], sizes: list[int], block: int | None
) -> None:
    method = METHODS[name]
    base, experts, own = inputs(method, shape)
    parameters: dict[str, Any] = dict(PARAMETERS.get(name, {}))
    if any(parameter.name == "rescale" for parameter in method.parameters):
        parameters["rescale"] = True
    whole = run_method(method, base, experts, parameters, own, tile=1 << 20, block=block)
    cut = run_method(method, base, experts, parameters, own, tile=sizes, block=block)
    np.testing.assert_array_equal(cut.view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("name", [*SPARSE, *OTHERS])
def test_where_no_expert_differs_the_base_stays(name: str) -> None:
    """As ``keeps`` says: a block that is copied and one that is computed are the same."""
    method = METHODS[name]
    base, experts, own = inputs(method, (50, 20))
    own = [{**each, "weight": 1.0} if "weight" in each else {} for each in own]
    for expert in experts:
        expert[10:30] = base[10:30]
    problem = problem_of(method, base, experts, PARAMETERS.get(name), own)
    assert method.keeps(problem, coefficients_of(method, problem, base, experts))
    result = run_method(method, base, experts, PARAMETERS.get(name), own)
    if name == "linear":
        np.testing.assert_allclose(result[10:30], base[10:30], rtol=2e-7)
    else:
        np.testing.assert_array_equal(result[10:30], base[10:30])


def test_what_does_not_keep_the_base() -> None:
    base, experts = family((4, 4), 2)
    halves = problem_of(METHODS["linear"], base, experts, {"normalize": False}, [{"weight": 0.5}, {"weight": 0.4}])
    assert not METHODS["linear"].keeps(halves, METHODS["linear"].start(halves))
    scaled = problem_of(METHODS["passthrough"], base, experts[:1], {}, [{"scale": 2.0}])
    assert not METHODS["passthrough"].keeps(scaled, METHODS["passthrough"].start(scaled))


@pytest.mark.parametrize("name", [*SPARSE, *OTHERS])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_update_is_within_the_reach(name: str, normalize: bool, seed: int) -> None:
    """With nothing read, the result is the base: how far that is off is what ``reach`` bounds, in any part."""
    method = METHODS[name]
    base, experts, own = inputs(method, (30, 40), seed)
    parameters: dict[str, Any] = dict(PARAMETERS.get(name, {}))
    if any(parameter.name == "normalize" for parameter in method.parameters):
        parameters["normalize"] = normalize
    if name in ("linear", "passthrough"):
        own, parameters = ([{"scale": 1.0}], {}) if name == "passthrough" else (own, {})
    problem = problem_of(method, base, experts, parameters, own)
    factors = method.reach(problem, coefficients_of(method, problem, base, experts))
    assert factors.shape == (len(experts),)
    update = (run_method(method, base, experts, parameters, own) - base).astype(np.float64)
    deltas = np.stack([expert.astype(np.float64) - base for expert in experts])
    for part in (slice(None), slice(0, 3), (slice(7, 8), slice(3, 4))):
        norms = np.array([np.linalg.norm(delta[part]) for delta in deltas]) * np.abs(factors)
        bound = norms.sum() if method.error != "whole" else math.sqrt((norms**2).sum())
        assert np.linalg.norm(update[part]) <= bound + 1e-6  # the base's own rounding


def test_reach_is_infinite_where_there_is_no_bound() -> None:
    base, experts = family((8, 8), 2)
    mixed = problem_of(METHODS["ties"], base, experts, {}, [{"weight": 1.0}, {"weight": -0.5}])
    assert np.isinf(METHODS["ties"].reach(mixed, METHODS["ties"].start(mixed))).all()
    thin = problem_of(METHODS["dare_ties"], base, experts, {}, [{"density": 0.5}, {"density": 0.5}])
    assert np.isinf(METHODS["dare_ties"].reach(thin, METHODS["dare_ties"].start(thin))).all()  # before its pass


@pytest.mark.parametrize("density", [1e-9, 0.001, 0.3, 0.77, 0.9999, 1.0])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("coarse", [True, False])
def test_ties_thresholds_are_those_of_a_sort(density: float, exact: bool, coarse: bool) -> None:
    """To the last bit where exact; else those of the same bin, from the histogram alone."""
    method = METHODS["ties"]
    base, experts = family((71, 93), 2)
    if coarse:
        base, experts = base * 0, [np.round(expert - base, 2) for expert in experts]
        experts[1][20:] = 0  # fewer changes than are kept
    problem = problem_of(method, base, experts, {"exact": exact}, [{"density": density}] * 2)
    assert len(method.passes(problem)) == (
        exact and density < 1 and bool((method.start(problem)["bins"] < 32768).any())
    )
    found = coefficients_of(method, problem, base, experts)
    for k, expert in enumerate(experts):
        magnitudes = np.sort(np.abs(expert - base).reshape(-1).view(np.uint32))[::-1]
        kth = int(magnitudes[max(1, int(density * magnitudes.size)) - 1]) if density < 1 else 0
        threshold = kth if exact else kth >> 16 << 16
        assert int(found["thresholds"][k]) == threshold
        assert int(found["kept"][k]) == (magnitudes >= threshold).sum()


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.9, 1.0])
def test_breadcrumbs_keeps_a_range_of_ranks(gamma: float, density: float) -> None:
    method = METHODS["breadcrumbs"]
    _, experts = family((50, 41), 1)
    base = np.zeros((50, 41), np.float32)
    result = run_method(method, base, experts, {}, [{"density": density, "gamma": gamma}])
    size = result.size
    kept = size if density >= 1 else int(density * size)
    skipped = min(int(gamma * size), size - kept)
    order = np.argsort(-np.abs(experts[0]).reshape(-1), kind="stable")
    expected = np.zeros(size, np.float32)
    chosen = order[skipped : skipped + kept]
    expected[chosen] = experts[0].reshape(-1)[chosen]
    np.testing.assert_array_equal(result.reshape(-1), expected)
    problem = problem_of(method, base, experts, {}, [{"density": density, "gamma": gamma}])
    assert int(coefficients_of(method, problem, base, experts)["kept"][0]) == kept


def test_a_threshold_among_infinities_keeps_them_all() -> None:
    base = np.zeros(1000, np.float32)
    expert = np.linspace(0, 1, 1000, dtype=np.float32)
    expert[:300] = np.inf
    result = run_method(METHODS["ties"], base, [expert], {}, [{"density": 0.1}])
    assert np.isinf(result).sum() == 300
    assert (result[300:] == 0).all()


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.05, 0.5, 0.99])
def test_sce_selects_the_largest_variances(share: float) -> None:
    method = METHODS["sce"]
    base, experts = family((40, 60), 4)
    problem = problem_of(method, base, experts, {"select_topk": share})
    found = coefficients_of(method, problem, base, experts)
    deltas = np.stack([expert - base for expert in experts])
    variances = deltas.astype(np.float64).var(axis=0).astype(np.float32)
    wanted = int(np.float32(np.count_nonzero(variances)) * np.float32(share))
    reaching = variances.view(np.uint32) >= found["floor"]
    assert reaching.sum() == wanted
    energies = (deltas.astype(np.float64) ** 2 * reaching).reshape(4, -1).sum(axis=1)
    if wanted:
        np.testing.assert_allclose(found["weights"], energies / energies.sum(), rtol=1e-6)
    else:
        np.testing.assert_array_equal(run_method(method, base, experts, {"select_topk": share}), base)


def test_arcee_fusion_has_exact_quartiles() -> None:
    from mergepipe.merge import row_kernels

    method = METHODS["arcee_fusion"]
    base, experts = family((40, 60), 1)
    importance = np.empty(base.size, np.float32)
    row_kernels.importances(experts[0].reshape(-1), base.reshape(-1), 60, importance)
    found = coefficients_of(method, problem_of(method, base, experts), base, experts)
    ordered = np.sort(importance)
    np.testing.assert_array_equal(found["quartiles"], ordered[[(base.size - 1) * q // 4 for q in (1, 2, 3)]])


def thinned(name: str, density: float, seed: int, keys: list[int], shape: tuple[int, ...] = (64, 257)) -> Floats:
    """What a mask leaves of a delta of ones, or of magnitudes that grow along a row."""
    values = np.linspace(1, 2, shape[-1], dtype=np.float32) * np.ones(shape, np.float32)
    own: dict[str, float] = {"density": density}
    if name.startswith("della"):
        own["epsilon"] = 0.15
    zeros = np.zeros(shape, np.float32)
    parameters = {"seed": seed, "rescale": False, "normalize": False}
    return run_method(METHODS[name], zeros, [values], parameters, [own], keys=keys)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_masks_differ_by_seed_and_expert_and_repeat(name: str) -> None:
    first = thinned(name, 0.5, 0, [7])
    np.testing.assert_array_equal(first, thinned(name, 0.5, 0, [7]))
    for other in (thinned(name, 0.5, 1, [7]), thinned(name, 0.5, 0, [8])):
        agreeing = ((first != 0) == (other != 0)).mean()
        assert abs(agreeing - 0.5) < 0.05


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["dare_linear", "della"])
def test_masks_keep_the_density(name: str, density: float) -> None:
    """Over 20 seeds the share has the mean and the spread of independent draws; nor do neighbours go together."""
    masks = np.stack([thinned(name, density, seed, [7]) != 0 for seed in range(20)])
    count = masks[0].size
    shares = masks.mean(axis=(1, 2))
    spread = math.sqrt(density * (1 - density) / count)
    assert abs(shares.mean() - density) < 4 * spread / math.sqrt(20)
    assert shares.std() < 2 * spread
    for step in (1, 2, 64, 128):
        flat = masks.reshape(20, -1) - masks.mean(axis=0).reshape(-1)
        together = (flat[:, step:] * flat[:, :-step]).mean()
        assert abs(together) < 5 * density * (1 - density) / math.sqrt(20 * count)


def test_della_keeps_larger_magnitudes_more_often() -> None:
    masks = np.stack([thinned("della", 0.5, seed, [7]) != 0 for seed in range(40)])
    shares = masks.mean(axis=(0, 1))  # by rank
    wanted = 0.35 + 0.3 * np.arange(257) / 256
    assert np.abs(shares - wanted).max() < 5 * math.sqrt(0.25 / (40 * 64))
    assert abs((shares - wanted).mean()) < 0.002


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "ties", "breadcrumbs"])
def test_rescaling_keeps_the_l1_norm(name: str) -> None:
    method = METHODS[name]
    _, experts = family((33, 90), 2)
    base = np.zeros((33, 90), np.float32)
    for expert in experts:
        result = run_method(method, base, [expert], {"rescale": True}, [{"density": 0.3}])
        np.testing.assert_allclose(
            np.abs(result).sum(dtype=np.float64), np.abs(expert).sum(dtype=np.float64), rtol=1e-6
        )
        assert 0.2 < np.count_nonzero(result) / result.size < 0.4
    still = run_method(method, base, [base], {"rescale": True}, [{"density": 0.3}])
    np.testing.assert_array_equal(still, base)


def test_a_sweep_pays_for_a_pass_once() -> None:
    """What a pass reads of the coefficients, which is its key, has nothing to do with weights, scale or rescaling."""
    base, experts = family((30, 30), 2)
    for name in ("ties", "breadcrumbs", "dare_ties", "della", "sce", "ramplus_tl"):
        method = METHODS[name]
        own = [{"density": 0.4}] * 2 if name in SPARSE else [{}] * 2
        problems = [problem_of(method, base, experts, PARAMETERS.get(name), own)]
        if name in SPARSE:
            heavy = [{**each, "weight": 2.0} for each in own]
            problems.append(problem_of(method, base, experts, {"lambda": 0.5}, heavy))
        used: list[list[Any]] = []
        for problem in problems:
            known = coefficients_of(method, problem, base, experts)
            used.append([known[name] for step in method.passes(problem) for name in step.uses])
        for other in used[1:]:
            for one, two in zip(used[0], other, strict=True):
                np.testing.assert_array_equal(one, two)


def test_parameters_that_contradict_are_errors() -> None:
    base, experts = family((4, 4), 2)
    with pytest.raises(UsageError, match="sum to zero"):
        run_method(METHODS["linear"], base, experts, {}, [{"weight": 0.1}, {"weight": -0.1}])
    with pytest.raises(UsageError, match="too large"):
        run_method(METHODS["linear"], base, experts, {}, [{"weight": 3e38}, {"weight": 3e38}])
    with pytest.raises(UsageError, match="too large"):
        run_method(METHODS["ties"], base, experts, {}, [{"weight": 3e38}, {"weight": 3e38}])
    with pytest.raises(UsageError, match=r"density 0\.9 and epsilon 0\.15"):
        run_method(METHODS["della"], base, experts, {}, [{"density": 0.5}, {"density": 0.9}])
    run_method(METHODS["della"], base, experts, {}, [{"density": 1.0}, {"density": 1.0}])
    with pytest.raises(UsageError, match="t has to be given"):
        run_method(METHODS["nearswap"], base, experts[:1])


def test_what_each_method_needs() -> None:
    for name in (*SPARSE, *OTHERS):
        method = METHODS[name]
        assert method.histograms == (name in ("ties", "breadcrumbs", "breadcrumbs_ties"))
        assert method.rows == (name in ("della", "della_linear", "arcee_fusion"))
        assert (method.base == "unused") == (name in ("linear", "passthrough"))
        assert replace(method, version=2).name == name


def test_ram_takes_a_single_change_whole() -> None:
    base = np.zeros(4, np.float32)
    experts = [np.array([1, 2, 0, 1e-6], np.float32), np.array([0, 4, 0, 0], np.float32)]
    np.testing.assert_array_equal(run_method(METHODS["ram"], base, experts), [1, 3, 0, 0])
    enlarged = run_method(METHODS["ramplus_tl"], base, experts, {"r": 0.5, "alpha": 1.0})
    np.testing.assert_array_equal(enlarged, [1.5, 3, 0, 0])  # the first shares one of two changes: 1 + 0.5 * 1 / 1
