"""Make a seeded family of bf16 checkpoints: a base, and experts that differ from it by small random deltas.

    python bench/family.py OUT --preset qwen3-0.6b --experts 4 --seed 0

Weights are N(0, 0.02). An expert is base + N(0, delta_std), computed in float32 and rounded to nearest
even, in the weights of the touched layers; embeddings, norms and all else keep the base's bytes. Each piece
of a tensor is seeded by (seed, member, tensor, piece) alone, so the same arguments give the same bytes
whatever the threads did, and memory stays at a few MB whatever the model's size. Safetensors files are
written by hand: no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from shapes import BYTES_PER_ELEMENT, PRESETS, Preset, Shape, TensorSpec, side_files, tensors_of

WEIGHT_STD = 0.02
DELTA_STD = 2.4e-4  # the ordered difference, coded losslessly, then takes about a third of the raw bytes
PIECE_ELEMENTS = 256 * 1024  # 1 MiB of float32: stays in a core's cache

_BASE_MEMBER = 0
_SPREAD_PIECE = 1 << 32  # a seed that no piece has


@dataclass(frozen=True, slots=True)
class Expert:
    """How one expert differs from the base.

    `layers` None means all. `spread` is the sigma of a lognormal factor that gives each tensor its own size
    of delta; 0 means all alike.
    """

    name: str
    delta_std: float = DELTA_STD
    layers: frozenset[int] | None = None
    spread: float = 0.0

    def touches(self, spec: TensorSpec) -> bool:
        return spec.kind == "weight" and (self.layers is None or spec.layer in self.layers)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its tensors by the byte offset at which each one's data starts."""

    filename: str
    header: bytes
    tensors: tuple[tuple[TensorSpec, int], ...]
    nbytes: int


