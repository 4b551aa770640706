"""The methods against mergekit's own functions, over the grid of ``bench/parity_cases.py``.

The unit is a float32's last place at the sum of the magnitudes that went into an element. Both sides add K products in
float32, so K units are what two ways of adding can differ by; a norm over the whole tensor, which mergekit sums in
float32, may add some.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mergekit.merge_methods import registry

from mergepipe.merge.methods import METHODS
from support.methods import run_method
from support.parity import parity

CASES = parity.all_cases()
NAMES = list(dict.fromkeys(case.method for case in CASES))
EXACT = {"passthrough", "nearswap", "arcee_fusion"}
_FACTOR_ULPS = 4


def allowed(case: parity.Case) -> float:
    """Units of deviation that rounding explains."""
    if case.method in EXACT:
        return 0
    measured = case.method in ("sce", "ramplus_tl") or METHODS[case.method].settle(
        case.parameters, "the merge", per_expert=False
    ).get("rescale", False)
    return len(case.own) + _FACTOR_ULPS * bool(measured)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_mergekit(name: str) -> None:
    """To the last places in float32, except at the magnitude of a threshold; nearly always the same in bfloat16."""
    differing = elements = 0
    for case in CASES:
        if case.method == name:
            wide, narrow, at_threshold = parity.deviations(case)
            assert np.isfinite(wide).all(), case
            assert wide[~at_threshold].max() <= allowed(case), case
            assert narrow[~at_threshold].max() <= 1, case
            differing += int((narrow[~at_threshold] > 0).sum())
            elements += wide.size
    assert elements > 0
    assert differing <= 1e-4 * elements


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_few_elements_stand_at_a_threshold_where_magnitudes_differ(name: str) -> None:
    """The exception above is no way out: with random deltas it is one element for each threshold, or a few."""
    for case in CASES:
        if case.method == name and case.data == "full":
            assert parity.at_threshold(case).sum() <= 2 * len(case.own) + 2, case


def test_arcee_fusion_in_float32_differs_near_the_threshold_alone() -> None:
    """mergekit's divergences lose most digits in float32; both sides choose alike but for importances that close."""
    for case in CASES:
        if case.method == "arcee_fusion":
            base, experts = parity.inputs_of(case)
            mine, theirs = parity.ours(case), parity.oracle(case, torch.float32)
            other = np.abs(mine - theirs) > np.spacing(np.abs(mine))
            assert not (other & ~parity.near_threshold(base, experts[0], 0.02)).any(), case
            assert other.mean() < 0.005, case


def test_parameters_have_the_names_and_defaults_of_mergekit() -> None:
    """Every method has mergekit's parameters, by name; and their defaults, but ``weight``'s, which it does not have."""
    for name in NAMES:
        mine = {parameter.name: parameter for parameter in METHODS[name].parameters}
        for spec in registry.get(name).spec.parameters:
            if spec.name == "int8_mask":
                continue
            assert spec.name in mine, (name, spec.name)
            if spec.name not in ("weight", "scale", "t"):
                assert mine[spec.name].default == spec.default, (name, spec.name)
        known = {spec.name for spec in registry.get(name).spec.parameters}
        assert set(mine) - known <= {"seed", "exact"}, name


def test_a_sum_of_weights_that_vanishes_divides_by_one() -> None:
    base, experts = np.zeros(4, np.float32), [np.full(4, 3, np.float32), np.full(4, 1, np.float32)]
    own = [{"weight": 0.5}, {"weight": -0.5}]
    for name in ("task_arithmetic", "breadcrumbs", "dare_linear", "della_linear"):
        result = run_method(METHODS[name], base, experts, {"normalize": True}, own)
        np.testing.assert_array_equal(result, 1)
