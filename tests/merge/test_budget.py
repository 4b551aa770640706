"""Budgets as users write them."""

from __future__ import annotations

import math

import pytest

from mergepipe.merge.budget import Budget, parse_budget
from mergepipe.store.errors import UsageError


@pytest.mark.parametrize(
    ("text", "of_1000"),
    [("0", 0), ("500", 500), ("1KiB", 1024), ("10%", 100), (" 0.05% ", 0), ("12.34%", 123), ("100%", 1000), ("0%", 0)],
)
def test_bytes_and_shares(text: str, of_1000: int) -> None:
    assert parse_budget(text).in_bytes(1000) == of_1000


def test_no_budget_and_an_error_do_not_limit_bytes() -> None:
    assert parse_budget(None) == Budget()
    assert Budget().in_bytes(1000) is None
    assert parse_budget(None, 0.1).in_bytes(1000) is None
    assert parse_budget(None, 0.1).relative_error == 0.1


@pytest.mark.parametrize("text", ["", "%", "nan%", "inf%", "-1%", "101%", "ten", "-5", "1e400", "5 apples"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError):
        parse_budget(text)


@pytest.mark.parametrize("error", [math.nan, math.inf, -0.1])
def test_what_is_no_error(error: float) -> None:
    with pytest.raises(UsageError, match="max-error"):
        parse_budget(None, error)


def test_one_of_the_two() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        parse_budget("10%", 0.1)
