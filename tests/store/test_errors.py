"""Errors: kinds and exit codes that scripts rely on, and hints that name the nearest."""

from __future__ import annotations

import pytest

from mergepipe.store import errors


@pytest.mark.parametrize(
    ("name", "kind", "exit_code"),
    [
        ("UsageError", "usage", 2),
        ("NotFoundError", "not_found", 3),
        ("BadInputError", "bad_input", 4),
        ("DamagedError", "damaged", 5),
        ("ConflictError", "conflict", 6),
        ("BudgetError", "budget", 7),
        ("EnvironmentalError", "environment", 8),
    ],
)
def test_kinds_and_exit_codes_are_stable(name: str, kind: str, exit_code: int) -> None:
    error = getattr(errors, name)("what went wrong", hint="what to do")
    assert isinstance(error, errors.MergePipeError)
    assert (error.kind, error.exit_code, str(error)) == (kind, exit_code, "what went wrong")
    assert error.as_json() == {"error": kind, "message": "what went wrong", "hint": "what to do"}


def test_no_two_kinds_share_an_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    codes = {kind.exit_code: kind for kind in kinds}
    assert len(codes) == len(kinds) == 8


def test_the_nearest_names_are_suggested() -> None:
    known = ["experts/math", "experts/maths", "base"]
    assert errors.nearest("experts/mth", known) == "Did you mean 'experts/math' or 'experts/maths'?"
    assert errors.nearest("quite different", known) == ""
    assert errors.nearest("x", []) == ""
