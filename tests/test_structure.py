"""The shape of the project: what is packaged, who imports whom, and what a quick command may not load."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from support.processes import run_python

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("store", "merge", "cli")
# Each may import those before it.
LAYERS = {"store": {"store"}, "merge": {"store", "merge"}, "cli": {"store", "merge", "cli"}}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, at its top or later, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found.append((node.module or "", node.lineno))
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def settings() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_of_the_tree_is_packaged() -> None:
    table = settings()["tool"]["setuptools"]  # type: ignore[index]
    packages = {"mergepipe." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert set(table["packages"]) == packages
    for package in packages:
        assert (ROOT / package.removeprefix("mergepipe.").replace(".", "/") / "__init__.py").exists()
    assert table["package-dir"] == {f"mergepipe.{folder}": folder for folder in FOLDERS}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_name_the_package_and_go_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    for name, line in imports(path):
        top, _, rest = name.partition(".")
        assert top not in FOLDERS, f"{path}:{line}: imports bare {name!r}"
        assert top not in ("tests", "support", "bench"), f"{path}:{line}: imports {name!r}"
        if top == "mergepipe" and rest:
            assert rest.split(".")[0] in LAYERS[layer], f"{path}:{line}: {layer} imports {name}"


def test_only_one_module_talks_to_lmdb() -> None:
    users = {path.relative_to(ROOT).as_posix() for path in sources() for name, _ in imports(path) if name == "lmdb"}
    assert users == {"store/catalog.py"}


def test_only_publish_moves_objects() -> None:
    """One function makes work visible, one changes encodings. Of the others, one puts folders in their place, one
    replaces small files.
    """
    users = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if re.search(r"os\.(replace|rename)\(|\.rename\(", path.read_text(encoding="utf-8"))
    }
    assert users <= {
        "store/publish.py",
        "store/replace.py",
        "store/export.py",
        "store/filesystem.py",
        "store/leases.py",
    }
    assert "store/publish.py" in users


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("mergepipe.store", ["torch", "zarr", "numpy", "numba", "numcodecs", "transformers", "rich", "typer"]),
        ("mergepipe.store.ingest", ["torch", "zarr", "transformers"]),
        ("mergepipe.store.export", ["torch", "zarr", "numba", "numcodecs", "transformers"]),
        ("mergepipe.store.check", ["torch", "zarr", "numba", "numcodecs", "transformers"]),
        ("mergepipe.store.usage", ["torch", "zarr", "numpy", "numba"]),
        ("mergepipe.store.refs", ["torch", "zarr", "numpy", "numba"]),
    ],
)
def test_what_is_quick_loads_nothing_heavy(module: str, heavy: list[str]) -> None:
    output = run_python(f"import sys, {module}\nprint(*sorted(sys.modules))")
    assert not set(heavy) & set(output.split())


def test_modules_say_what_they_own() -> None:
    for path in sources():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path} says nothing of itself"


def test_every_file_of_the_store_is_named_in_one_place() -> None:
    """Tests mirror the code: each module of the store has a test file that carries its name, or is named here."""
    elsewhere = {
        "__init__": "test_store",
        "base_block": "test_ingest_base",
        "check_records": "test_check",
        "folder": "test_checkpoint",
        "ingest_blocks": "test_ingest_base",
        "analyze": "test_ingest_base",
        "leases": "test_staging",
        "norms": "test_statistics",
        "snapshot": "test_ingest",
        "version": "test_ingest",
        "interrupts": "test_publish",
        "preview_kernels": "test_previews",
        "rebuild": "test_recover",
        "restore_refs": "test_recover",
        "replace": "test_repack",
        "heal_sources": "test_heal",
        "findings": "test_doctor",
        "surroundings": "test_doctor",
        "writers": "test_doctor",
    }
    tests = {path.stem for path in (ROOT / "tests" / "store").glob("test_*.py")}
    for path in (ROOT / "store").glob("*.py"):
        assert elsewhere.get(path.stem, f"test_{path.stem}") in tests, f"nothing tests {path.name}"
