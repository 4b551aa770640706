"""Lanes: drawings of small histories, as they should look."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mergepipe.cli.graph import Lanes
from mergepipe.store.digest import Digest, hash_bytes


def ident(name: str) -> Digest:
    return hash_bytes(name.encode())


def draw(history: dict[str, str]) -> list[str]:
    """``{"d": "b c"}``: commit d with the parents b and c, newest first."""
    lanes = Lanes()
    lines = []
    for name, parents in history.items():
        own, links, _ = lanes.place(ident(name), [ident(parent) for parent in parents.split()])
        lines.append(f"{own}  {name}")
        if links:
            lines.append(links)
    return lines


def test_a_line() -> None:
    assert draw({"c": "b", "b": "a", "a": ""}) == ["*  c", "*  b", "*  a"]


def test_a_merge() -> None:
    assert draw({"m": "base x y", "y": "base", "x": "base", "base": ""}) == [
        "*  m",
        "+-.-.",
        "| | *  y",
        "+-|-'",
        "| *  x",
        "+-'",
        "*  base",
    ]


def test_siblings() -> None:
    assert draw({"c": "a", "b": "a", "a": ""}) == ["*  c", "| *  b", "+-'", "*  a"]


def test_a_lane_that_ends_is_used_again() -> None:
    assert draw({"z": "", "m": "a b", "b": "", "n": "a c", "c": "", "a": ""}) == [
        "*  z",
        "*  m",
        "+-.",
        "| *  b",
        "| *  n",
        "+-+",
        "| *  c",
        "*  a",
    ]


def test_the_same_parent_twice_is_one_line() -> None:
    assert draw({"m": "a a", "a": ""}) == ["*  m", "*  a"]


def test_unrelated_histories() -> None:
    assert draw({"b": "a", "y": "x", "x": "", "a": ""}) == ["*  b", "| *  y", "| *  x", "*  a"]


def test_a_lane_that_leaves_to_the_right() -> None:
    assert draw({"p": "a", "q": "b", "a": "b", "b": ""}) == ["*  p", "| *  q", "* |  a", "'-+", "  *  b"]


@given(st.lists(st.sets(st.integers(1, 6), max_size=4), min_size=1, max_size=30))
def test_any_history_can_be_drawn(steps: list[set[int]]) -> None:
    """Commit i has the parents i + step; commits beyond the end are roots that are never drawn."""
    lanes = Lanes()
    expected: set[int] = set()
    for number, distances in enumerate(steps):
        parents = [number + distance for distance in sorted(distances)]
        own, links, below = lanes.place(ident(str(number)), [ident(str(parent)) for parent in parents])
        expected = (expected - {number}) | set(parents)
        assert own.count("*") == 1
        assert below.count("|") == len(expected)
        if links:
            starts_here = own.index("*")
            assert links[starts_here] in "+'"
            assert links.count("+") + links.count(".") + links.count("'") >= 2
