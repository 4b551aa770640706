"""A reader of stores that knows ``docs/format.md`` and nothing of the code, held against what ``mp`` writes.

Nothing here is imported from the project: the store is made by the command ``mp``, in processes of its own, and
everything that reads it is written from the page.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import pytest
import zstandard
from blake3 import blake3

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"
BITS = {
    name: (int(bits), int(width), statistics == "yes")
    for name, bits, width, statistics in re.findall(
        r"^\| `(\w+)` \| (\d+) \| (\d+) \| (yes|no) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
}


def example(tag: str) -> str:
    """The text of the page's code block of that kind."""
    found = re.search(rf"^```{tag}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"the page has no block {tag!r}"
    return found.group(1)


# --- Objects ----------------------------------------------------------------------------------------------------------

BLOCK, FILE, NODE, COMMIT, PLAN, PREVIEW = 1, 2, 3, 4, 5, 6
RAW, PLANES, DELTA, DEFLATE = 0, 1, 2, 3
CONTEXTS = {NODE: "node", COMMIT: "commit", PLAN: "plan"}


class Frame(NamedTuple):
    kind: int
    encoding: int
    width: int
    raw_size: int
    base: bytes
    payload: bytes


def read_frame(data: bytes) -> Frame:
    assert len(data) >= 96
    assert data[:8] == bytes.fromhex("894D504F0D0A1A0A")
    version, kind, encoding, width = data[8:12]
    assert version == 1
    assert kind in (1, 2, 3, 4, 5, 6)
    assert encoding in (0, 1, 2, 3)
    assert width in (1, 2, 4, 8)
    assert data[12:16] == bytes(4)
    raw_size, payload_size = struct.unpack("<QQ", data[16:32])
    base = data[32:64]
    assert (encoding == DELTA) == (base != bytes(32))
    assert len(data) == 96 + payload_size
    assert blake3(data[:64] + data[96:]).digest() == data[64:96]
    allowed = (RAW, DEFLATE) if kind in CONTEXTS else (RAW, PLANES) if kind == PREVIEW else (RAW, PLANES, DELTA)
    assert encoding in allowed
    return Frame(kind, encoding, width, raw_size, base, data[96:])


def read_planes(payload: bytes, width: int, elements: int) -> list[np.ndarray]:
    table = struct.unpack(f"<{width}Q", payload[: 8 * width])
    position = 8 * width
    planes = []
    for entry in table:
        method, length = entry >> 56, entry & (1 << 56) - 1
        stream = payload[position : position + length]
        assert len(stream) == length
        position += length
        if method == 1:
            assert zstandard.frame_content_size(stream) == elements
            stream = zstandard.ZstdDecompressor().decompress(stream)
        else:
            assert method == 0
        assert len(stream) == elements
        planes.append(np.frombuffer(stream, np.uint8))
    assert position == len(payload)
    return planes


def join_planes(planes: list[np.ndarray]) -> np.ndarray:
    """Elements as unsigned integers of the planes' number of bytes."""
    kind = np.dtype(f"<u{len(planes)}")
    joined = np.zeros(len(planes[0]), kind)
    for number, plane in enumerate(planes):
        joined |= plane.astype(kind) << np.array(8 * number, kind)
    return joined


def in_order(x: np.ndarray) -> np.ndarray:
    """The page's ``m``, on signed integers."""
    bits = x.dtype.itemsize * 8
    return x ^ ((x >> (bits - 1)) & x.dtype.type(2 ** (bits - 1) - 1))


def add_difference(z: np.ndarray, base: bytes) -> np.ndarray:
    signed = np.dtype(f"<i{z.dtype.itemsize}")
    half, low = (z >> np.array(1, z.dtype)).view(signed), (z & np.array(1, z.dtype)).view(signed)
    with np.errstate(over="ignore"):
        d = half ^ -low
        return in_order(in_order(np.frombuffer(base, signed)) + d)


class Reader:
    """A store by its folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        settings = json.loads((root / "store.json").read_text())
        assert settings["format"] <= 1
        self.block_bytes = settings["block_bytes"]
        self.catalog = root / settings["catalog"]
        self.encodings: set[tuple[int, int]] = set()
        with lmdb.open(str(self.catalog), readonly=True, lock=False, max_dbs=18, lib_version=0) as environment:
            self.rows = {name: dict(self._database(environment, name)) for name in names_of_databases()}

    @staticmethod
    def _database(environment: Any, name: str) -> Iterator[tuple[bytes, bytes]]:
        database = environment.open_db(name.encode(), create=False)
        with environment.begin(db=database) as transaction:
            yield from transaction.cursor()

    def path(self, identity: bytes) -> Path:
        return self.root / "objects" / identity.hex()[:2] / identity.hex()[2:]

    def object(self, identity: bytes) -> tuple[Frame, bytes]:
        """An object's frame and its raw bytes, checked in every way that the page names."""
        frame = read_frame(self.path(identity).read_bytes())
        self.encodings.add((frame.kind, frame.encoding))
        data = self._decode(frame)
        assert len(data) == frame.raw_size
        if frame.kind in CONTEXTS:
            context = f"mergepipe v1 {CONTEXTS[frame.kind]}"
            assert blake3(data, derive_key_context=context).digest() == identity
        else:
            assert blake3(data).digest() == identity
        return frame, data

    def _decode(self, frame: Frame) -> bytes:
        if frame.encoding == RAW:
            return frame.payload
        if frame.encoding == DEFLATE:
            return zlib.decompress(frame.payload)
        assert frame.raw_size % frame.width == 0
        joined = join_planes(read_planes(frame.payload, frame.width, frame.raw_size // frame.width))
        if frame.encoding == PLANES:
            return joined.tobytes()
        base, data = self.object(frame.base)
        assert base.encoding in (RAW, PLANES)
        assert base.raw_size == frame.raw_size
        return add_difference(joined, data).tobytes()

    def record(self, kind: int, identity: str) -> Any:
        frame, data = self.object(bytes.fromhex(identity))
        assert frame.kind == kind
        return json.loads(data)

    def commit(self, ref: str) -> dict[str, Any]:
        row = json.loads(self.rows["refs"][ref.encode()])
        assert row["name"] == ref
        data = self.rows["commits"][bytes.fromhex(row["commit"])]
        assert blake3(data, derive_key_context="mergepipe v1 commit").hexdigest() == row["commit"]
        assert self.object(bytes.fromhex(row["commit"]))[1] == data
        value: dict[str, Any] = json.loads(data)
        return value

    def entry(self, ref: str, name: str) -> dict[str, Any]:
        path, rest = split_name(name)
        node = self.record(NODE, self.commit(ref)["tree"])
        for part in path:
            node = self.record(NODE, node["nodes"][part])
        entry: dict[str, Any] = node["tensors"][rest]
        return entry

    def tensor(self, ref: str, name: str) -> bytes:
        entry = self.entry(ref, name)
        spans = list(block_spans(entry["shape"], entry["chunks"]))
        assert len(spans) == len(entry["blocks"])
        bits = BITS[entry["dtype"]][0]
        parts = []
        position = 0
        for (start, count), block in zip(spans, entry["blocks"], strict=True):
            assert start == position
            position += count
            _, data = self.object(bytes.fromhex(block))
            assert len(data) == count * bits // 8
            parts.append(data)
        assert position == math.prod(entry["shape"])
        return b"".join(parts)

    def names(self, ref: str) -> list[str]:
        def walk(identity: str, path: tuple[str, ...]) -> Iterator[str]:
            node = self.record(NODE, identity)
            assert set(node) <= {"nodes", "tensors", "files", "shards"}
            yield from (".".join((*path, rest)) for rest in node.get("tensors", {}))
            for part, child in node.get("nodes", {}).items():
                yield from walk(child, (*path, part))

        return list(walk(self.commit(ref)["tree"], ()))

    def file(self, entry: dict[str, Any]) -> bytes:
        data = b"".join(self.object(bytes.fromhex(piece))[1] for piece in entry["blocks"])
        assert len(data) == entry["size"]
        return data

    def folder(self, ref: str) -> dict[str, bytes]:
        """All files of a model, the shards put together from headers and tensors."""
        root = self.record(NODE, self.commit(ref)["tree"])
        found = {path: self.file(entry) for path, entry in root["files"].items()}
        for shard in root["shards"]:
            header = self.file(shard["header"])
            content = json.loads(header[8:])
            content.pop("__metadata__", None)
            data = bytearray(max((value["data_offsets"][1] for value in content.values()), default=0))
            for name, value in content.items():
                begin, end = value["data_offsets"]
                data[begin:end] = self.tensor(ref, name)
            found[shard["path"]] = header + bytes(data)
        return found


class Preview(NamedTuple):
    base: bytes
    block: bytes
    residual: float
    difference: np.ndarray


def read_preview(data: bytes) -> Preview:
    version, level, zero, segment, elements, residual = struct.unpack("<BBHIQd", data[:24])
    unit, rest = struct.unpack("<fI", data[88:96])
    assert level in (1, 2)
    assert (version, zero, segment, rest) == (1, 0, 1024, 0)
    assert math.isfinite(residual)
    assert residual >= 0
    segments = -(-elements // 1024)
    assert len(data) == 96 + 2 * segments + 256 * segments
    codes = np.frombuffer(data, np.uint8, 256 * segments, 96).reshape(segments, 256)
    ratios = np.frombuffer(data, "<f2", segments, 96 + 256 * segments)
    scales = ratios.astype(np.float32) * np.float32(unit)
    assert np.isfinite(scales).all()
    difference = np.zeros((segments, 1024), np.float32)
    for quarter in range(4):
        two_bits = codes >> 2 * quarter & 3
        values = np.array([0, 1, -1, 0], np.float32)[two_bits] * scales[:, None]
        difference[:, 256 * quarter : 256 * (quarter + 1)] = values
    assert not difference.ravel()[elements:].any()
    return Preview(data[24:56], data[56:88], residual, difference.ravel()[:elements])


def names_of_databases() -> list[str]:
    table = PAGE.read_text(encoding="utf-8").split("| database | key | value |")[1].split("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def split_name(name: str) -> tuple[list[str], str]:
    parts = name.split(".")
    layers = [i for i, part in enumerate(parts[:-1]) if part.isascii() and part.isdigit()]
    depth = min(layers[0] + 1 if layers else max(len(parts) - 2, 0), 64)
    return parts[:depth], ".".join(parts[depth:])


def block_spans(shape: list[int], chunks: list[int]) -> Iterator[tuple[int, int]]:
    """First element and number of elements of each block."""
    if not shape:
        yield 0, 1
        return
    blocks = math.prod(-(-extent // chunk) for extent, chunk in zip(shape, chunks, strict=True))
    axis = next((a for a, chunk in enumerate(chunks) if chunk != 1), len(shape) - 1)
    inner = math.prod(shape[axis + 1 :])
    along = -(-shape[axis] // chunks[axis])
    for index in range(blocks):
        outer, step = divmod(index, along)
        rows = min(chunks[axis], shape[axis] - step * chunks[axis])
        yield (outer * shape[axis] + step * chunks[axis]) * inner, rows * inner


def cut(shape: list[int], bits: int, target: int) -> list[int]:
    """The chunk shape that a writer chooses."""
    if math.prod(shape) * bits <= target * 8:
        return [max(extent, 1) for extent in shape]
    for axis, extent in enumerate(shape):
        row_bits = math.prod(shape[axis + 1 :]) * bits
        rows = target * 8 // row_bits
        if rows or axis == len(shape) - 1 or row_bits % 8:
            step = 8 // math.gcd(row_bits, 8)
            return [1] * axis + [min(max(rows // step * step, step), extent)] + shape[axis + 1 :]
    raise AssertionError


# --- The store under test ---------------------------------------------------------------------------------------------


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


Weights = dict[str, tuple[str, tuple[int, ...], bytes]]


def base_weights() -> Weights:
    generator = np.random.default_rng(7)
    weights: Weights = {}

    def matrix(name: str, dtype: str, *shape: int) -> None:
        values = generator.standard_normal(shape).astype(np.float32) * 0.02
        data = bfloat16(values) if dtype == "BF16" else values.astype({"F16": "<f2", "F32": "<f4"}[dtype])
        weights[name] = (dtype, shape, data.tobytes())

    matrix("model.embed_tokens.weight", "BF16", 101, 64)
    for layer in range(2):
        matrix(f"model.layers.{layer}.q.weight", "BF16", 70, 64)
        matrix(f"model.layers.{layer}.up.weight", "F32", 33, 64)
        matrix(f"model.layers.{layer}.half.weight", "F16", 5, 33, 64)
    weights["noise"] = ("U8", (9000,), generator.bytes(9000))
    weights["steps.seen"] = ("I64", (), (1234567).to_bytes(8, "little"))
    weights["nothing"] = ("F32", (0, 8), b"")
    weights["tiny.f8"] = ("F8_E4M3", (3, 7), generator.bytes(21))
    weights["packed.f4"] = ("F4", (64, 300), generator.bytes(9600))
    return weights


def tuned_weights(base: Weights) -> Weights:
    """Layer 1 changes a little; special values among it; the rest stays."""
    generator = np.random.default_rng(8)
    tuned = dict(base)
    for name, (dtype, shape, data) in base.items():
        if not name.startswith("model.layers.1"):
            continue
        values = widened(data, dtype) + generator.standard_normal(math.prod(shape)).astype(np.float32) * 2e-4
        new = bfloat16(values) if dtype == "BF16" else values.astype({"F16": "<f2", "F32": "<f4"}[dtype])
        tuned[name] = (dtype, shape, new.tobytes())
    dtype, shape, data = tuned["tiny.f8"]
    tuned["tiny.f8"] = (dtype, shape, bytes([data[0] ^ 0x80]) + data[1:])
    return tuned


def write_safetensors(path: Path, weights: Weights) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in weights.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(entries).encode() + b"   "  # padding as no library writes it: it has to come out again
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in weights.values()))


def write_model(folder: Path, weights: Weights) -> Path:
    """Two shards, an index, and other files."""
    folder.mkdir()
    names = list(weights)
    weight_map = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / file, {name: weights[name] for name in names[number - 1 :: 2]})
        weight_map.update(dict.fromkeys(names[number - 1 :: 2], file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "toy"}\n')
    (folder / "vocab.txt").write_text("".join(f"token {number}\n" for number in range(3000)))
    (folder / "empty.txt").write_bytes(b"")
    return folder


def mp(folder: Path, *words: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MP_")}
    command = [sys.executable, "-m", "mergepipe.cli.app", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Weights]]:
    folder = tmp_path_factory.mktemp("family")
    base = base_weights()
    models = {"base": base, "tuned": tuned_weights(base)}
    for name, weights in models.items():
        write_model(folder / name, weights)
    mp(folder, "init", "--block-size", "4KiB")
    mp(folder, "ingest", "base")
    mp(folder, "ingest", "tuned", "--base", "base")
    plan = ("--expert", "tuned:0.5", "--method", "ties", "--density", "0.4", "--budget", "60%")
    mp(folder, "plan", "--base", "base", *plan, "-o", "p.json")
    mp(folder, "merge", "--plan", "p.json", "--as", "merged/v1")
    return folder, models


@pytest.fixture(scope="module")
def reader(family: tuple[Path, dict[str, Weights]]) -> Reader:
    return Reader(family[0] / ".mp")


# --- Tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", ["base", "tuned"])
def test_tensors_come_back_from_a_ref_name(ref: str, family: tuple[Path, dict[str, Weights]], reader: Reader) -> None:
    weights = family[1][ref]
    assert sorted(reader.names(ref)) == sorted(weights)
    for name, (dtype, shape, data) in weights.items():
        entry = reader.entry(ref, name)
        assert (entry["dtype"], tuple(entry["shape"])) == (dtype, shape)
        assert entry["chunks"] == cut(list(shape), BITS[dtype][0], reader.block_bytes)
        assert reader.tensor(ref, name) == data


@pytest.mark.parametrize("ref", ["base", "tuned"])
def test_files_come_back_byte_for_byte(ref: str, family: tuple[Path, dict[str, Weights]], reader: Reader) -> None:
    folder = family[0] / ref
    assert reader.folder(ref) == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_encoding_was_met(reader: Reader) -> None:
    for ref in ("base", "tuned", "merged/v1"):
        reader.folder(ref)
    wanted = {(BLOCK, RAW), (BLOCK, PLANES), (BLOCK, DELTA), (FILE, RAW), (FILE, PLANES), (NODE, DEFLATE)}
    assert wanted <= reader.encodings


def test_a_file_has_pieces_of_the_block_size(reader: Reader) -> None:
    root = reader.record(NODE, reader.commit("base")["tree"])
    sizes = [len(reader.object(bytes.fromhex(piece))[1]) for piece in root["files"]["vocab.txt"]["blocks"]]
    assert len(sizes) > 2
    assert set(sizes[:-1]) == {reader.block_bytes}
    assert root["files"]["empty.txt"] == {"blocks": [], "size": 0}


def test_equal_layers_are_one_node(reader: Reader) -> None:
    def layers(ref: str) -> dict[str, str]:
        model = reader.record(NODE, reader.commit(ref)["tree"])["nodes"]["model"]
        nodes: dict[str, str] = reader.record(NODE, reader.record(NODE, model)["nodes"]["layers"])["nodes"]
        return nodes

    assert layers("base")["0"] == layers("tuned")["0"]
    assert layers("base")["1"] != layers("tuned")["1"]


def test_object_rows_say_what_the_headers_say(reader: Reader) -> None:
    for identity, row in reader.rows["objects"].items():
        kind, encoding, width, zero, raw, stored, touched, base = struct.unpack("<BBB5sQQQ32s", row)
        data = reader.path(identity).read_bytes()
        frame = read_frame(data)
        assert (kind, encoding, width, raw, base) == (*frame[:4], frame.base)
        assert (zero, stored) == (bytes(5), len(data))
        assert touched > 1_600_000_000
        reader.object(identity)
    on_disk = sum(1 for path in (reader.root / "objects").rglob("*") if path.is_file())
    assert on_disk == len(reader.rows["objects"])


def signs(row: int) -> int:
    mask = (1 << 64) - 1
    z = (row + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def differing_blocks(reader: Reader, name: str) -> Iterator[tuple[bytes, np.ndarray]]:
    """For each block of a tensor that changed: the key of its statistics, and its difference."""
    old, new = reader.entry("base", name), reader.entry("tuned", name)
    for before, after in zip(old["blocks"], new["blocks"], strict=True):
        if before != after:
            keys = bytes.fromhex(before), bytes.fromhex(after)
            a, b = (widened(reader.object(key)[1], new["dtype"]) for key in keys)
            yield keys[0] + keys[1], b - a


@pytest.mark.parametrize("name", ["model.layers.1.q.weight", "model.layers.1.up.weight", "model.layers.1.half.weight"])
def test_delta_statistics(name: str, reader: Reader) -> None:
    seen = 0
    for key, difference in differing_blocks(reader, name):
        row = reader.rows["deltas"][key]
        assert len(row) == 296
        elements, changed, l2, l1, largest = struct.unpack("<QQddd", row[:40])
        exact = difference.astype(np.float64)
        assert elements == exact.size
        assert changed == np.count_nonzero(exact)
        assert l2 == pytest.approx(np.sqrt((exact**2).sum()), rel=1e-5)
        assert l1 == pytest.approx(np.abs(exact).sum(), rel=1e-5)
        assert largest == np.abs(exact).max()
        sums = np.zeros(64)
        for i, value in enumerate(exact):
            sums[i % 64] += -value if signs(i // 64) >> i % 64 & 1 else value
        np.testing.assert_allclose(np.frombuffer(row[40:], "<f4"), sums, atol=1e-6)
        seen += 1
    assert seen


def test_previews(family: tuple[Path, dict[str, Weights]], tmp_path: Path) -> None:
    """Of a store with larger blocks: those of the other tests are too small for them."""
    for name, weights in family[1].items():
        write_model(tmp_path / name, weights)
    mp(tmp_path, "init", "--block-size", "16KiB")
    mp(tmp_path, "ingest", "base")
    mp(tmp_path, "ingest", "tuned", "--base", "base", "--previews")
    reader, seen, empty = Reader(tmp_path / ".mp"), 0, 0
    for name in ("model.layers.1.q.weight", "model.layers.1.up.weight", "model.layers.1.half.weight"):
        for key, difference in differing_blocks(reader, name):
            (own,) = (each for each in reader.rows["previews"] if each[:-1] == key and each[-1] in (1, 2))
            row = reader.rows["previews"].pop(own)
            if not row:
                empty += 1
                assert difference.size < 4096
                continue
            assert len(row) == 48
            frame, data = reader.object(row[:32])
            preview = read_preview(data)
            stored, residual = struct.unpack("<Qd", row[32:])
            assert (frame.kind, reader.path(row[:32]).stat().st_size) == (PREVIEW, stored)
            assert (preview.base + preview.block, preview.residual) == (key, residual)
            exact = difference.astype(np.float64)
            left, whole = np.linalg.norm(exact - preview.difference), np.linalg.norm(exact)
            assert left <= residual <= 1.001 * left + 0.003 * whole
            assert residual < 0.8 * whole
            assert (preview.difference * exact >= 0).all()
            assert 0.05 < np.count_nonzero(preview.difference) / exact.size <= {1: 0.33, 2: 0.6}[data[1]]
            seen += 1
    assert seen >= 2
    assert empty
    assert reader.rows["previews"] == {}


def test_types_without_statistics_have_no_rows(reader: Reader) -> None:
    old, new = (reader.entry(ref, "tiny.f8")["blocks"][0] for ref in ("base", "tuned"))
    assert old != new
    assert bytes.fromhex(old + new) not in reader.rows["deltas"]


def tensor_id(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return blake3(text.encode(), derive_key_context="mergepipe v1 tensor").digest()


def test_histograms(reader: Reader) -> None:
    name = "model.layers.1.q.weight"
    old, new = reader.entry("base", name), reader.entry("tuned", name)
    row = reader.rows["tensors"][tensor_id(old) + tensor_id(new)]
    (count,) = struct.unpack("<I", row[:4])
    assert len(row) == 4 + 10 * count
    bins, counts = np.frombuffer(row, "<u2", count, 4), np.frombuffer(row, "<u8", count, 4 + 2 * count)
    difference = widened(reader.tensor("tuned", name), "BF16") - widened(reader.tensor("base", name), "BF16")
    wanted = np.bincount(np.abs(difference).view(np.uint32) >> 16, minlength=32768)
    assert dict(zip(bins.tolist(), counts.tolist(), strict=True)) == {
        int(j): int(wanted[j]) for j in np.flatnonzero(wanted)
    }
    assert sorted(bins) == list(bins)


def test_commits_parents_and_children(reader: Reader) -> None:
    commit = reader.commit("merged/v1")
    assert sorted(commit) == ["author", "kind", "measured", "message", "parents", "plan", "time", "tool", "tree"]
    assert [(parent["role"], parent["name"]) for parent in commit["parents"]] == [("base", "base"), ("expert", "tuned")]
    merged = bytes.fromhex(json.loads(reader.rows["refs"][b"merged/v1"])["commit"])
    for parent in commit["parents"]:
        assert reader.rows["children"][bytes.fromhex(parent["commit"]) + merged] == parent["role"].encode()
    assert reader.record(PLAN, commit["plan"])["format"] == 2


def test_the_plan_file_and_the_plan_object_are_one_value(
    family: tuple[Path, dict[str, Weights]], reader: Reader
) -> None:
    assert reader.record(PLAN, reader.commit("merged/v1")["plan"]) == json.loads((family[0] / "p.json").read_text())


def test_the_reflog_counts_from_zero(reader: Reader) -> None:
    row = json.loads(reader.rows["reflog"][b"merged/v1\0" + (0).to_bytes(8, "big")])
    assert set(row) == {"author", "new", "old", "reason", "time"}
    assert (row["old"], row["reason"]) == (None, "merge")


def test_results_lead_to_blocks(reader: Reader) -> None:
    assert reader.rows["results"]
    for recipe, block in reader.rows["results"].items():
        assert len(recipe) == 32
        assert reader.object(block)[0].kind == BLOCK
    assert set(reader.rows["meta"]) == {b"journal"}
    assert reader.rows["damaged"] == {}


def test_the_journal_says_what_refs_and_reflog_say(reader: Reader) -> None:
    data = (reader.root / "refs.journal").read_bytes()
    refs: dict[bytes, dict[str, str]] = {}
    logs: dict[bytes, list[dict[str, str]]] = {}
    for line in data.splitlines():
        check, text = line.split(b" ", 1)
        assert check.decode() == blake3(text).hexdigest()[:16]
        value = json.loads(text)
        assert text == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        name = value["name"].encode()
        if value["event"] in ("move", "past"):
            fields = ("author", "new", "old", "reason", "time")
            logs.setdefault(name, []).append({field: value[field] for field in fields})
        if value["event"] in ("move", "now"):
            refs.pop(name, None)
            if value["new"] is not None:
                refs[name] = {"commit": value["new"], "kind": value["kind"], "name": value["name"]}
    assert refs == {name: json.loads(row) for name, row in reader.rows["refs"].items()}
    assert {
        name + b"\0" + number.to_bytes(8, "big"): row for name, rows in logs.items() for number, row in enumerate(rows)
    } == {key: json.loads(row) for key, row in reader.rows["reflog"].items()}
    state, last = json.loads(reader.rows["meta"][b"journal"]), data.splitlines(keepends=True)[-1]
    assert (state["bytes"], state["last"], state["check"]) == (len(data), len(last), last[:16].decode())
    assert (state["lines"], state["moves"]) == (data.count(b"\n"), len(reader.rows["reflog"]))


def test_the_catalog_is_of_lmdb_0_9(reader: Reader) -> None:
    magic, version = struct.unpack("=II", (reader.catalog / "data.mdb").read_bytes()[16:24])
    assert (magic, version) == (0xBEEFC0DE, 1)


def test_nothing_is_left_in_tmp(reader: Reader) -> None:
    assert list((reader.root / "tmp").iterdir()) == []


# --- The page's examples ----------------------------------------------------------------------------------------------


def test_the_example_of_a_frame() -> None:
    data = bytes.fromhex("".join(line[4:] for line in example("frame-example").splitlines()))
    frame = read_frame(data)
    assert (frame.kind, frame.encoding, frame.payload) == (FILE, RAW, b"hello\n")
    assert blake3(b"hello\n").hexdigest() in PAGE.read_text(encoding="utf-8")


def test_the_example_of_a_delta() -> None:
    rows = {
        line[:6].strip(): [int(word, 16) for word in line[6:].split()] for line in example("delta-example").splitlines()
    }
    numbers = {name: np.array(row, np.uint16) for name, row in rows.items()}
    base, new = numbers["base"].view(np.int16), numbers["new"].view(np.int16)
    assert (in_order(base).view(np.uint16) == numbers["m(b)"]).all()
    assert (in_order(new).view(np.uint16) == numbers["m(n)"]).all()
    with np.errstate(over="ignore"):
        d = in_order(new) - in_order(base)
    assert (d.view(np.uint16) == numbers["d"]).all()
    assert (((d << 1) ^ (d >> 15)).view(np.uint16) == numbers["z"]).all()
    payload = bytes.fromhex(example("delta-payload"))
    z = join_planes(read_planes(payload, 2, 5))
    assert (z == numbers["z"]).all()
    assert (add_difference(z, base.tobytes()) == new).all()


def test_the_examples_of_chunks() -> None:
    for line in example("chunk-examples").splitlines():
        dtype, shape_text, chunks_text, blocks = line.split()
        shape, chunks = ([int(extent) for extent in text.split(",")] for text in (shape_text, chunks_text))
        assert cut(shape, BITS[dtype][0], 2 << 20) == chunks, line
        spans = list(block_spans(shape, chunks))
        assert len(spans) == int(blocks), line
        assert sum(count for _, count in spans) == math.prod(shape)


def test_the_examples_of_names() -> None:
    for line in example("name-examples").splitlines():
        name, path, rest = line.split()
        assert split_name(name) == ([] if path == "-" else path.split("/"), rest)
