"""The page on security names tests that there are, and every attack on it has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py::[\w:]+)`", PAGE)))


def names_in(path: Path) -> set[str]:
    """``test`` and ``Class::test``, as pytest writes them."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + each.name for each in inner if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


@pytest.mark.parametrize("name", NAMED)
def test_each_test_that_is_named_is_there(name: str) -> None:
    path, _, test = name.partition("::")
    assert (ROOT / path).is_file()
    assert test in names_in(ROOT / path)
    assert test.rpartition("::")[2].startswith("test_")


def test_every_line_of_defence_names_one() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith("|---")]
    defended = [row for row in rows if row.count("|") == 4 and not row.endswith("| shown by |")]
    assert len(defended) > 40
    for row in defended:
        assert re.search(r"`tests/", row), f"no test shows: {row}"
    mentioned = re.findall(r"`(tests/[^`]+::[^`]+)`", PAGE)
    assert set(mentioned) == set(NAMED)


def test_every_kind_of_stranger_has_its_limits_said() -> None:
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    for title in ("A checkpoint", "A plan", "A store", "Another user", "A damaged disk", "A crash"):
        (section,) = (each for each in sections if each.startswith(title))
        assert "**Not defended.**" in section


def test_links_within_the_page_lead_somewhere() -> None:
    titles = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\(#([\w-]+)\)", PAGE)) <= headings
