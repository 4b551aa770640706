"""Parameters: their ranges, their defaults, and what is said of those that do not exist."""

from __future__ import annotations

import math

import pytest

from mergepipe.merge.method import Parameter, Problem
from mergepipe.merge.methods import METHODS, find_method
from mergepipe.store.errors import UsageError

DENSITY = METHODS["ties"].parameter("density")
SHARE = Parameter("share", 1.0, "", minimum=0.0, maximum=1.0)
STEPS = Parameter("steps", 10.0, "", minimum=0, maximum=100, whole=True)
NORMALIZE = METHODS["ties"].parameter("normalize")


@pytest.mark.parametrize("value", [1e-9, 0.5, 1.0, 1])
def test_a_value_in_its_range_is_a_number(value: float) -> None:
    found = DENSITY.check(value, "here")
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize("value", [0.0, -0.1, 1.0000001, 1.5, math.nan, math.inf, -math.inf, True, False])
def test_a_value_out_of_its_range_names_the_range_and_the_place(value: float) -> None:
    with pytest.raises(UsageError, match=r"here: density .*must be a number"):
        DENSITY.check(value, "here")


def test_a_minimum_may_be_in_the_range_or_below_it() -> None:
    assert SHARE.check(0, "here") == 0.0
    with pytest.raises(UsageError, match=r"here: density is 0, and must be a number in \(0, 1\]"):
        DENSITY.check(0, "here")


def test_a_whole_number_is_whole() -> None:
    assert STEPS.check(7, "here") == 7.0
    with pytest.raises(UsageError, match=r"here: steps must be a whole number, not 7\.5"):
        STEPS.check(7.5, "here")


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        (SHARE, "[0, 1]"),
        (DENSITY, "(0, 1]"),
        (NORMALIZE, "true or false"),
        (Parameter("free", 1.0, ""), "any number"),
        (Parameter("positive", 1.0, "", minimum=0.0), "[0, ∞]"),
    ],
)
def test_a_range_in_words(parameter: Parameter, text: str) -> None:
    assert parameter.describe_range() == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -1e300])
def test_a_weight_is_a_finite_float32(value: float) -> None:
    with pytest.raises(UsageError, match="weight"):
        METHODS["linear"].parameter("weight").check(value, "here")


@pytest.mark.parametrize(("value", "meant"), [(True, True), (0, False), (1.0, True)])
def test_a_flag_is_true_or_false(value: float, meant: bool) -> None:
    assert NORMALIZE.check(value, "here") is meant


@pytest.mark.parametrize("value", [0.5, 2, math.nan])
def test_a_flag_is_nothing_else(value: float) -> None:
    with pytest.raises(UsageError, match="normalize must be true or false"):
        NORMALIZE.check(value, "here")


def test_defaults_are_filled_in_by_scope() -> None:
    ties = METHODS["ties"]
    assert ties.settle({"density": 0.25}, "here", per_expert=True) == {"weight": 1.0, "density": 0.25}
    assert ties.settle({}, "here", per_expert=False) == {
        "lambda": 1.0, "normalize": True, "rescale": False, "exact": True
    }  # fmt: skip
    assert METHODS["task_arithmetic"].settle({}, "here", per_expert=False) == {
        "lambda": 1.0, "normalize": False, "rescale": False
    }  # fmt: skip
    assert METHODS["linear"].settle({}, "here", per_expert=False) == {"normalize": True}


def test_a_parameter_without_a_default_has_to_be_given() -> None:
    with pytest.raises(UsageError, match="here: t has to be given") as caught:
        METHODS["slerp"].settle({}, "here", per_expert=False)
    assert "how far to go" in str(caught.value.hint)
    assert METHODS["slerp"].settle({"t": 0.25}, "here", per_expert=False) == {"t": 0.25}


@pytest.mark.parametrize(
    ("method", "experts", "based", "match"),
    [
        ("ties", 2, False, "ties needs a base model"),
        ("slerp", 2, True, "slerp takes 1 expert beside the base, not 2"),
        ("nuslerp", 1, True, "nuslerp takes 2 experts, not 1"),
        ("model_stock", 1, True, "model_stock takes at least 2 experts beside the base, not 1"),
    ],
)
def test_inputs_that_a_method_cannot_take(method: str, experts: int, based: bool, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        METHODS[method].check_inputs(experts, based=based)


@pytest.mark.parametrize(
    ("method", "experts", "based"), [("linear", 1, False), ("nuslerp", 2, False), ("ties", 9, True)]
)
def test_inputs_that_a_method_takes(method: str, experts: int, based: bool) -> None:
    METHODS[method].check_inputs(experts, based=based)


def test_deltas_are_taken_where_there_is_a_base() -> None:
    taken = {
        name: [METHODS[name].takes_deltas(based=based) for based in (True, False)] for name in ("linear", "nuslerp")
    }
    assert taken == {"linear": [False, False], "nuslerp": [True, False]}
    assert METHODS["ties"].takes_deltas(based=True)


def test_what_differs_nowhere_stays_where_equal_inputs_give_themselves() -> None:
    """Before its pass nobody knows what slerp makes of a place; of a tensor without a difference everybody does."""
    slerp, average = METHODS["slerp"], METHODS["linear"]
    problem = Problem((4,), {"t": 0.5}, ({},), True, (0,), (None,))
    assert not slerp.keeps(problem, {})
    assert not slerp.stays(problem, {}, differs=True)
    assert slerp.stays(problem, {}, differs=False)
    scaling = Problem((4,), {"normalize": False}, ({"weight": 0.5},), False, (0,), (None,))
    assert not average.stays(scaling, {}, differs=False), "half of what all are is not what they are"


def test_an_unknown_parameter_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="ties has no parameter 'densty'") as caught:
        METHODS["ties"].settle({"densty": 0.3}, "here", per_expert=True)
    assert caught.value.hint == "Did you mean 'density'?"


def test_an_unknown_parameter_without_a_nearest_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        METHODS["linear"].parameter("zzz")
    assert caught.value.hint == "It has weight, normalize."


@pytest.mark.parametrize(("wanted", "hint"), [("tise", "'ties'"), ("task-arithmetic", "'task_arithmetic'")])
def test_an_unknown_method_suggests_the_nearest(wanted: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"there is no method '{wanted}'") as caught:
        find_method(wanted)
    assert hint in str(caught.value.hint)


def test_an_unknown_method_without_a_nearest_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        find_method("zzz")
    assert caught.value.hint == f"Known: {', '.join(METHODS)}."


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_what_they_are(name: str) -> None:
    """The registry's name is the method's, defaults are in range, and a source is named."""
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.source
    for parameter in method.parameters:
        assert parameter.help
        if parameter.default is not None:
            assert parameter.check(parameter.default, "default") == parameter.default
