"""``docs/format.md`` against the code: every number, name and limit of the format stands on the page."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from mergepipe.merge.plan import PLAN_FORMAT
from mergepipe.store import (
    catalog,
    chunking,
    codecs,
    commits,
    frame,
    layout,
    manifest,
    norms,
    objects,
    staging,
)
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.statistics import DeltaStatistics

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no section {title!r}"
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def example(tag: str) -> str:
    return PAGE.split(f"```{tag}\n")[1].split("```")[0]


def test_every_database_has_a_row() -> None:
    names = [cells[0].strip("`") for cells in rows(section("The catalog"))[1:]]
    assert names == list(catalog.DATABASES)


@pytest.mark.parametrize("numbers", [frame.Kind, frame.Encoding])
def test_every_kind_and_encoding_has_its_number(numbers: type[frame.Kind] | type[frame.Encoding]) -> None:
    word = numbers.__name__.lower()
    table = rows(section("The frame").split(f"| {word} | number |")[1].split("\n\n")[0])
    assert {cells[0]: int(cells[1]) for cells in table} == {item.name.lower(): int(item) for item in numbers}


def frame_fields() -> dict[str, tuple[int, int]]:
    table = [cells for cells in rows(section("The frame")) if len(cells) == 4 and cells[0].isdigit()]
    return {cells[2]: (int(cells[0]), int(cells[1])) for cells in table}


def test_the_frame_has_its_fields_where_the_page_says() -> None:
    payload = b"payload"
    base = Digest(bytes(range(32)))
    header = frame.Header(frame.Kind.BLOCK, frame.Encoding.DELTA, 4, 0x1122334455667788, len(payload), base)
    data = frame.pack_header(header, [payload])
    wanted = {
        "magic": frame.MAGIC,
        "version": bytes([frame.VERSION]),
        "kind": bytes([1]),
        "encoding": bytes([2]),
        "width": bytes([4]),
        "zero": bytes(4),
        "raw size": (0x1122334455667788).to_bytes(8, "little"),
        "payload size": len(payload).to_bytes(8, "little"),
        "base": bytes(base),
        "check": bytes(hash_bytes(data[:64] + payload)),
    }
    fields = frame_fields()
    assert fields.keys() == wanted.keys()
    for name, (offset, size) in fields.items():
        assert data[offset : offset + size] == wanted[name], name
    assert len(data) == frame.HEADER_BYTES == 96
    assert sum(size for _, size in fields.values()) == 96
    assert frame.MAGIC.hex(" ").upper() in PAGE


def test_the_object_row_has_its_fields_where_the_page_says() -> None:
    base = Digest(bytes(range(32)))
    row = catalog.ObjectRow(frame.Kind.BLOCK, frame.Encoding.DELTA, 4, 111, 222, 333, base).pack()
    table = [(int(cells[0]), int(cells[1])) for cells in rows(section("objects")) if cells[0].isdigit()]
    assert [row[offset : offset + size] for offset, size in table] == [
        bytes([1]), bytes([2]), bytes([4]), bytes(5),
        *(number.to_bytes(8, "little") for number in (111, 222, 333)), bytes(base),
    ]  # fmt: skip
    assert f"object row, {len(row)} bytes" in PAGE


def test_the_statistics_row_has_its_fields_where_the_page_says() -> None:
    sketch = np.arange(norms.SKETCH_SIZE, dtype=np.float32)
    row = DeltaStatistics(7, 5, 1.5, 2.5, 3.5, sketch).pack()
    table = [(int(cells[0]), int(cells[1])) for cells in rows(section("deltas")) if cells[0].isdigit()]
    assert [row[offset : offset + size] for offset, size in table] == [
        (7).to_bytes(8, "little"), (5).to_bytes(8, "little"),
        *(struct.pack("<d", number) for number in (1.5, 2.5, 3.5)), sketch.astype("<f4").tobytes(),
    ]  # fmt: skip
    assert f"delta statistics, {len(row)} bytes" in PAGE
    assert norms.HEAD.size == 40


def test_every_context_of_an_id_is_named() -> None:
    contexts = set(staging._RECORD_NAMES.values()) | set(objects._RECORDS.values())
    for folder in ("store", "merge", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            contexts |= set(re.findall(r'hash_record\(\s*"(\w+)"', path.read_text(encoding="utf-8")))
    assert contexts >= {"node", "commit", "plan", "tensor", "recipe"}
    assert set(re.findall(r"`mergepipe v1 (\w+)`", section("Ids"))) == contexts


def test_every_element_type_has_a_row() -> None:
    def yes(value: bool) -> str:
        return "yes" if value else "no"

    wanted = [
        [
            f"`{t.name}`",
            str(t.bits),
            str(t.plane_bytes),
            yes(t.has_statistics),
            f"`{t.zarr_name}`" if t.zarr_name else "packed bytes",
        ]
        for t in DTYPES.values()
    ]
    assert rows(section("Element types"))[1:] == wanted


def test_the_fields_of_records() -> None:
    assert {cells[0].strip("`") for cells in rows(section("Commits"))[1:]} == commits._FIELDS
    for word in (*commits.ROLES, *commits.KINDS):
        assert f"`{word}`" in section("Commits")
    entry = manifest.TensorEntry("F32", (), (), (Digest(bytes(32)),))
    names = [cells[0].strip("`") for cells in rows(section("Manifest nodes"))]
    assert set(names) - {"field"} == {"nodes", "tensors", "files", "shards", *entry.as_json()}


def test_the_limits_and_versions() -> None:
    for number in (
        chunking.MINIMUM_BLOCK_BYTES,
        chunking.DEFAULT_BLOCK_BYTES,
        chunking.MAXIMUM_BLOCK_BYTES,
        objects.MAXIMUM_RECORD_BYTES,
        norms.HISTOGRAM_BINS,
    ):
        assert str(number) in PAGE
    assert f"at most {manifest.MAXIMUM_DIMENSIONS} extents" in PAGE
    assert f"At most {manifest.MAXIMUM_DEPTH}\nparts belong to the path" in PAGE
    versions = {cells[0]: cells[2] for cells in rows(section("Compatibility"))[1:]}
    assert versions["store format"] == str(layout.FORMAT_VERSION)
    assert versions["object format"] == str(frame.VERSION)
    assert versions["plan format"] == str(PLAN_FORMAT)
    assert f"max_dbs={len(catalog.DATABASES) + 7}" in PAGE


def test_the_example_of_a_delta_is_what_the_code_writes() -> None:
    lines = {line[:6].strip(): line[6:] for line in example("delta-example").splitlines()}
    new, base = (
        np.array([int(word, 16) for word in lines[name].split()], "<u2").view(np.uint8) for name in ("new", "base")
    )
    payload = b"".join(bytes(part) for part in codecs.encode_delta(new, base, 2))
    assert payload == bytes.fromhex(example("delta-payload"))


def test_the_example_of_a_frame_is_what_the_code_writes() -> None:
    header = frame.Header(frame.Kind.FILE, frame.Encoding.RAW, 1, 6, 6, None)
    data = frame.pack_header(header, [b"hello\n"]) + b"hello\n"
    assert data == bytes.fromhex("".join(line[4:] for line in example("frame-example").splitlines()))


def test_the_examples_of_chunks_are_what_the_code_cuts() -> None:
    for line in example("chunk-examples").splitlines():
        dtype, shape_text, chunks_text, _ = line.split()
        shape, chunks = (tuple(int(extent) for extent in text.split(",")) for text in (shape_text, chunks_text))
        assert chunking.chunk_shape(shape, DTYPES[dtype].bits, chunking.DEFAULT_BLOCK_BYTES) == chunks
        assert chunking.is_contiguous(shape, chunks, DTYPES[dtype].bits)


def test_the_examples_of_names_are_where_the_code_hangs_them() -> None:
    for line in example("name-examples").splitlines():
        name, path, rest = line.split()
        assert manifest.split_name(name) == (() if path == "-" else tuple(path.split("/")), rest)
