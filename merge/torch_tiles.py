"""Tiles on a torch device: a GPU where one is present, or torch's own operations on this processor (``torch-cpu``).

Statistics and coefficients are computed where they always are; a device gets a tile and returns its result.

The tolerance: with ``torch-cpu`` results are bit for bit the kernels' (which NaN a NaN is, aside). Every step is one
IEEE 754 operation, in the kernels' order, so a GPU gives the same wherever its float32 and float64 are that too; what
is promised of it is 2 units in the last place of the largest summand, but for elements that lie exactly at a cut that
is computed anew (``sce``, ``arcee_fusion``), which may fall to its other side. Random masks are the same everywhere.

A few threads at a time use the device, each with a stream and page-locked memory of a tile's size, so that one tile's
copies run beside another's arithmetic. That bounds the device's memory: a tile, which is a block at most, takes its
float32 inputs there, and up to some 64 bytes more for each of its elements.
"""

from __future__ import annotations

from queue import SimpleQueue
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from mergepipe.merge.method import Coefficients, Method, Tile
from mergepipe.merge.torch_methods import Form, TorchTile, form_of
from mergepipe.store.errors import EnvironmentalError, UsageError

TORCH_CPU: Final = "torch-cpu"
"""The name of this processor where torch is to do the work; ``cpu`` is the kernels'."""
BLOCK_TILE_BYTES: Final = 512 << 20
"""A tile's float32 inputs and result: a whole block, unless blocks are the largest and experts many."""
_LANES: Final = 4  # one tile comes, one is merged, one goes, and one waits


class TorchTiles:
    """Merges tiles on a device, from any thread.

    Raises:
        UsageError: torch has no such device here, or the method has no torch form.
    """

    def __init__(self, device: str, method: Method) -> None:
        form_of(method)
        self.device = open_device(device)
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        if self.device.type != "cpu":
            for _ in range(_LANES):
                self._lanes.put(_CudaLane(self.device) if self.device.type == "cuda" else _Lane(self.device))

    def apply(self, method: Method, tile: Tile, coefficients: Coefficients, out: NDArray[np.float32]) -> None:
        """``method.apply`` on the device; raises EnvironmentalError where its memory is too small."""
        form = form_of(method)
        if self.device.type == "cpu":
            here = TorchTile(torch.from_numpy(tile.base), torch.from_numpy(tile.experts), tile.start, tile.row)
            torch.from_numpy(out).copy_(form(here, coefficients))
            return
        lane = self._lanes.get()
        try:
            lane.run(form, tile, coefficients, out)
        except torch.OutOfMemoryError as error:
            raise EnvironmentalError(
                f"{self.device} has too little memory for a tile of {tile.base.nbytes + tile.experts.nbytes} bytes",
                hint="Free some of it, choose another device, or use --device cpu.",
            ) from error
        finally:
            self._lanes.put(lane)


class _Lane:
    """A way to a device and back, for one thread at a time, by copies that wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, form: Form, tile: Tile, coefficients: Coefficients, out: NDArray[np.float32]) -> None:
        base, experts = (torch.from_numpy(array).to(self.device) for array in (tile.base, tile.experts))
        result = form(TorchTile(base, experts, tile.start, tile.row), coefficients)
        torch.from_numpy(out).copy_(result)


class _CudaLane(_Lane):
    """With a stream and page-locked memory of its own: the thread waits once, for the result."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.locked = torch.empty(0)

    def run(self, form: Form, tile: Tile, coefficients: Coefficients, out: NDArray[np.float32]) -> None:
        count, size = tile.experts.shape
        locked = self._locked((count + 1) * size).view(count + 1, size)
        locked[0].copy_(torch.from_numpy(tile.base))
        locked[1:].copy_(torch.from_numpy(tile.experts))
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            there = locked.to(self.device, non_blocking=True)
            result = form(TorchTile(there[0], there[1:], tile.start, tile.row), coefficients)
            locked[0].copy_(result, non_blocking=True)
            self.stream.synchronize()
        torch.from_numpy(out).copy_(locked[0])

    def _locked(self, elements: int) -> torch.Tensor:
        if self.locked.numel() < elements:
            self.locked = torch.empty(elements, dtype=torch.float32, pin_memory=True)
        return self.locked[:elements]


def open_device(name: str) -> torch.device:
    """A device that was seen to work, with float64; raises UsageError where torch has none of this name here."""
    try:
        device = torch.device("cpu" if name == TORCH_CPU else name)
    except (RuntimeError, ValueError) as error:
        known = f"Known are cpu, {TORCH_CPU}, and torch's: cuda, cuda:1, xpu."
        raise UsageError(f"{name!r} is no device that torch knows", hint=known) from error
    try:
        probe = torch.ones(1, dtype=torch.float64, device=device)
        probe.cpu()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"torch cannot work on {name!r} here: {reason}", hint=_instead(device)) from error
    return probe.device


def _instead(device: torch.device) -> str:
    if device.type != "cuda":
        return "Use --device cpu."
    found = torch.cuda.device_count()
    gpus = "no GPU is found" if not found else f"{found} GPU{'s are' if found > 1 else ' is'} found"
    return f"Use --device cpu. torch.version.cuda is {torch.version.cuda}, and {gpus}."
