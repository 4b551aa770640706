"""Tiles on torch devices against the kernels: bit for bit on this processor, to the stated tolerance on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mergepipe.merge import execute, gram_kernels, mask_kernels, row_kernels, torch_tiles
from mergepipe.merge.method import Coefficients, Tile, Value
from mergepipe.merge.methods import METHODS
from mergepipe.merge.torch_methods import FORMS, random_bits
from mergepipe.merge.torch_rows import importances, row_grams
from mergepipe.merge.torch_tiles import TORCH_CPU, TorchTiles, open_device
from mergepipe.store import Store
from mergepipe.store.errors import EnvironmentalError, NotFoundError, UsageError
from support.merges import FAMILIES, Floats, make_plan, weights_of
from support.methods import coefficients_of, problem_of, tiles_of

GPU: Final = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
)
DEVICES: Final = [TORCH_CPU, GPU]
UNITS: Final = 2
"""What is promised of a GPU, in units in the last place of the largest summand."""
SHAPES: Final = [(37, 70), (513,), (9, 1100), (6, 1), (3, 5, 16)]


@dataclass(frozen=True)
class Case:
    """What is asked of a method. ``own``: a parameter's values, dealt out to the experts in turn."""

    method: str
    experts: int
    parameters: Mapping[str, Value] = field(default_factory=dict)
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    based: bool = True

    def __str__(self) -> str:
        settings = [f"{name}={value:g}" for name, value in self.parameters.items()]
        own = [f"{name}={'_'.join(f'{value:g}' for value in values)}" for name, values in self.own.items()]
        return "-".join([self.method, str(self.experts), *settings, *own, *([] if self.based else ["alone"])])

    def tiles(
        self, base: Floats, experts: list[Floats], sizes: int | tuple[int, ...]
    ) -> Iterator[tuple[Tile, Coefficients]]:
        """The tensor in tiles, each with the coefficients."""
        method, under = METHODS[self.method], base if self.based else None
        turns = {name: itertools.cycle(values) for name, values in self.own.items()}
        own = [{name: next(values) for name, values in turns.items()} for _ in experts]
        problem = problem_of(method, under, experts, self.parameters, own)
        coefficients = coefficients_of(method, problem, under, experts)
        for tile in tiles_of(method, problem, under, experts, 0, base.size, sizes):
            yield tile, coefficients


WEIGHTS: Final = {"weight": (0.6, 0.4, -0.25, 1.5)}
SIGNLESS: Final = {"weight": (0.6, 0.4, 0.25, 1.5)}
SOME: Final = {"density": (0.3, 1.0, 0.25, 0.7)}
BY_RANK: Final = {"density": (0.3, 1.0, 0.25, 0.7), "epsilon": (0.15, 0.2)}


def _sparse(method: str, counts: tuple[int, ...], own: Mapping[str, tuple[float, ...]]) -> Iterator[Case]:
    for count in counts:
        yield Case(method, count, {"rescale": True, "lambda": 0.7}, {**WEIGHTS, **own})
        yield Case(method, count, {"rescale": False, "normalize": True}, {**SIGNLESS, **own})
        yield Case(method, count, {"rescale": False, "normalize": False, "lambda": -1.3}, {**WEIGHTS, **own})


def _cases() -> Iterator[Case]:
    for count in (1, 2, 8):
        yield Case("linear", count, {}, SIGNLESS)
        yield Case("linear", count, {"normalize": False}, WEIGHTS)
        yield Case("task_arithmetic", count, {"lambda": 0.7}, WEIGHTS)
        yield Case("task_arithmetic", count, {"normalize": True}, SIGNLESS)
        yield Case("ram", count)
        yield Case("ram", count, {"epsilon": 0.01})
        yield Case("ramplus_tl", count, {"r": 0.4, "alpha": 0.9, "epsilon": 1e-3})
        yield from (Case("sce", count, {"select_topk": share}) for share in (0.0, 0.1, 0.6, 1.0))
        yield from (Case("karcher", count, based=False), Case("multislerp", count, {}, SIGNLESS))
        yield Case("multislerp", count, {"normalize_weights": False}, SIGNLESS, based=False)
    yield from (Case("passthrough", 1, {}, {"scale": (scale,)}) for scale in (1.0, -0.3))
    yield from (Case("nearswap", 1, {"t": t}) for t in (-1.0, 0.0, 1e-3, 0.01, 10.0))
    for method in ("dare_linear", "dare_ties"):
        yield from _sparse(method, (1, 3, 8), SOME)
        yield Case(method, 2, {"seed": 2.0**53}, SOME)
    for method in ("della", "della_linear"):
        yield from _sparse(method, (1, 3, 8), BY_RANK)
    for method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        gamma = {} if method == "ties" else {"gamma": (0.1, 0.0, 0.3)}
        yield from _sparse(method, (1, 3, 8), {**SOME, **gamma})
        yield Case(method, 4, {"exact": False}, {**SOME, **gamma})
    yield Case("arcee_fusion", 1)
    yield from (Case("slerp", 1, {"t": t}) for t in (0.0, 0.3, 1.0))
    for based, flat, columns in itertools.product((True, False), repeat=3):
        yield Case("nuslerp", 2, {"nuslerp_flatten": flat, "nuslerp_row_wise": columns}, SIGNLESS, based=based)
    yield from (Case("model_stock", count, {"filter_wise": rows}) for count in (2, 3, 8) for rows in (True, False))


