"""The safetensors format: every honest header is read, and every lie is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import BadInputError
from mergepipe.store.safetensors_file import build_header, parse_header, read_header
from support.checkpoints import (
    HeaderStyle,
    RawTensor,
    file_with_header,
    random_tensor,
    safetensors_bytes,
    write_safetensors,
)
from support.strategies import names, styled_tensors, tensors, whole_bytes

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def read(folder: Path, content: bytes) -> Any:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return read_header(path)


class TestHonestFiles:
    @given(styled_tensors())
    def test_every_way_to_write_a_header_is_read(
        self, fresh: Callable[[], Path], sample: tuple[dict[str, RawTensor], HeaderStyle]
    ) -> None:
        held, style = sample
        content = safetensors_bytes(held, style)
        header = read(fresh(), content)
        found = {}
        for entry in header.entries:
            begin = len(header.raw) + entry.begin
            found[entry.name] = RawTensor(
                entry.dtype.name, entry.shape, content[begin : begin + entry.end - entry.begin]
            )
        assert found == held
        assert dict(header.metadata) == dict(style.metadata or {})
        assert content.startswith(header.raw)
        assert len(header.raw) + header.data_bytes == len(content)
        assert [entry.begin for entry in header.entries] == sorted(entry.begin for entry in header.entries)

    @pytest.mark.parametrize("dtype", sorted(DTYPES))
    def test_every_type_of_the_format(self, tmp_path: Path, dtype: str) -> None:
        path = write_safetensors(tmp_path / "x.safetensors", {"w": random_tensor(dtype, (8, 3))})
        (entry,) = read_header(path).entries
        assert (entry.dtype.name, entry.shape, entry.end) == (dtype, (8, 3), 24 * DTYPES[dtype].bits // 8)
        with safe_open(path, framework="np") as file:  # the format's own library agrees
            assert file.get_slice("w").get_dtype() == dtype
            assert list(file.get_slice("w").get_shape()) == [8, 3]

    def test_no_tensor_at_all(self, tmp_path: Path) -> None:
        header = read(tmp_path, safetensors_bytes({}, HeaderStyle(metadata={"a": "b"})))
        assert (header.entries, header.data_bytes, dict(header.metadata)) == ((), 0, {"a": "b"})

    def test_more_tensors_than_anybody_has(self, tmp_path: Path) -> None:
        many = {f"layers.{i}": RawTensor("U8", (1,), b"x") for i in range(20_000)}
        assert len(read(tmp_path, safetensors_bytes(many)).entries) == 20_000

    @given(st.dictionaries(names, tensors(), max_size=5), st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
    def test_what_is_built_is_read_and_padded(self, held: dict[str, RawTensor], metadata: dict[str, str]) -> None:
        try:
            json.dumps(metadata, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return
        header = build_header(((name, DTYPES[t.dtype], t.shape) for name, t in held.items()), metadata)
        assert len(header.raw) % 8 == 0
        assert parse_header(header.raw, header.data_bytes, "x") == header
        assert [entry.name for entry in header.entries] == list(held)

    def test_what_is_built_loads_in_the_formats_own_library(self, tmp_path: Path) -> None:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        header = build_header([("é", DTYPES["F32"], (2, 3))], {"format": "np"})
        (tmp_path / "x.safetensors").write_bytes(header.raw + array.tobytes())
        with safe_open(tmp_path / "x.safetensors", framework="np") as file:
            assert np.array_equal(file.get_tensor("é"), array)
            assert file.metadata() == {"format": "np"}


def entry(**changed: Any) -> dict[str, Any]:
    return {name: value for name, value in {**GOOD, **changed}.items() if value is not None}


# What the header says, how many bytes follow, what the message has to say besides the file's name.
LIES: dict[str, tuple[Any, int, list[str]]] = {
    "not JSON": ("{", 8, ["not valid JSON"]),
    "no UTF-8": (b'{"\xff":1}', 8, ["not UTF-8"]),
    "a list": ([], 0, ["no JSON object"]),
    "a key twice": (f'{{"w":{json.dumps(GOOD)},"w":{json.dumps(GOOD)}}}', 8, ["'w'", "twice"]),
    "a field twice": ('{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, ["'dtype'", "twice"]),
    "half of a character": (f'{{"\\ud800":{json.dumps(GOOD)}}}', 8, ["half of a character"]),
    "nested deeply": ('{"w":' + "[" * 100_000, 8, ["nested too deeply"]),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "w": GOOD}, 8, ["__metadata__"]),
    "metadata that is no map": ({"__metadata__": [], "w": GOOD}, 8, ["__metadata__"]),
    "an entry that is no map": ({"w": 3}, 8, ["'w'", "dtype, shape and data_offsets"]),
    "a field too few": ({"w": entry(shape=None)}, 8, ["'w'", "dtype, shape and data_offsets"]),
    "a field too many": ({"w": entry(stride=[1])}, 8, ["'w'", "dtype, shape and data_offsets"]),
    "an unknown dtype": ({"w": entry(dtype="F128")}, 8, ["'w'", "unknown dtype 'F128'"]),
    "a dtype that is no text": ({"w": entry(dtype=["F32"])}, 8, ["'w'", "unknown dtype"]),
    "a negative extent": ({"w": entry(shape=[-2])}, 8, ["'w'", "whole numbers"]),
    "a shape that is no list": ({"w": entry(shape=2)}, 8, ["'w'", "whole numbers"]),
    "a fractional extent": ({"w": entry(shape=[2.0])}, 8, ["'w'", "whole numbers"]),
    "an extent that is a truth": ({"w": entry(shape=[True, 2])}, 8, ["'w'", "whole numbers"]),
    "one offset": ({"w": entry(data_offsets=[8])}, 8, ["'w'", "whole numbers"]),
    "three offsets": ({"w": entry(data_offsets=[0, 4, 8])}, 8, ["'w'", "whole numbers"]),
    "a negative offset": ({"w": entry(data_offsets=[-8, 0])}, 8, ["'w'", "whole numbers"]),
    "offsets the wrong way round": ({"w": entry(data_offsets=[8, 0])}, 8, ["'w'", "takes 8 bytes"]),
    "a shape that is too large": ({"w": entry(shape=[3])}, 8, ["'w'", "takes 12 bytes", "say 8"]),
    "a shape that overflows": ({"w": entry(shape=[1 << 61, 8])}, 8, ["'w'", "say 8"]),
    "extents beyond 64 bits": ({"w": entry(shape=[1 << 64])}, 8, ["'w'", "whole numbers"]),
    "too many dimensions": ({"w": entry(shape=[1] * 65 + [2])}, 8, ["'w'", "whole numbers"]),
    "half a byte": ({"w": entry(dtype="F4", shape=[3], data_offsets=[0, 2])}, 2, ["'w'", "1.5 bytes"]),
    "half a byte too few": ({"w": entry(dtype="F4", shape=[3], data_offsets=[0, 1])}, 1, ["'w'", "1.5 bytes"]),
    "a gap before the first": ({"w": entry(data_offsets=[4, 12])}, 12, ["'w'", "gap"]),
    "a gap between": ({"v": GOOD, "w": entry(data_offsets=[12, 20])}, 20, ["'w'", "gap"]),
    "an overlap": ({"v": GOOD, "w": entry(data_offsets=[4, 12])}, 12, ["'w'", "overlaps"]),
    "two tensors in one place": ({"v": GOOD, "w": GOOD}, 8, ["'w'", "overlaps"]),
    "bytes that nobody owns": ({"w": GOOD}, 9, ["8 bytes", "file has 9", "no tensor owns"]),
    "a file that is cut off": ({"w": GOOD}, 7, ["8 bytes", "file has 7", "cut off"]),
    "data far away": ({"w": entry(data_offsets=[1 << 60, (1 << 60) + 8])}, 8, ["'w'", "gap"]),
}


class TestLies:
    @pytest.mark.parametrize("lie", list(LIES))
    def test_each_is_found_and_named(self, tmp_path: Path, lie: str) -> None:
        header, data_bytes, said = LIES[lie]
        with pytest.raises(BadInputError) as caught:
            read(tmp_path, file_with_header(header, bytes(data_bytes)))
        for words in ["model.safetensors", *said]:
            assert words in caught.value.message

    @pytest.mark.parametrize(
        "content",
        [b"", b"1234567", (9).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}", (200_000_000).to_bytes(8, "little")],
    )
    def test_a_length_that_cannot_be(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(BadInputError, match=r"model\.safetensors") as caught:
            read(tmp_path, content)
        assert caught.value.hint

    def test_a_huge_length_takes_no_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        with path.open("wb") as file:  # sparse: 1 TiB long, a few bytes of it on disk
            file.write((1 << 39).to_bytes(8, "little"))
            file.truncate(1 << 40)
        with pytest.raises(BadInputError, match="its header should have"):
            read_header(path)

    def test_a_length_that_its_bytes_do_not_have(self) -> None:
        with pytest.raises(BadInputError, match="length is not what it says"):
            parse_header((5).to_bytes(8, "little") + b"{}", 0, "x")

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(BadInputError, match="cannot be read: Is a directory"):
            read_header(tmp_path)

    @given(styled_tensors(), st.data())
    def test_a_changed_byte_is_bad_input_or_another_honest_header(
        self, fresh: Callable[[], Path], sample: tuple[dict[str, RawTensor], HeaderStyle], data: st.DataObject
    ) -> None:
        content = bytearray(safetensors_bytes(*sample))
        length = int.from_bytes(content[:8], "little")
        content[data.draw(st.integers(0, 7 + length))] ^= data.draw(st.integers(1, 255))
        try:
            header = read(fresh(), bytes(content))
        except BadInputError as error:
            assert "model.safetensors" in error.message
            return
        assert len(header.raw) + header.data_bytes == len(content)
        assert all(whole_bytes(entry.dtype.name, entry.shape) for entry in header.entries)