def _header(tensors: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in tensors:
        entries[spec.name] = {
            "dtype": "BF16",
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
        start += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _shard(filename: str, group: Sequence[TensorSpec]) -> Shard:
    ordered = sorted(group, key=lambda spec: spec.name)  # as the safetensors library itself orders one dtype
    header = _header(ordered)
    placed, offset = [], len(header)
    for spec in ordered:
        placed.append((spec, offset))
        offset += spec.nbytes
    return Shard(filename, header, tuple(placed), offset)


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Split greedily in model order, as `save_pretrained` does; a single shard is `model.safetensors`."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    total = len(groups)
    return [_shard(f"model-{i:05d}-of-{total:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def index_file(shards: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json` for these shards."""
    weight_map = {spec.name: shard.filename for shard in shards for spec, _ in shard.tensors}
    total = sum(spec.nbytes for shard in shards for spec, _ in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def round_to_bf16(values: NDArray[np.float32], spare: NDArray[np.uint32], out: NDArray[np.uint16]) -> None:
    """Round finite float32 to bfloat16 bits, to nearest even; destroys `values`, uses `spare` as scratch."""
    bits = values.view(np.uint32)
    np.right_shift(bits, 16, out=spare)
    np.bitwise_and(spare, 1, out=spare)
    np.add(spare, 0x7FFF, out=spare)
    np.add(bits, spare, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(out, bits, casting="unsafe")


class _Scratch(threading.local):
    """Arrays that each thread allocates once."""

    def __init__(self) -> None:
        self.values = np.empty(PIECE_ELEMENTS, np.float32)
        self.base = np.empty(PIECE_ELEMENTS, np.uint32)
        self.spare = np.empty(PIECE_ELEMENTS, np.uint32)
        self.bits = np.empty(PIECE_ELEMENTS, np.uint16)


_scratch = _Scratch()


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def _pieces(spec: TensorSpec) -> Iterator[tuple[int, int, int]]:
    """(piece number, first element, count) over a tensor."""
    for number, first in enumerate(range(0, spec.elements, PIECE_ELEMENTS)):
        yield number, first, min(PIECE_ELEMENTS, spec.elements - first)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


@dataclass(frozen=True, slots=True)
class _Member:
    """One checkpoint being written: `number` is part of every seed; `expert` is None for the base itself."""

    folder: Path
    base: Path
    number: int
    expert: Expert | None
    seed: int

    def delta_std(self, spec: TensorSpec) -> float:
        assert self.expert is not None
        if self.expert.spread == 0:
            return self.expert.delta_std
        draw = _generator(self.seed, self.number, spec.index, _SPREAD_PIECE).standard_normal()
        return self.expert.delta_std * float(np.exp(self.expert.spread * draw))

    def draw(self, spec: TensorSpec, piece: int, count: int, std: float) -> NDArray[np.float32]:
        values = _scratch.values[:count]
        _generator(self.seed, self.number, spec.index, piece).standard_normal(dtype=np.float32, out=values)
        np.multiply(values, np.float32(std), out=values)
        return values


def _base_piece(member: _Member, spec: TensorSpec, piece: int, count: int) -> NDArray[np.uint16]:
    values = member.draw(spec, piece, count, WEIGHT_STD)
    if spec.kind == "norm":
        np.add(values, np.float32(1), out=values)
    bits = _scratch.bits[:count]
    round_to_bf16(values, _scratch.spare[:count], bits)
    return bits


def _expert_piece(member: _Member, spec: TensorSpec, piece: int, raw: bytes) -> NDArray[np.uint16]:
    original = np.frombuffer(raw, np.uint16)
    count = original.size
    base = _scratch.base[:count]
    np.copyto(base, original)
    np.left_shift(base, 16, out=base)
    values = member.draw(spec, piece, count, member.delta_std(spec))
    np.add(values, base.view(np.float32), out=values)
    bits = _scratch.bits[:count]
    round_to_bf16(values, _scratch.spare[:count], bits)
    return bits


def _fill_tensor(
    member: _Member, spec: TensorSpec, offset: int, fds: tuple[int, int], piece: tuple[int, int, int]
) -> None:
    number, first, count = piece
    target, source = fds
    start, size = offset + first * BYTES_PER_ELEMENT, count * BYTES_PER_ELEMENT
    if member.expert is None:
        data = _base_piece(member, spec, number, count).data
    else:
        raw = os.pread(source, size, start)
        if len(raw) != size:
            raise OSError(f"{member.base}: shorter than it was written")
        if member.expert.touches(spec):
            data = _expert_piece(member, spec, number, raw).data
        else:
            data = memoryview(raw)
    _write_all(target, data.cast("B"), start)


def _write_shard(member: _Member, shard: Shard, pool: ThreadPoolExecutor) -> None:
    target = os.open(member.folder / shard.filename, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    source = os.open(member.base / shard.filename, os.O_RDONLY)
    try:
        os.ftruncate(target, shard.nbytes)
        _write_all(target, memoryview(shard.header), 0)
        for spec, offset in shard.tensors:
            fill = partial(_fill_tensor, member, spec, offset, (target, source))
            for _ in pool.map(fill, list(_pieces(spec))):
                pass
    finally:
        os.close(source)
        os.close(target)


def _write_member(member: _Member, shape: Shape, shards: Sequence[Shard], pool: ThreadPoolExecutor) -> None:
    member.folder.mkdir(parents=True)
    base_name = None if member.expert is None else member.base.name
    files = side_files(shape, base_name)
    if len(shards) > 1:
        files["model.safetensors.index.json"] = index_file(shards)
    for name, content in files.items():
        (member.folder / name).write_bytes(content)
    for shard in shards:
        _write_shard(member, shard, pool)


def make_family(out: Path, preset: Preset, experts: Sequence[Expert], seed: int) -> list[Path]:
    """Write `out/base` and one folder for each expert; returns the folders, the base first.

    Raises FileExistsError where a folder is there already, OSError where the disk is too small.
    """
    shards = plan_shards(tensors_of(preset.shape), preset.max_shard_bytes)
    folders = [out / "base", *(out / expert.name for expert in experts)]
    for folder in folders:
        if folder.exists():
            raise FileExistsError(f"{folder} is there already: choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    needed = sum(shard.nbytes for shard in shards) * len(folders)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(f"{out}: the family takes {needed:,} bytes, {free:,} are free")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number, folder in enumerate(folders, _BASE_MEMBER):
            expert = None if number == _BASE_MEMBER else experts[number - 1]
            _write_member(_Member(folder, folders[0], number, expert, seed), preset.shape, shards, pool)
    return folders


def parse_layers(text: str) -> frozenset[int]:
    """`0-3,7` -> {0, 1, 2, 3, 7}."""
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers.update(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def parse_size(text: str) -> int:
    """`512MiB`, `5GB` or plain bytes -> bytes."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a seeded family of bf16 checkpoints.")
    parser.add_argument("out", type=Path, help="folder to write base/, expert-0/, ... into")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--experts", type=int, default=3, help="how many experts")
    parser.add_argument("--names", help="names for the experts, with commas, instead of expert-0, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delta-std", type=float, default=DELTA_STD)
    parser.add_argument("--spread", type=float, default=0.0, help="lognormal sigma of delta sizes by tensor")
    parser.add_argument("--touched-layers", type=parse_layers, help="such as 0-3,7; all where not given")
    parser.add_argument("--max-shard-size", type=parse_size, help="such as 512MiB")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="overrides the preset's")
    return parser


def main() -> int:
    args = _parser().parse_args()
    preset = PRESETS[args.preset]
    changed = {f.name: v for f in fields(Shape) if (v := getattr(args, f.name)) is not None}
    max_shard_bytes = args.max_shard_size or preset.max_shard_bytes
    preset = Preset(replace(preset.shape, **changed), max_shard_bytes)
    names = args.names.split(",") if args.names else [f"expert-{i}" for i in range(args.experts)]
    experts = [Expert(name, args.delta_std, args.touched_layers, args.spread) for name in names]
    start = time.perf_counter()
    try:
        folders = make_family(args.out, preset, experts, args.seed)
    except OSError as error:
        print(f"family: {error}", file=sys.stderr)
        return 1
    for folder in folders:
        print(f"{folder}  {sum(f.stat().st_size for f in folder.iterdir()):,} bytes")
    print(f"made in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
