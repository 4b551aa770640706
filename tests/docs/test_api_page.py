"""``docs/api.md`` runs: its code blocks, one after another, in an empty folder and a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_runs(tmp_path: Path) -> None:
    blocks = python_blocks("api.md")
    assert len(blocks) > 8
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MP_")}
    done = subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_has_the_verbs_of_the_page() -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", (DOCS.parent / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    compile(code, "README.md", "exec")
    for verb in ("Store.open", "ingest", "plan_merge", "execute", "snapshot", "export"):
        assert verb in code


def test_the_example_of_a_method_is_the_code() -> None:
    source = (DOCS.parent / "merge" / "methods" / "task_arithmetic.py").read_text(encoding="utf-8")
    for block in python_blocks("methods.md"):
        assert block in source


def test_links_lead_somewhere() -> None:
    pages = [DOCS.parent / "README.md", DOCS.parent / "CHANGELOG.md", *DOCS.rglob("*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
