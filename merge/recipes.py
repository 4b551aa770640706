"""Whole recipes: several documents that feed each other, planned and carried out one after the other."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mergepipe.merge.budget import Budget
from mergepipe.merge.checked import CheckedPlan
from mergepipe.merge.executor import MergeResult, execute
from mergepipe.merge.from_recipe import check_document, plan_document
from mergepipe.merge.hints import preview_notes
from mergepipe.merge.plan import Plan
from mergepipe.merge.recipe import Recipe, read_recipe
from mergepipe.merge.recipe.nodes import MAXIMUM_BYTES
from mergepipe.merge.recipe_models import Found, check_models
from mergepipe.store.errors import BadInputError, NotFoundError
from mergepipe.store.parallel import Progress
from mergepipe.store.store import Store


def _open(store: Store, path: Path, progress: Progress | None) -> tuple[Recipe, Found]:
    """A recipe, after all that can be said of all its documents before any model is ingested or merged."""
    recipe = _read(path)
    coming = frozenset(document.name for document in recipe.documents if document.name is not None)
    found = Found(store, path.parent, coming=coming, progress=progress)
    for document in recipe.documents:
        check_document(document)
        check_models(found, document)
    return recipe, found


def _read(path: Path) -> Recipe:
    """The recipe; one that is a plan is told apart from others that are none."""
    try:
        return read_recipe(path)
    except BadInputError as error:
        with suppress(OSError):
            if path.is_file() and b'"method_version"' in path.read_bytes()[:MAXIMUM_BYTES]:
                raise BadInputError(
                    f"{path}: a plan, and no recipe", hint=f"A plan is carried out by: mp merge --plan {path} --as NAME"
                ) from error
        raise


def plan_last(
    store: Store,
    path: Path,
    budget: Budget,
    *,
    allow_missing: bool = False,
    previews: bool = True,
    progress: Progress | None = None,
) -> tuple[CheckedPlan, list[str]]:
    """The plan of a recipe's last document, and notes for the user. ``previews``: whether a budget may buy previews.

    Raises:
        NotFoundError: no such recipe; or it uses the result of another document, which no ref of that name has.
        BadInputError: the recipe cannot be honoured; the message names the file and the line.
        BudgetError: the budget cannot be met.
    """
    recipe, found = _open(store, path, progress)
    *before, last = recipe.documents
    for document in before:
        assert document.name is not None
        try:
            found.results[document.name] = store.resolve(document.name)
        except NotFoundError as error:
            raise document.place.error(
                f"the plan needs the result of {document.name!r}, which is not merged yet",
                f"`mp merge {path} --as NAME` merges all {len(recipe.documents)} documents in turn.",
            ) from error
    checked = plan_document(found, last, budget, allow_missing=allow_missing, previews=previews, progress=progress)
    return checked, [*found.notes, *preview_notes(checked.facts, checked.method, previews=previews)]


def merge_recipe(
    store: Store,
    path: Path,
    ref: str,
    budget: Budget,
    *,
    message: str = "",
    allow_missing: bool = False,
    previews: bool = True,
    use_cache: bool = True,
    progress: Progress | None = None,
    device: str = "cpu",
) -> tuple[list[tuple[Plan, MergeResult]], list[str]]:
    """Merge each document of a recipe; the last becomes ``ref``, one named NAME before it ``ref.NAME``.

    Returns each document's plan and result, and notes for the user. Raises as :func:`plan_last` and
    :func:`mergepipe.merge.executor.execute` do.
    """
    recipe, found = _open(store, path, progress)
    results = []
    notes: list[str] = []
    for number, document in enumerate(recipe.documents):
        last = number == len(recipe.documents) - 1
        checked = plan_document(
            found, document, budget, allow_missing=allow_missing, previews=previews, progress=progress
        )
        notes += [text for text in preview_notes(checked.facts, checked.method, previews=previews) if text not in notes]
        name = ref if last else f"{ref}.{document.name}"
        result = execute(store, checked, name, message=message, use_cache=use_cache, progress=progress, device=device)
        results.append((checked.plan, result))
        if document.name is not None:
            found.results[document.name] = result.commit
    return results, [*found.notes, *notes]
