"""Parameters: their ranges, their defaults, and what is said of those that do not exist."""

from __future__ import annotations

import math

import pytest

from mergepipe.merge.method import Parameter
from mergepipe.merge.methods import METHODS, find_method
from mergepipe.store.errors import UsageError

DENSITY = METHODS["ties"].parameter("density")
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


def test_an_inclusive_minimum_is_in_the_range() -> None:
    assert Parameter("share", 0.0, "", minimum=0.0, maximum=1.0).check(0, "here") == 0.0


def test_defaults_are_filled_in_by_scope() -> None:
    ties = METHODS["ties"]
    assert ties.settle({"density": 0.25}, "here", per_expert=True) == {"weight": 1.0, "density": 0.25}
    assert ties.settle({}, "here", per_expert=False) == {"lambda": 1.0, "normalize": True}
    assert METHODS["task_arithmetic"].settle({}, "here", per_expert=False) == {"lambda": 1.0, "normalize": False}
    assert METHODS["linear"].settle({}, "here", per_expert=False) == {"normalize": True}


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
    assert caught.value.hint == "Known: linear, task_arithmetic, ties."


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_what_they_are(name: str) -> None:
    """The registry's name is the method's, defaults are in range, and a source is named."""
    method = METHODS[name]
    assert method.name == name
    assert "arXiv" in method.source
    for parameter in method.parameters:
        assert parameter.check(parameter.default, "default") == parameter.default
        assert parameter.help
