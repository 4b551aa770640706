"""``mp gc --previews``: previews go and come back the same; nothing else moves, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from mergepipe.store import Digest, Store
from mergepipe.store import drop_previews as drop_module
from mergepipe.store.analyze import analyze, lacking, level_for
from mergepipe.store.check import verify
from mergepipe.store.drop_previews import Removal, drop_previews, plan_removal
from mergepipe.store.errors import ConflictError, DamagedError
from mergepipe.store.frame import Kind
from mergepipe.store.gc import collect
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import require_ref
from mergepipe.store.staging import Staging
from support.checkpoints import folder_bytes
from support.family import base_weights, fine_tune, write_family, write_model
from support.processes import run_python
from support.stores import assert_clean, catalog_rows, flip_bit, object_files, object_path, objects_of, state_of


@pytest.fixture
def full(make_store: Callable[..., Store], tmp_path: Path) -> Store:
    """A base and two experts with 9 previews each."""
    base, experts = write_family(tmp_path)
    store = make_store(block_bytes=8192)
    store.ingest([base])
    store.ingest(experts, base="base", previews=True)
    return store


def contents(store: Store) -> dict[str, bytes]:
    """All object files but those of previews."""
    coarse = {digest.hex() for digest in objects_of(store, Kind.PREVIEW)}
    files = object_files(store).keys() - coarse
    return {name: (store.layout.objects / name[:2] / name[2:]).read_bytes() for name in files}


def make_again(store: Store) -> None:
    for ref in ("expert0", "expert1"):
        models = store.snapshot("base"), store.snapshot(ref)
        analyze(store, lacking(store, *models, previews=True), previews=level_for(store, *models))


def without_previews(rows: dict[str, dict[bytes, bytes]]) -> dict[str, dict[bytes, bytes]]:
    exact = {key: value for key, value in rows["objects"].items() if value[0] != Kind.PREVIEW}
    return {**rows, "objects": exact, "previews": {}}


def test_a_dry_run_says_it_and_changes_nothing(full: Store) -> None:
    before, files = state_of(full), object_files(full)
    found = plan_removal(full)
    previews = objects_of(full, Kind.PREVIEW)
    assert set(found.ids) == set(previews)
    assert (len(found.ids), found.rows) == (18, 18)
    assert found.freed_bytes == sum(files[digest.hex()] for digest in previews)
    assert state_of(full) == before


def test_they_go_and_nothing_else_moves(full: Store) -> None:
    planned, exact, rows, files = plan_removal(full), contents(full), catalog_rows(full), object_files(full)
    assert drop_previews(full) == planned
    assert contents(full) == exact
    assert catalog_rows(full) == without_previews(rows)
    assert sum(object_files(full).values()) == sum(files.values()) - planned.freed_bytes
    assert_clean(full)
    assert plan_removal(full) == drop_previews(full) == Removal((), 0, 0)


def test_they_come_back_the_same(full: Store) -> None:
    before = state_of(full)
    drop_previews(full)
    make_again(full)
    assert state_of(full) == before
    assert_clean(full)


def test_the_note_that_there_is_nothing_to_gain_goes_too(store: Store, tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    store.ingest([base])
    store.ingest(experts, base="base", previews=True)
    assert drop_previews(store).rows > 0
    assert catalog_rows(store, "previews") == {"previews": {}}


def test_one_that_is_damaged_is_forgotten(full: Store) -> None:
    for number, digest in enumerate(objects_of(full, Kind.PREVIEW)[:2]):
        if number:
            object_path(full, digest).unlink()
        else:
            flip_bit(object_path(full, digest), 200)
    assert len(verify(full).damaged) == 2
    drop_previews(full)
    assert catalog_rows(full, "damaged") == {"damaged": {}}
    assert_clean(full)


def test_a_process_that_dies_in_between_leaves_files_without_rows(full: Store) -> None:
    before, exact = state_of(full), contents(full)
    coarse = {digest.hex() for digest in objects_of(full, Kind.PREVIEW)}
    code = """
    import os, sys
    from pathlib import Path
    from mergepipe.store import Store
    from mergepipe.store.drop_previews import drop_previews

    intact, done = Path.unlink, []

    def unlink(path, missing_ok=False):
        if len(done) == int(sys.argv[2]):
            os._exit(9)
        done.append(path)
        intact(path, missing_ok=missing_ok)

    Path.unlink = unlink
    with Store.open(sys.argv[1]) as store:
        drop_previews(store)
    """
    for count in (0, 5):
        run_python(code, full.layout.root, count, expect=9)
        assert catalog_rows(full, "previews") == {"previews": {}}
        assert objects_of(full, Kind.PREVIEW) == []
        assert len(coarse & object_files(full).keys()) == 18 - count
        assert {name: data for name, data in contents(full).items() if name not in coarse} == exact
        assert_clean(full)
        make_again(full)
        assert state_of(full) == before
        assert_clean(full)


def test_one_that_dies_before_has_changed_nothing(full: Store) -> None:
    before = state_of(full)
    code = """
    import os, sys
    from mergepipe.store import Store, drop_previews

    removal = drop_previews._removal

    def dying(view, needed):
        found = removal(view, needed)
        view.delete("previews", next(iter(view.items("previews")))[0])
        os._exit(9)

    drop_previews._removal = dying
    with Store.open(sys.argv[1]) as store:
        drop_previews.drop_previews(store)
    """
    run_python(code, full.layout.root, expect=9)
    assert state_of(full) == before


def test_one_that_was_made_again_meanwhile_keeps_its_file(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the rows and the files there is room for another writer."""
    before = state_of(full)
    from mergepipe.store import drop_previews as module

    remove = module.remove_files

    def late(store: Store, ids: tuple[object, ...]) -> None:
        make_again(store)
        remove(store, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "remove_files", late)
    drop_previews(full)
    assert state_of(full) == before
    assert_clean(full)


