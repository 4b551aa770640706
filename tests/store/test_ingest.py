"""Ingest: what is written and what is shared, what is refused, and what the commit then says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from mergepipe.store import Store
from mergepipe.store.catalog import Writing
from mergepipe.store.errors import BadInputError, ConflictError, NotFoundError, UsageError
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.version import TOOL
from support.checkpoints import RawTensor, folder_bytes, random_tensor, raw, write_checkpoint, write_safetensors
from support.family import LAYERS, base_weights, fine_tune, write_family, write_model
from support.stores import catalog_rows, object_files, objects_of, state_of, writers_left

BASE = base_weights()


def blocks_of(store: Store, ref: str) -> dict[str, tuple[bytes, ...]]:
    return {name: entry.blocks for name, entry in store.snapshot(ref).tensors.items()}


class TestCommits:
    def test_it_says_where_it_came_from(self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MP_AUTHOR", "Ada")
        base, (expert, _) = write_family(tmp_path)
        (first,) = store.ingest([base])
        (second,) = store.ingest([expert], base="base", message="math, second epoch", author="Bob", ref="experts/math")
        commit = store.commit(first.commit)
        assert (commit.kind, commit.message, commit.author, commit.tool) == ("ingest", "ingest base", "Ada", TOOL)
        assert commit.parents == ()
        commit = store.commit(second.commit)
        assert (commit.message, commit.author) == ("math, second epoch", "Bob")
        assert [(parent.role, parent.commit, parent.name) for parent in commit.parents] == [
            ("base", first.commit, "base")
        ]
        assert store.resolve("experts/math") == second.commit

    def test_a_new_version_stands_on_the_one_before(self, store: Store, tmp_path: Path) -> None:
        first_path, second_path = write_model(tmp_path / "a", BASE), write_model(tmp_path / "b", fine_tune(BASE, 1))
        (first,) = store.ingest([first_path], ref="m")
        (second,) = store.ingest([second_path], ref="m", base="m")
        parents = store.commit(second.commit).parents
        assert [(parent.role, parent.commit) for parent in parents] == [("previous", first.commit)]
        assert store.resolve("m~1") == store.resolve("m@{1}") == first.commit

    @pytest.mark.parametrize("base", [None, "base", "expert0"])
    def test_again_is_no_new_version_whatever_the_base(self, store: Store, tmp_path: Path, base: str | None) -> None:
        """Only a base that it had not before is news."""
        base_path, (expert, _) = write_family(tmp_path)
        store.ingest([base_path])
        (first,) = store.ingest([expert], base="base")
        before = state_of(store)
        (again,) = store.ingest([expert], base=base)
        assert (again.commit, again.unchanged, again.written_bytes) == (first.commit, True, 0)
        assert state_of(store) == before

    def test_a_base_that_is_named_later_is_news(self, store: Store, tmp_path: Path) -> None:
        base_path, (expert, _) = write_family(tmp_path)
        store.ingest([base_path])
        (first,) = store.ingest([expert])
        assert not catalog_rows(store, "deltas")["deltas"]
        (second,) = store.ingest([expert], base="base")
        assert second.commit != first.commit
        assert store.commit(second.commit).tree == store.commit(first.commit).tree
        assert catalog_rows(store, "deltas")["deltas"], "the statistics are made up for"

    def test_text_that_is_none_is_kept_readable(self, store: Store, tmp_path: Path) -> None:
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
        try:
            write_checkpoint(folder, {"w": random_tensor("U8", (3,))})
        except OSError:
            pytest.skip("the filesystem takes no such names")
        (result,) = store.ingest([folder], author="\udcfe")
        commit = store.commit(result.commit)
        assert (result.ref, commit.message, commit.author) == ("m", "ingest m?", "?")

    def test_several_are_stored_together_or_not_at_all(self, store: Store, tmp_path: Path) -> None:
        base, experts = write_family(tmp_path)
        broken = write_model(tmp_path / "broken", BASE)
        (broken / "model.safetensors").write_bytes(b"short")
        before = state_of(store)
        with pytest.raises(BadInputError):
            store.ingest([base, *experts, broken])
        assert state_of(store) == before
        assert writers_left(store) == []
        results = store.ingest([base, *experts])
        assert [result.ref for result in results] == ["base", "expert0", "expert1"]


class TestSharing:
    def test_what_experts_share_is_stored_once(self, store: Store, tmp_path: Path) -> None:
        base, (expert, _) = write_family(tmp_path)
        (first,) = store.ingest([base])
        assert (
            len(object_files(store))
            == first.blocks - _repeats(BASE) + len(objects_of(store, Kind.FILE)) + len(objects_of(store, Kind.NODE)) + 1
        )
        before = set(object_files(store))
        (second,) = store.ingest([expert], base="base")
        # Two and four blocks of each layer's matrices; a node for each layer, three above them, and the commit.
        assert len(set(object_files(store)) - before) == LAYERS * (2 + 4) + LAYERS + 3 + 1
        assert second.blocks - second.reused_blocks == LAYERS * (2 + 4)
        assert second.written_bytes == sum(object_files(store)[name] for name in set(object_files(store)) - before)

    def test_rows_added_to_an_embedding_share_the_blocks_before(self, store: Store, tmp_path: Path) -> None:
        rows, width = 333, 64  # blocks of 32 rows; the last has 13
        generator = np.random.default_rng(0)
        embedding = generator.standard_normal((rows + 50, width)).astype(ml_dtypes.bfloat16)
        for name, count in (("before", rows), ("after", rows + 50)):
            write_checkpoint(tmp_path / name, {"embed.weight": raw(embedding[:count])}, files={})
        store.ingest([tmp_path / "before"])
        for base in (None, "before"):
            store.ingest([tmp_path / "after"], base=base)
            before, after = (blocks_of(store, ref)["embed.weight"] for ref in ("before", "after"))
            assert (len(before), len(after)) == (11, 12)
            assert before[:10] == after[:10]
            assert before[10] != after[10]

    def test_equal_tensors_of_one_checkpoint_are_stored_once(self, store: Store, tmp_path: Path) -> None:
        tied = random_tensor("BF16", (128, 64))
        (result,) = store.ingest([write_checkpoint(tmp_path / "m", {"embed": tied, "head": tied})])
        found = blocks_of(store, "m")
        assert found["embed"] == found["head"]
        assert len(objects_of(store, Kind.BLOCK)) == 4
        assert (result.blocks, result.reused_blocks) == (8, 4)

    def test_a_file_and_a_block_of_the_same_bytes_are_one_object(self, store: Store, tmp_path: Path) -> None:
        tensor = random_tensor("U8", (3000,))
        store.ingest([write_checkpoint(tmp_path / "m", {"w": tensor}, files={"copy.bin": tensor.data})])
        assert store.snapshot("m").files["copy.bin"].blocks == blocks_of(store, "m")["w"]
        assert store.snapshot("m").read_file("copy.bin") == tensor.data

    def test_what_is_shared_is_renewed(self, store: Store, tmp_path: Path) -> None:
        """Its age protects it from being collected while somebody begins to rely on it."""
        base, (expert, _) = write_family(tmp_path)
        store.ingest([base])
        shared = store.snapshot("base").entry("lm_head.weight").blocks

        def age(view: Writing) -> None:
            for digest in shared:
                row = view.object_row(digest)
                assert row is not None
                view.put("objects", digest, replace(row, touched=1000).pack())

        for options in ({}, {"base": "base"}):
            store.catalog.write(age)
            store.ingest([expert], ref=f"again{len(options)}", **options)  # type: ignore[arg-type]
            with store.catalog.reading() as view:
                rows = [view.object_row(digest) for digest in shared]
            assert all(row is not None and row.touched > 1000 for row in rows)

    def test_every_reported_byte_lies_on_disk(self, store: Store, tmp_path: Path) -> None:
        base, experts = write_family(tmp_path, experts=3)
        written = 0
        for paths, options in (([base], {}), (experts, {"base": "base"})):
            results = store.ingest(paths, **options)  # type: ignore[arg-type]
            written += sum(result.written_bytes for result in results)
            assert written == sum(object_files(store).values())


def _repeats(weights: dict[str, np.ndarray]) -> int:
    """Blocks that are there more than once: the norms are all ones."""
    return sum("norm" in name for name in weights) - 1


class TestWhatIsRefused:
    def refused(self, store: Store, error: type[Exception], *paths: Path, **options: object) -> str:
        before = state_of(store)
        with pytest.raises(error) as caught:
            store.ingest(paths, **options)  # type: ignore[arg-type]
        assert state_of(store) == before
        assert writers_left(store) == []
        assert caught.value.hint or error is BadInputError  # type: ignore[attr-defined]
        return caught.value.message  # type: ignore[attr-defined,no-any-return]

    def test_a_base_of_other_shapes(self, store: Store, tmp_path: Path) -> None:
        base, _ = write_family(tmp_path, experts=0)
        store.ingest([base])
        changed = {**BASE, "lm_head.weight": BASE["lm_head.weight"][:, :7]}
        message = self.refused(store, BadInputError, write_model(tmp_path / "m", changed), base="base")
        for words in ("model.safetensors", "'lm_head.weight'", "[128, 7]", "[128, 64]", "'base'"):
            assert words in message

    def test_a_base_of_other_names(self, store: Store, tmp_path: Path) -> None:
        base, _ = write_family(tmp_path, experts=0)
        store.ingest([base])
        other = {f"transformer.{name}": weight for name, weight in BASE.items()}
        assert "is in the base 'base'" in self.refused(
            store, BadInputError, write_model(tmp_path / "m", other), base="base"
        )

    def test_a_base_that_is_not_there(self, store: Store, tmp_path: Path) -> None:
        base, _ = write_family(tmp_path, experts=0)
        store.ingest([base])
        self.refused(store, NotFoundError, base, base="bsae", ref="other")

    def test_two_of_one_name(self, store: Store, tmp_path: Path) -> None:
        paths = [write_model(tmp_path / top / "m", BASE) for top in ("a", "b")]
        assert "'m'" in self.refused(store, UsageError, *paths)
        self.refused(store, UsageError, *paths, ref="x")

    def test_a_name_that_cannot_be(self, store: Store, tmp_path: Path) -> None:
        self.refused(store, UsageError, write_model(tmp_path / "m", BASE), ref="../x")

    def test_a_tag(self, store: Store, tmp_path: Path) -> None:
        (result,) = store.ingest([write_model(tmp_path / "m", BASE)])
        publish(store.catalog, None, Changes(refs=[RefUpdate("v1", None, result.commit, "tag")]))
        path = write_model(tmp_path / "v1", fine_tune(BASE, 1))
        assert "tags do not move" in self.refused(store, ConflictError, path)

    @pytest.mark.parametrize("name", ["a:b.safetensors", "a\\b.safetensors"])
    def test_file_names_that_export_could_not_write(self, store: Store, tmp_path: Path, name: str) -> None:
        lone = write_safetensors(tmp_path / "m" / name, {"w": random_tensor("U8", (3,))})
        for path in (lone, lone.parent):
            assert "cannot be kept safely" in self.refused(store, BadInputError, path)

    @pytest.mark.parametrize("change", ["append", "rewrite", "truncate"])
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_a_file_that_changes_meanwhile(self, store: Store, tmp_path: Path, name: str, change: str) -> None:
        path = write_model(tmp_path / "m", BASE)
        os.utime(path / name, (1, 1))
        done: list[int] = []

        def touch(*_: object) -> None:
            if not done:
                done.append(1)
                content = (path / name).read_bytes()
                with (path / name).open("r+b") as file:
                    if change == "truncate":
                        file.truncate(len(content) // 2)
                    elif change == "append":
                        file.seek(0, os.SEEK_END)
                        file.write(b"x")
                    else:
                        file.write(content)

        message = self.refused(store, BadInputError, path, progress=touch)
        assert name in message
        assert "while it was being read" in message

    def test_a_file_that_is_replaced_meanwhile_is_read_as_it_was(self, store: Store, tmp_path: Path) -> None:
        path = write_model(tmp_path / "m", BASE)
        content = folder_bytes(path)

        def exchange(*_: object) -> None:
            (tmp_path / "new").write_bytes(b"new")
            (tmp_path / "new").replace(path / "config.json")

        store.ingest([path], progress=exchange)
        store.snapshot("m").export(tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == content

    def test_an_interrupt_leaves_nothing(self, store: Store, tmp_path: Path) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = state_of(store)
        with pytest.raises(KeyboardInterrupt):
            store.ingest([write_model(tmp_path / "m", BASE)], progress=interrupt)
        assert state_of(store) == before
        assert writers_left(store) == []
        assert object_files(store) == {}


class TestProgress:
    @pytest.mark.parametrize("workers", [1, 4])
    def test_it_goes_up_to_the_whole(self, store: Store, tmp_path: Path, workers: int) -> None:
        base, experts = write_family(tmp_path)
        seen: list[tuple[str, int, int]] = []
        store.ingest([base, *experts], workers=workers, progress=lambda *step: seen.append(step))
        total = sum(weight.nbytes for weight in BASE.values()) * 3
        assert max(done for _, done, _ in seen) == total
        assert {(stage, whole) for stage, _, whole in seen} == {("ingest", total)}
        assert sorted(done for _, done, _ in seen) == [done for _, done, _ in sorted(seen)]


class TestOtherForms:
    def test_pytorch_files(self, store: Store, tmp_path: Path) -> None:
        shared = torch.randn(50, 40, dtype=torch.bfloat16)
        state = {
            "embed.weight": shared,
            "head.weight": shared,
            "across": shared.t(),
            "part": shared[3:9, ::2],
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 4),
            "half": {"a": torch.ones(3, dtype=torch.float16)},
        }
        (tmp_path / "m").mkdir()
        torch.save(state, tmp_path / "m" / "pytorch_model.bin")
        (tmp_path / "m" / "config.json").write_text("{}")
        torch.save(state, tmp_path / "lone.pt")
        store.ingest([tmp_path / "m", tmp_path / "lone.pt"])
        for ref in ("m", "lone"):
            snapshot = store.snapshot(ref)
            for name, tensor in {**state, "half.a": state["half"]["a"]}.items():  # type: ignore[index]
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(snapshot.tensor(name), tensor)
            assert snapshot.shards == ()
            assert blocks_of(store, ref)["embed.weight"] == blocks_of(store, ref)["head.weight"]
        assert set(store.snapshot("m").files) == {"config.json"}

    def test_pytorch_shards_with_their_index(self, store: Store, tmp_path: Path) -> None:
        folder = tmp_path / "m"
        folder.mkdir()
        shards = {f"pytorch_model-0000{i}-of-00002.bin": {f"w{i}": torch.randn(5)} for i in (1, 2)}
        for name, state in shards.items():
            torch.save(state, folder / name)
        weight_map = {tensor: name for name, state in shards.items() for tensor in state}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        store.ingest([folder])
        assert set(store.snapshot("m").tensors) == {"w1", "w2"}
        (folder / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(BadInputError, match="00002-of-00002"):
            store.ingest([folder], ref="n")

    def test_a_pickle_that_runs_code(self, store: Store, tmp_path: Path) -> None:
        marker = tmp_path / "marker"

        class RunsCode:
            def __reduce__(self) -> object:
                return (Path.touch, (marker,))

        torch.save({"w": RunsCode()}, tmp_path / "m.bin")
        before = state_of(store)
        with pytest.raises(BadInputError, match="would run code"):
            store.ingest([tmp_path / "m.bin"])
        assert not marker.exists()
        assert state_of(store) == before

    def test_adapters_stand_on_a_base_of_other_tensors(self, store: Store, tmp_path: Path) -> None:
        base, _ = write_family(tmp_path, experts=0)
        (stored,) = store.ingest([base])
        folder = tmp_path / "adapter"
        pair = {f"base_model.model.q.lora_{side}.weight": random_tensor("F32", (4, 64)) for side in "AB"}
        write_safetensors(folder / "adapter_model.safetensors", pair)
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base", "r": 4}))
        for named in ("base", "auto"):
            (result,) = store.ingest([folder], base=named, ref=f"adapters/{named}")
            parent = store.commit(result.commit).parent("base")
            assert parent is not None
            assert parent.commit == stored.commit
            store.snapshot(result.ref).export(tmp_path / "out" / named)
            assert folder_bytes(tmp_path / "out" / named) == folder_bytes(folder)

    def test_a_hub_caches_snapshot(self, store: Store, tmp_path: Path) -> None:
        cache = tmp_path / "models--org--name"
        real = write_model(tmp_path / "real", BASE)
        snapshot = cache / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        for number, path in enumerate(sorted(real.iterdir())):
            path.rename(cache / "blobs" / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        store.ingest([snapshot], ref="m")
        store.snapshot("m").export(tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == folder_bytes(snapshot)
        assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


class TestTensorsOfASnapshot:
    def test_as_torch_has_them(self, store: Store, tmp_path: Path) -> None:
        tensors = {name: random_tensor(name, (3, 4)) for name in ("BF16", "F8_E4M3", "I64", "BOOL", "C64", "U16")}
        store.ingest([write_checkpoint(tmp_path / "m", {**tensors, "F4": random_tensor("F4", (4,))})])
        snapshot = store.snapshot("m")
        for name, tensor in tensors.items():
            found = snapshot.tensor(name)
            assert tuple(found.shape) == (3, 4)
            assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == tensor.data
        found.zero_()
        assert snapshot.read_tensor("U16").tobytes() == tensors["U16"].data
        with pytest.raises(BadInputError, match="F4"):
            snapshot.tensor("F4")

    def test_what_is_not_there(self, store: Store, tmp_path: Path) -> None:
        store.ingest([write_model(tmp_path / "m", BASE)])
        with pytest.raises(NotFoundError, match=r"lm_head\.wieght") as caught:
            store.snapshot("m").tensor("lm_head.wieght")
        assert "'lm_head.weight'" in (caught.value.hint or "")
        with pytest.raises(NotFoundError, match=r"confg\.json") as caught:
            store.snapshot("m").read_file("confg.json")
        assert "'config.json'" in (caught.value.hint or "")

    def test_the_configuration(self, store: Store, tmp_path: Path) -> None:
        for number, (text, expected) in enumerate(
            {'{"a": [1]}': {"a": [1]}, "[]": {}, "not json": {}, "\xff": {}}.items()
        ):
            files = {"config.json": text.encode("latin-1")}
            path = write_checkpoint(tmp_path / str(number), {"w": random_tensor("U8", (3,))}, files=files)
            store.ingest([path])
            assert store.snapshot(str(number)).config() == expected
        store.ingest([write_safetensors(tmp_path / "lone.safetensors", {"w": random_tensor("U8", (3,))})])
        assert store.snapshot("lone").config() == {}


def test_the_entry_is_what_the_checkpoint_has(store: Store, tmp_path: Path) -> None:
    tensor = RawTensor("BF16", (100, 64), random_tensor("BF16", (100, 64)).data)
    store.ingest([write_checkpoint(tmp_path / "m", {"a.b.w": tensor})])
    entry = store.snapshot("m").entry("a.b.w")
    assert isinstance(entry, TensorEntry)
    assert (entry.dtype, entry.shape, entry.chunks, len(entry.blocks)) == ("BF16", (100, 64), (32, 64), 4)


def test_stores_of_several_block_sizes_have_the_same_weights(make_store: Callable[..., Store], tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", BASE)
    for size in (4096, 65536, 64 << 20):
        store = make_store(block_bytes=size)
        store.ingest([path])
        store.snapshot("m").export(tmp_path / f"out{size}")
        assert folder_bytes(tmp_path / f"out{size}") == folder_bytes(path)
