"""Stores of every format version so far open, hold what they held, and can be worked with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergepipe.merge import Expert, execute, parse_budget, plan_merge
from mergepipe.merge.plan_file import decode_plan
from mergepipe.store import Store
from mergepipe.store.frame import VERSION as OBJECT_VERSION
from mergepipe.store.frame import Encoding, Kind
from mergepipe.store.gc import collect
from mergepipe.store.layout import FORMAT_VERSION, read_layout
from mergepipe.store.recover import recover
from support.covered import count
from support.family import write_model
from support.frozen import FORMATS, describe, thaw, weights
from support.stores import assert_clean, objects_of

VERSIONS = sorted(path.name for path in FORMATS.iterdir() if path.is_dir())


@pytest.fixture(params=VERSIONS)
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder = FORMATS / request.param
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return thaw(folder, tmp_path / "store"), expected


def test_every_version_has_a_store() -> None:
    assert [f"v{version}" for version in range(1, FORMAT_VERSION + 1)] == VERSIONS
    assert OBJECT_VERSION <= FORMAT_VERSION


def test_it_holds_what_it_held(frozen: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, expected = frozen
    with Store.open(root) as store:
        assert describe(store, tmp_path / "out") == expected
        count(versions=1, commits=len(expected["commits"]))
        assert_clean(store)


def test_it_has_all_there_is(frozen: tuple[Path, dict[str, Any]]) -> None:
    """Each kind of object and each encoding, so that none can stop being readable unseen."""
    with Store.open(frozen[0]) as store:
        for kind in Kind:
            assert objects_of(store, kind), kind
        for encoding in Encoding:
            assert any(objects_of(store, kind, encoding) for kind in Kind), encoding
        with store.catalog.reading() as view:
            for database in ("objects", "deltas", "tensors", "commits", "children", "refs", "reflog", "results"):
                assert view.count(database), database
            assert view.count("previews")


def test_its_plans_are_read(frozen: tuple[Path, dict[str, Any]]) -> None:
    with Store.open(frozen[0]) as store:
        for digest in objects_of(store, Kind.PLAN):
            plan = decode_plan(store.reader.read_record(Kind.PLAN, digest), "a plan")
            assert plan.id == digest


def test_it_can_be_worked_with(frozen: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, expected = frozen
    with Store.open(root) as store:
        experts = [Expert("math", {"weight": 0.5}), Expert("code", {"weight": 0.25})]
        plan = plan_merge(store, "base", experts, "task_arithmetic", budget=parse_budget("30%"))
        again = execute(store, plan, "again")
        assert again.expert_bytes_read == 0  # the cache of results holds
        assert store.commit(again.commit).tree == store.snapshot("v1").commit.tree
        result = store.ingest([write_model(tmp_path / "new", weights(3))], base="base", previews=True)[0]
        assert result.written_bytes > 0
        collect(store, apply=True, grace_seconds=0)
        assert_clean(store)
        assert set(expected["refs"]) < {ref for ref in (*expected["refs"], "again", "new") if store.resolve(ref)}


def test_its_catalog_can_be_lost(frozen: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, expected = frozen
    shutil.rmtree(root / "catalog")
    recover(read_layout(root), apply=True)
    with Store.open(root) as store:
        found = describe(store, tmp_path / "out")
        assert found["refs"] == expected["refs"]
        assert found["commits"] == expected["commits"]
        assert found["contents"] == expected["contents"]
        assert_clean(store)


def test_a_later_version_is_refused(frozen: tuple[Path, dict[str, Any]]) -> None:
    path = frozen[0] / "store.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'"format": \d+', f'"format": {FORMAT_VERSION + 1}', text), encoding="utf-8")
    with pytest.raises(Exception, match="newer than this mp"):
        Store.open(frozen[0])
