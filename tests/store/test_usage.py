"""How many bytes commits stand for, and how many they take."""

from __future__ import annotations

from pathlib import Path

from mergepipe.store import Store
from mergepipe.store.usage import logical_bytes, object_ids, stored_bytes_of, usage, with_bases
from support.checkpoints import folder_bytes
from support.family import write_family
from support.stores import object_files


def test_a_family(store: Store, tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    store.ingest([base])
    store.ingest(experts, base="base")
    found = usage(store)
    refs = {line.ref: line for line in found.refs}
    files = object_files(store)
    for path in (base, *experts):
        size = sum(map(len, folder_bytes(path).values()))
        assert refs[path.name].logical_bytes == logical_bytes(store.snapshot(path.name)) == size
    assert found.logical_bytes == sum(line.logical_bytes for line in found.refs)
    assert found.objects == len(files)
    assert found.stored_bytes == sum(files.values())
    assert found.unique_bytes < found.logical_bytes
    # What an expert alone holds is what would go with it; what all hold together is counted for none.
    held = {name: with_bases(store, object_ids(store.snapshot(name))) for name in refs}
    for name, ids in held.items():
        others = set().union(*(other for each, other in held.items() if each != name))
        assert refs[name].stored_bytes == sum(files[digest.hex()] for digest in ids)
        assert refs[name].alone_bytes == sum(files[digest.hex()] for digest in ids - others)
    assert refs["base"].alone_bytes < refs["expert0"].alone_bytes, "the experts' deltas need the base's blocks"


def test_two_refs_of_one_commit_hold_it_together(store: Store, tmp_path: Path) -> None:
    base, _ = write_family(tmp_path, experts=0)
    store.ingest([base])
    store.ingest([base], ref="copy")
    found = {line.ref: line for line in usage(store).refs}
    assert found["base"].stored_bytes > 0
    assert found["copy"].alone_bytes < 1000  # its commit alone
    assert usage(store).logical_bytes == 2 * found["base"].logical_bytes


def test_an_empty_store(store: Store) -> None:
    found = usage(store)
    assert (found.refs, found.objects, found.logical_bytes, found.unique_bytes, found.stored_bytes) == ((), 0, 0, 0, 0)


def test_ingest_reports_the_stored_bytes_of_its_commit(store: Store, tmp_path: Path) -> None:
    base, (expert, _) = write_family(tmp_path)
    (first,) = store.ingest([base])
    assert first.stored_bytes == sum(object_files(store).values()) == stored_bytes_of(store, first.commit)
    (second,) = store.ingest([expert], base="base")
    assert second.stored_bytes == stored_bytes_of(store, second.commit) > second.written_bytes