CASES: Final = list(_cases())


def make(count: int, shape: tuple[int, ...], seed: int) -> tuple[Floats, list[Floats]]:
    """A base, and experts of which some deltas are large, some tiny, many equal in magnitude, some zero."""
    generator = np.random.default_rng(seed)
    base = (generator.standard_normal(shape) * 0.05).astype(np.float32)
    experts = []
    for _ in range(count):
        delta = generator.standard_normal(shape) * 10.0 ** -generator.integers(1, 4)
        delta[generator.random(shape) < 0.2] = 0
        equal = generator.random(shape) < 0.2
        delta[equal] = np.sign(delta[equal]) * 2.0**-9
        experts.append((base + delta).astype(np.float32))
    return base, experts


def copy_of(tile: Tile) -> Tile:
    return Tile(tile.base.copy(), tile.experts.copy(), tile.start, tile.row)


def assert_alike(device: str, case: Case, tile: Tile, coefficients: Coefficients) -> None:
    """One tile by the kernels and on the device."""
    method = METHODS[case.method]
    wanted, found = np.empty_like(tile.base), np.full_like(tile.base, 7)
    ours = copy_of(tile)
    method.apply(ours, coefficients, wanted)
    TorchTiles(device, method).apply(method, copy_of(tile), coefficients, found)
    assert_as_promised(device, tile, found, wanted)


def assert_as_promised(device: str, tile: Tile, found: Floats, wanted: Floats) -> None:
    """Summands are as large as the inputs, times weights and factors, which are less than 8 here."""
    if device == TORCH_CPU:
        assert_same_bits(found, wanted)
    else:
        largest = np.maximum(np.abs(tile.base), np.abs(tile.experts).max(axis=0)) * 8
        assert bool((np.abs(found - wanted) <= UNITS * np.spacing(largest)).all())


