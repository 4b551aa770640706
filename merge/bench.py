"""What places are worked on with, made for one run."""

from __future__ import annotations

from collections.abc import Mapping

from mergepipe.merge.inputs import Virtual
from mergepipe.merge.method import Method
from mergepipe.merge.tiles import Bench
from mergepipe.store.digest import Digest
from mergepipe.store.objects import ObjectReader
from mergepipe.store.store import Store


def open_bench(
    store: Store,
    reader: ObjectReader,
    virtual: Mapping[Digest, Virtual],
    method: Method | None = None,
    device: str = "cpu",
) -> Bench:
    """A bench; the reader of adapters comes only where there are some, and torch only for another device.

    Raises:
        UsageError: torch has no such device here, or the method has no form for it.
    """
    adapters = None
    if any(made_of.low is not None for made_of in virtual.values()):
        from mergepipe.merge.adapters import AdapterReader

        adapters = AdapterReader(reader)
    bench = Bench(store.catalog, reader, dict(virtual), adapters)
    if device != "cpu" and method is not None:
        from mergepipe.merge.torch_tiles import BLOCK_TILE_BYTES, TorchTiles

        bench.apply = TorchTiles(device, method).apply
        bench.tile_bytes = BLOCK_TILE_BYTES
    return bench
