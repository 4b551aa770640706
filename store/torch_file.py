"""PyTorch checkpoints (``.bin``, ``.pt``), weights only: no pickle in them ever runs code."""

from __future__ import annotations

import math
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mergepipe.store.dtypes import FROM_TORCH, DType
from mergepipe.store.errors import BadInputError

if TYPE_CHECKING:
    import torch

    from mergepipe.store.codecs import Bytes

_REPEATED_BYTES: Final = 64 << 20  # what a tensor may take beyond its file's size: views can repeat elements
_LOOKED_AT_BYTES: Final = 256
_NAMES_BYTES: Final = 64 << 20  # of all names together, with so much for each of them
_NAME_BYTES: Final = 64


@dataclass
class TorchTensor:
    """A tensor that torch has mapped from a file."""

    dtype: DType
    shape: tuple[int, ...]
    file: Path
    tensor: torch.Tensor

    def read_into(self, start: int, out: Bytes) -> None:
        import torch

        if not out.nbytes:
            return
        tensor = self.tensor.detach().reshape(1) if not self.shape else self.tensor.detach()
        row_bytes = math.prod(self.shape[1:]) * self.dtype.bits // 8
        first, last = start // row_bytes, -(-(start + out.nbytes) // row_bytes)
        # Only these rows are laid out anew where the tensor is a view of others' elements; else nothing is.
        rows = tensor[first:last].resolve_conj().resolve_neg().contiguous()
        # Not reshape(-1): a single element keeps a stride other than 1 through that, and cannot be viewed as bytes.
        data = rows.as_strided((rows.numel(),), (1,)).view(torch.uint8).numpy()
        begin = start - first * row_bytes
        out[:] = data[begin : begin + out.nbytes]

    def prefetch(self, start: int, size: int) -> None:
        """Nothing: the mapping is read as it is touched."""


def read_torch_file(path: Path) -> tuple[dict[str, TorchTensor], list[str]]:
    """The tensors of a file by dotted name, and notes on what was left out.

    Raises:
        BadInputError: not a PyTorch file, or one that would run code, or a tensor that has no safetensors type.
    """
    value = _load(path)
    found = _Collected(path)
    try:
        found.collect(value, "")
    except RecursionError as error:
        raise BadInputError(f"{path}: nested too deeply, or inside of itself") from error
    except ValueError as error:  # a whole number of thousands of digits as a key
        raise BadInputError(f"{path}: a key in it is no name ({error})") from error
    if not found.tensors:
        raise BadInputError(f"{path}: there is no tensor in it", hint="Give the file that holds the weights.")
    skipped = ", ".join(found.skipped[:5])
    notes = [f"{path.name}: left out {skipped}, which are no tensors"] if skipped else []
    return found.tensors, notes


def _load(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of the pickle is no news to the user
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
            return _load_unmapped(path)
    except pickle.UnpicklingError as error:
        raise BadInputError(
            f"{path}: the file would run code when it is loaded, or is damaged; nothing of it was run",
            hint="Ask its author for safetensors, or convert it where you trust it.",
        ) from error
    except Exception as error:  # torch raises many kinds for a bad file; none of them may reach the user raw
        raise BadInputError(f"{path}: not a PyTorch file ({_first_line(error)})") from error


def _load_unmapped(path: Path) -> Any:
    """A file of before PyTorch 1.6. Where it names a storage that it does not have, torch gives it memory as it lies.

    So storages are filled first, and looked at afterwards: with another byte once more, for content can be like that.
    """
    import torch

    for byte in (0xA5, 0x5A):
        storages: list[Any] = []

        def fill(storage: Any, _place: str, byte: int = byte, made: list[Any] = storages) -> Any:
            made.append(storage)
            return storage.fill_(byte)

        value = torch.load(path, map_location=fill, weights_only=True)
        if not any(_is_all(storage, byte) for storage in storages):
            return value
    raise ValueError("it lacks the content of a tensor")


def _is_all(storage: Any, byte: int) -> bool:
    """Whether the first bytes of a storage are all the same; what is read from a file is read whole."""
    first = bytes(storage[:_LOOKED_AT_BYTES])
    return bool(first) and first == bytes([byte]) * len(first)


class _Collected:
    """The tensors of what was loaded, by dotted name. A pickle can hold one list twice, and that one another twice."""

    def __init__(self, path: Path) -> None:
        self.tensors: dict[str, TorchTensor] = {}
        self.skipped: list[str] = []
        self._path = path
        self._left = _NAMES_BYTES

    def collect(self, value: Any, prefix: str) -> None:
        import torch

        self._left -= len(prefix) + _NAME_BYTES
        if self._left < 0:
            raise BadInputError(f"{self._path}: more values, or longer names, than any model has")
        if isinstance(value, torch.Tensor):
            if prefix in self.tensors:
                raise BadInputError(
                    f"{self._path}: two of its tensors would both be called {prefix!r}", hint="Rename one."
                )
            self.tensors[prefix] = _source(self._path, prefix, value)
        elif isinstance(value, dict):
            for key, item in value.items():
                self.collect(item, f"{prefix}.{key}" if prefix else str(key))
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                self.collect(item, f"{prefix}.{number}" if prefix else str(number))
        else:
            self.skipped.append(prefix or type(value).__name__)


def _source(path: Path, name: str, tensor: torch.Tensor) -> TorchTensor:
    import torch

    if tensor.device.type != "cpu":
        raise BadInputError(f"{path}: tensor {name!r} has no data in it (it was saved on the {tensor.device} device)")
    dtype = FROM_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout is not torch.strided or tensor.is_quantized:
        raise BadInputError(
            f"{path}: tensor {name!r} is {tensor.dtype} ({tensor.layout}), which safetensors does not have"
        )
    if tensor.nbytes > path.stat().st_size + _REPEATED_BYTES:
        raise BadInputError(
            f"{path}: tensor {name!r} repeats its elements to {tensor.nbytes} bytes, far more than the file has"
        )
    return TorchTensor(dtype, tuple(tensor.shape), path, tensor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
