"""Which rows go with what is collected, and which stay; how often it marks; what a dead writer leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mergepipe.merge import Expert, execute, plan_merge
from mergepipe.store import Digest, Store
from mergepipe.store import gc as gc_module
from mergepipe.store.digest import hash_bytes
from mergepipe.store.frame import Kind
from mergepipe.store.gc import collect
from mergepipe.store.publish import Changes, publish
from support.collecting import age, nothing, remove, touch
from support.family import write_family
from support.processes import run_python
from support.stores import assert_clean, catalog_rows, object_files, objects_of, writers_left

ROWS = ("children", "deltas", "tensors", "results", "previews")


@pytest.fixture
def merged(make_store: Callable[..., Store], tmp_path: Path) -> Store:
    """A base, two experts with previews, and a merge of both."""
    store = make_store(block_bytes=16384)
    base, experts = write_family(tmp_path / "family")
    store.ingest([base], ref="base")
    store.ingest(experts, base="base", previews=True)
    execute(store, plan_merge(store, "base", [Expert("expert0"), Expert("expert1")], "task_arithmetic"), "merged")
    return store


def tensor_of(store: Store, ref: str) -> Digest:
    return store.snapshot(ref).tensors["model.layers.0.mlp.up_proj.weight"].id


def test_rows_go_with_the_commits_and_blocks_that_they_are_about(merged: Store) -> None:
    gone = merged.resolve("expert1")
    blocks = set(objects_of(merged, Kind.BLOCK))
    remove(merged, "merged", "expert1")
    before = catalog_rows(merged, *ROWS)
    found = collect(merged, apply=True, grace_seconds=0)
    assert found.commits == 2
    assert found.kept_young == 0
    after = catalog_rows(merged, *ROWS)
    assert list(after["children"]) == [merged.resolve("base") + merged.resolve("expert0")]
    blocks -= set(objects_of(merged, Kind.BLOCK))
    assert blocks
    for name in ("deltas", "previews"):
        here = {key for key in before[name] if not {key[:32], key[32:64]} & blocks}
        assert after[name].keys() == here < before[name].keys()
        assert here
    assert not after["results"]
    assert not any(gone in key for name in ROWS for key in after[name])
    assert found.rows == sum(len(before[name]) - len(after[name]) for name in ROWS)


def test_the_row_of_a_young_preview_goes_with_its_block(merged: Store) -> None:
    """The preview itself is too young; what it is a preview of is not there any more."""
    remove(merged, "merged", "expert0", "expert1")
    age(merged)
    previews = objects_of(merged, Kind.PREVIEW)
    touch(merged, int(time.time()), *previews)
    found = collect(merged, apply=True, grace_seconds=3600)
    assert found.commits == 3
    assert found.kept_young == len(previews) > 0
    assert objects_of(merged, Kind.PREVIEW) == previews
    assert not catalog_rows(merged, "previews")["previews"]
    assert_clean(merged)


def test_a_row_of_two_tensors_stays_while_a_model_has_one_of_them(merged: Store) -> None:
    base, one, two = (tensor_of(merged, ref) for ref in ("base", "expert0", "expert1"))
    passes = [hash_bytes(b"state"), bytes(48)]  # the row of a pass of a method is about more than two
    pairs = {base + one, one + base, one + two, two + one, *passes}
    publish(merged.catalog, None, Changes(tensors=dict.fromkeys(pairs, b"row")))
    rows = catalog_rows(merged, "tensors")["tensors"]
    assert nothing(collect(merged, apply=True, grace_seconds=0))
    assert catalog_rows(merged, "tensors")["tensors"] == rows
    remove(merged, "merged", "expert0", "expert1")
    collect(merged, apply=True, grace_seconds=0)
    assert catalog_rows(merged, "tensors")["tensors"].keys() == rows.keys() - {one + two, two + one}
    remove(merged, "base")
    collect(merged, apply=True, grace_seconds=0)
    assert catalog_rows(merged, "tensors")["tensors"].keys() == set(passes)


def test_a_result_stays_as_long_as_the_block_or_commit_that_it_led_to(merged: Store) -> None:
    block = merged.snapshot("base").tensors["lm_head.weight"].blocks[0]
    commits = {ref: merged.resolve(ref) for ref in ("base", "merged")}
    led = {"nothing": hash_bytes(b"nothing"), "block": block, **commits}
    publish(merged.catalog, None, Changes(results={hash_bytes(name.encode()): to for name, to in led.items()}))

    def left() -> set[str]:
        rows = catalog_rows(merged, "results")["results"]
        return {name for name in led if hash_bytes(name.encode()) in rows}

    assert collect(merged, apply=True, grace_seconds=0).rows == 1
    assert left() == {"block", "base", "merged"}
    remove(merged, "merged")
    collect(merged, apply=True, grace_seconds=0)
    assert left() == {"block", "base"}


def test_a_result_that_led_to_a_commit_stays_where_only_its_object_is_lost(hurt_store: Store, tmp_path: Path) -> None:
    base, _ = write_family(tmp_path / "family", 0)
    commit = hurt_store.ingest([base], ref="base")[0].commit
    publish(hurt_store.catalog, None, Changes(results={hash_bytes(b"folder"): commit}))
    hurt_store.catalog.write(lambda view: view.delete("objects", commit))
    assert not collect(hurt_store, apply=True).rows


def test_it_marks_once_where_nobody_else_commits(merged: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time more it would read all manifests again, in the end while writers wait."""
    original = gc_module._mark
    times: list[bool] = []

    def counted(store: Store, limit: int) -> gc_module._Marked:
        times.append(True)
        return original(store, limit)

    monkeypatch.setattr(gc_module, "_mark", counted)
    remove(merged, "merged")
    assert collect(merged, apply=True, grace_seconds=0).commits == 1
    assert len(times) == 1


def test_the_folder_of_a_writer_that_died_goes_and_what_it_relied_on(merged: Store) -> None:
    remove(merged, "merged", "expert0", "expert1", "base")
    run_python(
        """
        import os, sys
        from mergepipe.store import Store
        from mergepipe.store.frame import Kind
        from mergepipe.store.staging import Staging
        from support.stores import objects_of
        with Store.open(sys.argv[1]) as store, Staging(store.layout, store.catalog) as staging:
            for digest in objects_of(store, Kind.BLOCK):
                assert not staging.claim(digest)
            os._exit(9)
        """,
        merged.layout.root, expect=9,
    )  # fmt: skip
    (folder,) = writers_left(merged)
    assert collect(merged, grace_seconds=0).commits == 4
    assert writers_left(merged) == [folder]
    assert collect(merged, apply=True, grace_seconds=0).commits == 4
    assert not writers_left(merged)
    assert not object_files(merged)
