"""Recipes from short texts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mergepipe.merge.recipe import Document, parse_recipe


@pytest.fixture(scope="session")
def document() -> Callable[[str], Document]:
    """The one document of a recipe's text, from a file that is called ``r.yml``."""

    def parse(text: str) -> Document:
        (only,) = parse_recipe(text, "r.yml").documents
        return only

    return parse
