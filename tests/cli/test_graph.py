"""Lanes: drawings of small histories, as they should look."""

from __future__ import annotations

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
