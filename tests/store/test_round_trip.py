"""What came in comes out, byte for byte; and what is there already is not written again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergepipe.store import Store
from mergepipe.store.dtypes import DTYPES
from support.checkpoints import (
    HeaderStyle,
    RawTensor,
    folder_bytes,
    random_tensor,
    write_checkpoint,
    write_safetensors,
)
from support.covered import count
from support.stores import object_files, state_of
from support.strategies import styled_tensors, tensor_maps, tensors

few = settings(max_examples=min(settings().max_examples, 250))  # all go to one store, which grows
Fresh = Callable[[], Path]
Styled = tuple[dict[str, RawTensor], HeaderStyle]
file_maps = st.dictionaries(
    st.sampled_from(["config.json", "tokenizer/vocab.txt", ".hidden", "a b.txt", "é.md", "deep/er/x", "empty"]),
    st.binary(max_size=9000),
    max_size=4,
)


def check_round_trip(store: Store, checkpoint: Path) -> None:
    """Ingest, export, compare; ingest again, and see that nothing was written."""
    before = object_files(store)
    ref, out = f"m{len(before)}", checkpoint.with_name(f"{checkpoint.name}.out")
    (first,) = store.ingest([checkpoint], ref=ref)
    exported = store.snapshot(ref).export(out)
    count(checkpoints=1)
    original = folder_bytes(checkpoint) if checkpoint.is_dir() else {checkpoint.name: checkpoint.read_bytes()}
    assert folder_bytes(out) == original
    assert exported.identical
    assert first.raw_bytes == exported.written_bytes == sum(map(len, original.values()))
    new = {name: size for name, size in object_files(store).items() if name not in before}
    assert first.written_bytes == sum(new.values())
    after = state_of(store)
    (again,) = store.ingest([checkpoint], ref=ref)
    assert (again.commit, again.written_bytes, again.unchanged) == (first.commit, 0, True)
    assert again.reused_blocks == again.blocks
    assert state_of(store) == after


class TestSafetensors:
    @few
    @given(styled_tensors())
    def test_single_files(self, store: Store, fresh: Fresh, sample: Styled) -> None:
        folder = fresh()
        check_round_trip(store, write_safetensors(folder / "some model.safetensors", *sample))

    @few
    @given(styled_tensors(), file_maps)
    def test_folders(
        self,
        store: Store,
        fresh: Fresh,
        sample: Styled,
        files: dict[str, bytes],
    ) -> None:
        folder = fresh()
        check_round_trip(store, write_checkpoint(folder / "m", sample[0], style=sample[1], files=files))

    @few
    @given(tensor_maps, st.integers(2, 4), st.booleans())
    def test_shards(self, store: Store, fresh: Fresh, held: dict[str, RawTensor], shards: int, index: bool) -> None:
        folder = fresh()
        shards = min(shards, len(held))
        checkpoint = write_checkpoint(folder / "m", held, shards=shards, index=index)
        check_round_trip(store, checkpoint)

    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    def test_every_type_in_many_blocks(self, store: Store, fresh: Fresh, dtype: str) -> None:
        folder = fresh()
        held = {
            "matrix": random_tensor(dtype, (130, 120), 1),
            "cube": random_tensor(dtype, (3, 90, 40), 2),
            "vector": random_tensor(dtype, (20_000,), 3),
            "odd": random_tensor(dtype, (2, 9999, 4), 4),
            "empty": random_tensor(dtype, (0, 7), 5),
            "one": random_tensor(dtype, (8, 1), 6),
        }
        if DTYPES[dtype].bits >= 8:
            held["scalar"] = random_tensor(dtype, (), 7)
        check_round_trip(store, write_checkpoint(folder / "m", held))

    def test_packed_rows_that_end_inside_of_a_byte(self, store: Store, fresh: Fresh) -> None:
        folder = fresh()
        held = {
            "three": random_tensor("F4", (2, 9999, 3)),
            "deep": random_tensor("F4", (4, 3, 333, 5)),
            "six": random_tensor("F6_E3M2", (4, 999, 5)),
        }
        check_round_trip(store, write_checkpoint(folder / "m", held))

    def test_empty_and_tiny_tensors_alone(self, store: Store, fresh: Fresh) -> None:
        for held in (
            {"empty": RawTensor("F32", (0,), b"")},
            {"scalar": RawTensor("I64", (), bytes(8))},
            {"one": RawTensor("BOOL", (1, 1, 1), b"\1")},
            {"huge and empty": RawTensor("F64", (1 << 61, 0), b"")},
        ):
            folder = fresh()
            check_round_trip(store, write_checkpoint(folder / "m", held))

    def test_names_that_are_paths_in_the_tree(self, store: Store, fresh: Fresh) -> None:
        folder = fresh()
        names = [
            "",
            ".",
            "..",
            "a",
            "a.b",
            "a.b.c",
            "a..b",
            "0",
            "0.0",
            "a.0",
            "a.0.b",
            "/",
            "../x",
            "é.é",
            "\x00",
            "a" * 3000,
        ]
        held = {name: random_tensor("U8", (3,), seed) for seed, name in enumerate([*names, "b." * 400 + "w"])}
        check_round_trip(store, write_checkpoint(folder / "m", held))

    def test_a_header_larger_than_a_block(self, store: Store, fresh: Fresh) -> None:
        folder = fresh()
        held = {f"model.layers.{number}.weight": RawTensor("U8", (1,), bytes([number % 256])) for number in range(400)}
        check_round_trip(store, write_checkpoint(folder / "m", held, style=HeaderStyle(padding=" " * 10_000)))

    def test_files_larger_than_a_block(self, store: Store, fresh: Fresh) -> None:
        folder = fresh()
        generator = np.random.default_rng(0)
        files = {name: generator.bytes(size) for name, size in {"a": 4096, "b": 4097, "c": 100_000, "d": 8192}.items()}
        check_round_trip(store, write_checkpoint(folder / "m", {"w": random_tensor("U8", (3,))}, files=files))


class TestWithABase:
    @few
    @given(tensor_maps, st.data())
    def test_any_change_comes_out_as_it_came_in(
        self, store: Store, fresh: Fresh, held: dict[str, RawTensor], data: st.DataObject
    ) -> None:
        """Bytes changed, tensors added and taken away, types exchanged: a base may only save space."""
        folder = fresh()
        tuned: dict[str, RawTensor] = {}
        for name, tensor in held.items():
            change = data.draw(st.sampled_from(["same", "flip", "new", "gone", "rows"]))
            content = bytearray(tensor.data)
            if change == "flip" and content:
                for _ in range(data.draw(st.integers(1, 3))):
                    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            if change == "rows" and tensor.shape and len(content):
                row = len(content) // tensor.shape[0] if len(content) % tensor.shape[0] == 0 else 0
                if row:
                    tuned[name] = RawTensor(
                        tensor.dtype, (tensor.shape[0] + 1, *tensor.shape[1:]), bytes(content) + bytes(row)
                    )
                    continue
            if change == "new":
                tuned[name + "'"] = data.draw(tensors())
            if change != "gone":
                tuned[name] = RawTensor(tensor.dtype, tensor.shape, bytes(content))
        if not set(tuned) & set(held):
            tuned = {**tuned, **held}
        base, expert = write_checkpoint(folder / "base", held), write_checkpoint(folder / "expert", tuned)
        number = len(object_files(store))
        refs = {base: f"base{number}", expert: f"expert{number}"}
        store.ingest([base], ref=refs[base])
        store.ingest([expert], ref=refs[expert], base=refs[base])
        for path, ref in refs.items():
            store.snapshot(ref).export(folder / "out" / path.name)
            assert folder_bytes(folder / "out" / path.name) == folder_bytes(path)
        before = state_of(store)
        (again,) = store.ingest([expert], ref=refs[expert], base=refs[base])
        assert (again.written_bytes, again.unchanged) == (0, True)
        assert state_of(store) == before

    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    def test_every_type(self, store: Store, fresh: Fresh, dtype: str) -> None:
        folder = fresh()
        before = random_tensor(dtype, (130, 120), 1)
        after = bytearray(before.data)
        after[len(after) // 2] ^= 1
        base = write_checkpoint(folder / "base", {"w": before})
        expert = write_checkpoint(folder / "expert", {"w": RawTensor(dtype, before.shape, bytes(after))})
        store.ingest([base])
        store.ingest([expert], base="base")
        assert store.snapshot("expert").read_tensor("w").tobytes() == after