def test_it_waits_for_no_writer_and_disturbs_none(full: Store) -> None:
    before = state_of(full)
    with Staging(full.layout, full.catalog), pytest.raises(ConflictError, match="somebody is writing"):
        drop_previews(full)
    assert state_of(full) == before
    drop_previews(full)


def test_a_writer_that_begins_meanwhile_is_not_disturbed(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody was there when it looked first, and somebody is when it would remove."""
    before = state_of(full)
    original, writers = drop_module._commits, ExitStack()

    def late(store: Store) -> set[Digest]:
        writers.enter_context(Staging(store.layout, store.catalog))
        return original(store)

    monkeypatch.setattr(drop_module, "_commits", late)
    with writers, pytest.raises(ConflictError, match="somebody is writing"):
        drop_previews(full)
    assert state_of(full) == before


def test_an_object_that_a_commit_needs_stays(full: Store, tmp_path: Path) -> None:
    """A checkpoint may bring a file with exactly a preview's content: it is the same object then."""
    digest = objects_of(full, Kind.PREVIEW)[0]
    with full.catalog.reading() as view:
        row = view.object_row(digest)
    assert row is not None
    odd = tmp_path / "odd"
    odd.mkdir()
    for path in (tmp_path / "base").iterdir():
        (odd / path.name).write_bytes(path.read_bytes())
    (odd / "notes.bin").write_bytes(full.reader.read_piece(digest, row.raw_bytes))
    full.ingest([odd])
    before = state_of(full)
    assert len(plan_removal(full).ids) == len(drop_previews(full).ids) == 17
    full.snapshot("odd").export(tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(odd)
    assert_clean(full)
    make_again(full)
    assert state_of(full) == before


def test_where_nobody_knows_what_a_commit_needs(make_store: Callable[..., Store], tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    store = make_store(damaged=True, block_bytes=8192)
    store.ingest([base])
    store.ingest(experts, base="base", previews=True)
    flip_bit(object_path(store, store.snapshot("expert0").commit.tree), 100)
    before = state_of(store)
    with pytest.raises(DamagedError):
        drop_previews(store)
    assert state_of(store) == before


def test_a_collection_that_takes_a_commit_meanwhile(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with full.catalog.reading() as view:
        gone = require_ref(view, "expert1")
    original = drop_module._commits

    def late(store: Store) -> set[Digest]:
        found = original(store)
        if not collected:
            collected.append(True)
            publish(store.catalog, None, Changes(refs=[RefUpdate("expert1", gone.commit, None)]))
            collect(store, apply=True, grace_seconds=0)
        return found

    collected: list[bool] = []
    monkeypatch.setattr(drop_module, "_commits", late)
    assert drop_previews(full).ids
    assert gone.commit not in original(full)
    assert_clean(full)


def test_it_ends_though_others_commit_all_the_time(
    full: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some tries it asks all commits while nobody can write."""
    original, tries = drop_module._commits, []

    def busy(store: Store) -> set[Digest]:
        found = original(store)
        tries.append(True)
        weights = fine_tune(base_weights(), 50 + len(tries))
        store.ingest([write_model(tmp_path / f"new{len(tries)}", weights)], base="base")
        return found

    monkeypatch.setattr(drop_module, "_commits", busy)
    assert drop_previews(full).ids
    assert 1 < len(tries) < 10
    assert_clean(full)
