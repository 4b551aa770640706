"""slerp, nuslerp, multislerp, karcher and model_stock against mergekit's own functions.

The exact answer is mergekit's in float64, on the deltas as float32 has them. Ours is the linear combination with
factors good to 32 bits, rounded once: within 1 unit in the last place of the largest summand. mergekit's float32 is
further off (several units, and where summands cancel, much more), so that distance is held against its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("mergekit")

from mergepipe.merge import gram
from mergepipe.merge.method import Tile
from mergepipe.merge.methods import METHODS
from mergepipe.store.errors import UsageError
from support.gram import CASES, KINDS, SHAPES, Case, exact, make, ours, problem_of, summands, theirs, unit


def fails_there(case: Case, kind: str) -> bool:
    """mergekit has no mean of more than two deltas that are all zero."""
    return case.method == "multislerp" and case.based and kind == "same" and case.experts > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_mergekit(case: Case, kind: str) -> None:
    for number, shape in enumerate(SHAPES):
        base, experts = make(kind, case.experts, shape, number)
        found, _, reach = ours(case, base, experts)
        if fails_there(case, kind):
            assert found.tobytes() == base.tobytes()
            continue
        wanted = exact(case, base, experts)
        scale = summands(case, base, experts, wanted, reach)
        assert np.max(np.abs(found - wanted) / unit(scale)) <= 1
        single = theirs(case, base, experts)
        own = np.abs(single - wanted)
        assert np.all(np.abs(found - single) <= own + unit(scale)), "no further than mergekit from the exact result"


@pytest.mark.parametrize("kind", ["family", "apart", "coarse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_like_mergekit(case: Case, kind: str) -> None:
    base, experts = make(kind, case.experts, (64, 48))
    found, _, reach = ours(case, base, experts)
    rounded = torch.from_numpy(found).bfloat16().double().numpy()
    single = theirs(case, base, experts, out="bfloat16")
    scale = summands(case, base, experts, single, reach)
    assert np.max(np.abs(rounded - single) / unit(scale, "bfloat16")) <= 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_make_no_difference(case: Case) -> None:
    """But for the order of sums, of which no more than the factors' 33rd bit is seen."""
    base, experts = make("family", case.experts, (64, 48))
    found = [ours(case, base, experts, rows)[0] for rows in (64, 32, 3)]
    scale = unit(np.abs(np.stack([base, *experts])).max(axis=0))
    assert all(np.all(np.abs(other - found[0]) <= scale) for other in found[1:])
    assert np.mean(found[1] != found[0]) < 0.01