def assert_same_bits(found: Floats, wanted: Floats) -> None:
    """The same bits, signs of zeros too; a NaN is a NaN."""
    nans = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nans)
    np.testing.assert_array_equal(found[~nans].view(np.uint32), wanted[~nans].view(np.uint32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_like_the_kernels(device: str, case: Case) -> None:
    for number, shape in enumerate(SHAPES):
        base, experts = make(case.experts, shape, number)
        for tile, coefficients in case.tiles(base, experts, (997, 1, 2048)):
            assert_alike(device, case, tile, coefficients)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_not_finite_takes_the_same_way(case: Case) -> None:
    base, experts = make(case.experts, (24, 100), 5)
    generator = np.random.default_rng(6)
    for tile, coefficients in case.tiles(base, experts, 2400):
        for value in (np.inf, -np.inf, np.nan, 3e38, 1e-45, -0.0):
            for array in (tile.base, *tile.experts):
                array[generator.choice(1200, 5)] = value
        tile.experts[:, :4] = np.nan
        assert_alike(TORCH_CPU, case, tile, coefficients)


def test_every_method_that_comes_along_is_tried() -> None:
    assert {case.method for case in CASES} == set(FORMS) == set(METHODS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", [0, 1, 0x9E3779B97F4A7C15, 2**63, 2**64 - 1])
@pytest.mark.parametrize("start", [0, 1, 2**33 + 7])
@pytest.mark.parametrize("count", [1, 2, 501])
def test_random_bits_are_those_of_the_kernels(device: str, key: int, start: int, count: int) -> None:
    pairs = np.zeros(count // 2 + 1, np.uint64)
    mask_kernels.hash_elements(np.uint64(key), start, count, pairs)
    wanted = pairs.view(np.uint32)[start & 1 :][:count] >> 1
    found = random_bits(key, start, count, open_device(device)).cpu().numpy()
    np.testing.assert_array_equal(found.astype(np.uint32), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 15, 16, 700])
def test_importances_are_those_of_the_kernels(device: str, width: int) -> None:
    expert, base = np.random.default_rng(width).standard_normal((2, 6 * width)).astype(np.float32) * 3
    wanted = np.empty_like(base)
    row_kernels.importances(expert, base, width, wanted)
    there = open_device(device)
    found = importances(torch.from_numpy(expert).to(there), torch.from_numpy(base).to(there), width).cpu().numpy()
    np.testing.assert_array_max_ulp(found, wanted, 0 if device == TORCH_CPU else UNITS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 512, 700, 2048])
def test_inner_products_of_rows_are_those_of_the_kernels(device: str, width: int) -> None:
    vectors = np.random.default_rng(width).standard_normal((3, 5 * width)).astype(np.float32)
    wanted = np.zeros((3, 3, 5))
    gram_kernels.row_grams(vectors, width, wanted)
    found = row_grams(torch.from_numpy(vectors).to(open_device(device)), width).cpu().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0 if device == TORCH_CPU else 1e-14)


@pytest.mark.parametrize("device", DEVICES)
def test_many_threads_get_their_own_results(device: str) -> None:
    case = Case("dare_ties", 3, {}, {**WEIGHTS, **SOME})
    method = METHODS[case.method]
    base, experts = make(3, (64, 512), 9)
    tiles = TorchTiles(device, method)

    def work(piece: tuple[Tile, Coefficients]) -> Floats:
        out = np.empty_like(piece[0].base)
        tiles.apply(method, *piece, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        found = np.concatenate(list(pool.map(work, case.tiles(base, experts, (300, 1000)))))
    whole, coefficients = next(case.tiles(base, experts, base.size))
    wanted = np.empty_like(whole.base)
    method.apply(copy_of(whole), coefficients, wanted)
    assert_as_promised(device, whole, found, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", FAMILIES)
def test_a_merge_on_a_device(shared_family: Store, device: str, method: str) -> None:
    plan = make_plan(shared_family, method, {"math": 0.6, "code": 0.4})
    here = execute(shared_family, plan, f"here/{method}", use_cache=False)
    there = execute(shared_family, plan, f"there/{device}/{method}", device=device)
    assert (there.computed_blocks, there.cached_blocks) == (here.computed_blocks, 0)
    assert there.expert_bytes_read == here.expert_bytes_read
    wanted, found = weights_of(shared_family, here.ref), weights_of(shared_family, there.ref)
    for name, array in wanted.items():
        if device == TORCH_CPU:
            assert found[name].tobytes() == array.tobytes(), name
        else:
            assert_close(found[name], array)


def assert_close(found: NDArray[np.generic], wanted: NDArray[np.generic]) -> None:
    """Stored in 16 bits, where an ulp of float32 may turn a rounding."""
    np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), rtol=2.0**-7, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu_says_what_to_do(shared_family: Store, device: str) -> None:
    plan = make_plan(shared_family, "linear", {"math": 0.6, "code": 0.4})
    with pytest.raises(UsageError, match=f"torch cannot work on '{device}' here") as caught:
        execute(shared_family, plan, "nowhere", device=device)
    assert caught.value.hint is not None
    assert "--device cpu" in caught.value.hint
    assert f"torch.version.cuda is {torch.version.cuda}" in caught.value.hint
    with pytest.raises(NotFoundError):
        shared_family.resolve("nowhere")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "torch-cuda", "0", "cpu:torch"])
def test_an_unknown_device(device: str) -> None:
    with pytest.raises(UsageError, match="is no device that torch knows") as caught:
        TorchTiles(device, METHODS["linear"])
    assert TORCH_CPU in str(caught.value.hint)


def test_a_device_without_memory_of_its_own() -> None:
    with pytest.raises(UsageError, match="torch cannot work on 'meta' here"):
        TorchTiles("meta", METHODS["linear"])


def test_a_plug_in_has_no_torch_form() -> None:
    for stranger in (replace(METHODS["linear"], name="stranger"), replace(METHODS["ties"], version=99)):
        with pytest.raises(UsageError, match=f"{stranger.name} has no torch form") as caught:
            TorchTiles(TORCH_CPU, stranger)
        assert caught.value.hint is not None
        assert all(name in caught.value.hint for name in FORMS)


def test_too_little_memory_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that leaves the way to the device free for the next."""

    def runs_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_tiles, "open_device", lambda _: torch.device("xpu"))
    monkeypatch.setattr(torch_tiles._Lane, "run", runs_out)
    tiles = TorchTiles("xpu", METHODS["linear"])
    tile = Tile(np.zeros(4, np.float32), np.zeros((2, 4), np.float32), 0, 4)
    for _ in range(20):
        with pytest.raises(EnvironmentalError, match="xpu has too little memory for a tile of 48 bytes"):
            tiles.apply(METHODS["linear"], tile, {}, tile.base)


def test_a_tile_that_is_copied_there_and_back() -> None:
    """The way to devices that are neither the processor nor CUDA's."""
    case = Case("ties", 3, {}, {**SIGNLESS, **SOME})
    method = METHODS[case.method]
    tile, coefficients = next(case.tiles(*make(3, (40, 50), 1), 1001))
    found, wanted = np.empty_like(tile.base), np.empty_like(tile.base)
    lane = torch_tiles._Lane(torch.device("cpu"))
    lane.run(FORMS[case.method], copy_of(tile), coefficients, found)
    method.apply(tile, coefficients, wanted)
    assert_same_bits(found, wanted)