@pytest.mark.parametrize("off", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher", "slerp"])
def test_nearly_opposite(method: str, off: float) -> None:
    """Factors grow as 1/off. The error stays below 1e-15/off^2 of the result and the factors' 32 bits.

    mergekit's float32 loses 1e-7/off at the least, and nuslerp all of it below 3e-4, where the cosine is -1 to it.
    """
    generator = np.random.default_rng(3)
    first = (generator.standard_normal((64, 48)) * 0.02).astype(np.float32)
    second = (-first + off * generator.standard_normal((64, 48)) * 0.02).astype(np.float32)
    weights = {"nuslerp": (0.4, 0.6), "multislerp": (0.5, 0.5)}.get(method)
    case = Case(method, 2, weights=weights, based=False)
    base, experts = first, [first, second]
    if method == "slerp":
        case, experts = Case(method, 1, {"t": 0.3}), [second]
    found, _, _ = ours(case, base, experts)
    if method == "nuslerp" and off < 3e-4:
        assert np.allclose(found, 0.4 * first + 0.6 * second, atol=1e-8), "the straight line"
        return
    wanted, single = theirs(case, base, experts, torch.float64), theirs(case, base, experts)
    length = np.linalg.norm(wanted)
    distance = float(np.linalg.norm(found - wanted) / length)
    assert distance <= 1e-7 + 2.0**-32 / off + 1e-15 / off**2
    assert distance <= np.linalg.norm(single - wanted) / length


@pytest.mark.parametrize("weights", [(0.4, 0.6), (0.5, 0.5)])
@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_exactly_opposite(method: str, weights: tuple[float, float]) -> None:
    first = np.random.default_rng(5).standard_normal((16, 8)).astype(np.float32)
    case = Case(method, 2, weights=None if method == "karcher" else weights, based=False)
    found, _, _ = ours(case, first, [first, -first])
    share = {"nuslerp": weights[0] - weights[1], "multislerp": np.sign(weights[0] - weights[1]), "karcher": 1.0}[method]
    assert np.allclose(found, share * first, atol=1e-7)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (Case("slerp", 1, {"t": 0.3}), (0, 1)),
        (Case("slerp", 1, {"t": 0.3}), (1, 0)),
        (Case("slerp", 1, {"t": 0.3}), (0, 0)),
        (Case("nuslerp", 2, weights=(0.4, 0.6), based=False), (0, 1, 0)),
        (Case("nuslerp", 2, {"nuslerp_flatten": False}, (0.4, 0.6), based=False), (0, 0, 0)),
        (Case("nuslerp", 2, weights=(1.0, 1.0), based=False), (0, 1e-9, 1)),
        (Case("multislerp", 3, weights=(1.0, 1.0, 1.0), based=False), (0, 1, 0, 2)),
        (Case("karcher", 3, based=False), (0, 1, 0, 2)),
        (Case("karcher", 2, based=False), (0, 0, 0)),
        (Case("karcher", 2, based=False), (0, 1e-9, 1)),
        (Case("model_stock", 2), (1, 1, 1)),
        (Case("model_stock", 3, {"filter_wise": True}), (0, 0, 1, 0)),
        (Case("model_stock", 2), (0, 1e-5, 1e-5)),
    ],
    ids=str,
)
def test_zeros_and_tiny_tensors(case: Case, sizes: tuple[float, ...]) -> None:
    x = np.random.default_rng(7).standard_normal((6, 8)).astype(np.float32)
    base, *experts = (x * np.float32(size) for size in sizes)
    found, _, reach = ours(case, base, experts)
    wanted = exact(case, base, experts)
    assert np.all(np.abs(found - wanted) <= unit(summands(case, base, experts, wanted, reach)))


def test_weights_that_cancel_out_are_errors() -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(UsageError, match="sum to 0"):
        ours(Case("multislerp", 2, weights=(1.0, -1.0)), x, [x, x])
    with pytest.raises(UsageError, match="cancel out"):
        ours(Case("multislerp", 3, weights=(1.0, 1.0, 2.0), based=False), x, [x, x, -x])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reach_is_what_a_delta_moves(case: Case) -> None:
    """With the coefficients held, the result is linear in each expert, by the factor that the certificate uses."""
    base, experts = make("family", case.experts, (64, 48))
    _, coefficients, reach = ours(case, base, experts)
    method, problem = METHODS[case.method], problem_of(case, base.shape)
    assert reach.shape == (case.experts,)
    if case.experts > 1 or case.method == "slerp":
        assert np.isinf(method.reach(problem, method.start(problem))).all()
    if np.isinf(reach).all():
        return
    for number in range(case.experts):
        x = np.zeros((case.experts, base.size), np.float32)
        x[number] = 1
        out = np.empty(base.size, np.float32)
        method.apply(Tile(np.zeros(base.size, np.float32), x, 0, 48), coefficients, out)
        assert np.allclose(out, reach[number], rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_keeps_says_is_so(case: Case) -> None:
    """Elements in which no expert differs stay, if ``keeps`` says so, though others differ."""
    base, experts = make("family", case.experts, (64, 48))
    for expert in experts:
        expert[:32] = base[:32]
    found, coefficients, _ = ours(case, base, experts)
    method, problem = METHODS[case.method], problem_of(case, base.shape)
    for known in (method.start(problem), coefficients):
        if method.keeps(problem, known):
            assert found[:32].tobytes() == base[:32].tobytes()
    if method.idempotent:
        assert ours(case, base, [base.copy() for _ in experts])[0].tobytes() == base.tobytes()


def test_coefficients_keep_32_bits() -> None:
    base, experts = make("family", 3, (64, 48))
    _, coefficients, _ = ours(Case("karcher", 3, based=False), base, experts)
    assert np.array_equal(coefficients["factors"], gram.firm(coefficients["factors"]))
