"""A checkpoint on disk, opened for ingest: which tensors it has, where their bytes are, and what else lies there.

Everything is looked at and checked before the first weight is read: names, headers, shards against their index,
links. What is wrong is a :class:`BadInputError` that names the file and the tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Protocol

from mergepipe.store.canonical import as_text, brief, load_strict
from mergepipe.store.dtypes import DType
from mergepipe.store.errors import BadInputError, NotFoundError
from mergepipe.store.folder import check_utf8, walk_folder
from mergepipe.store.safetensors_file import SafetensorsHeader, read_header

if TYPE_CHECKING:
    from mergepipe.store.codecs import Bytes

INDEX: Final = "model.safetensors.index.json"
TORCH_INDEX: Final = "pytorch_model.bin.index.json"
TORCH_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)\Z")
_NO_TENSOR_FILES: Final = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"})


class TensorSource(Protocol):
    """Where one tensor's bytes come from."""

    @property
    def dtype(self) -> DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def file(self) -> Path: ...

    def read_into(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the tensor's bytes from ``start`` on; raises BadInputError where they are not there."""

    def prefetch(self, start: int, size: int) -> None:
        """Tell the system that these bytes will be wanted soon."""


class OpenFile:
    """A file that is open for as long as its checkpoint is; reads by position, so threads can share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BadInputError(f"{path}: cannot be opened: {error.strerror}") from error
        self.stamp = self._now()

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read_into(self, position: int, out: Bytes) -> None:
        """Fill ``out`` from ``position``; raises BadInputError where the file ends before."""
        view = out.data
        done = 0
        while done < view.nbytes:
            try:
                count = os.preadv(self._descriptor, [view[done:]], position + done)
            except OSError as error:
                raise BadInputError(f"{self.path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise BadInputError(f"{self.path}: the file ended while it was being read")
            done += count

    def prefetch(self, position: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, position, size, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raises BadInputError where the file was written to since it was opened."""
        if self._now() != self.stamp:
            raise _changed(self.path)

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor that lies in a safetensors file at ``begin``."""

    dtype: DType
    shape: tuple[int, ...]
    source: OpenFile
    begin: int

    @property
    def file(self) -> Path:
        return self.source.path

    def read_into(self, start: int, out: Bytes) -> None:
        self.source.read_into(self.begin + start, out)

    def prefetch(self, start: int, size: int) -> None:
        self.source.prefetch(self.begin + start, size)


@dataclass(frozen=True, slots=True)
class SourceShard:
    """One safetensors file of the checkpoint."""

    path: str
    header: SafetensorsHeader


@dataclass
class Checkpoint:
    """An opened checkpoint. Use as a context manager, or close it."""

    path: Path
    tensors: dict[str, TensorSource] = field(default_factory=dict)
    shards: list[SourceShard] = field(default_factory=list)
    files: dict[str, OpenFile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _open: list[OpenFile] = field(default_factory=list)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter rather than a whole model."""
        return "adapter_config.json" in self.files

    def open_file(self, path: Path) -> OpenFile:
        file = OpenFile(path)
        self._open.append(file)
        return file

    def check_unchanged(self) -> None:
        for file in self._open:
            file.check_unchanged()

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def read_json(self, name: str) -> dict[str, Any]:
        """A small JSON file of the checkpoint as a dict; empty where it is missing or something else."""
        file = self.files.get(name)
        if file is None or file.stamp[0] > 10 << 20:
            return {}
        try:
            value = load_strict(file.path.read_bytes(), str(file.path))
        except (BadInputError, OSError):
            return {}
        return value if isinstance(value, dict) else {}

    def base_hint(self) -> str:
        """The base that the checkpoint's own configuration names, or ''."""
        adapter = self.read_json("adapter_config.json").get("base_model_name_or_path")
        config = self.read_json("config.json")
        for value in (adapter, config.get("base_model"), config.get("_name_or_path")):
            if isinstance(value, str) and value:
                return value
        return ""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open what a user calls a model: a Hugging Face or PEFT directory, a ``.safetensors`` file, a PyTorch file.

    Raises:
        NotFoundError: nothing lies there.
        BadInputError: it is no checkpoint, or it cannot be trusted.
    """
    if not path.exists():
        raise NotFoundError(f"there is no file or folder {path}", hint=_neighbours(path))
    if not path.is_dir() and not path.is_file():
        raise BadInputError(f"{path} is neither a file nor a folder")
    checkpoint = Checkpoint(path)
    try:
        if path.is_dir():
            _open_directory(checkpoint)
        elif path.suffix == ".safetensors":
            check_utf8(path.name, path)
            _add_safetensors(checkpoint, path, path.name)
        elif path.suffix in TORCH_SUFFIXES:
            _add_torch(checkpoint, path)
        else:
            raise BadInputError(
                f"{path} is neither a model's folder nor a .safetensors, .bin or .pt file",
                hint="Give the folder that holds config.json and the weights.",
            )
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _open_directory(checkpoint: Checkpoint) -> None:
    try:
        found = walk_folder(checkpoint.path)
    except RuntimeError as error:  # what Python 3.11 and 3.12 say of a link that leads to itself
        raise BadInputError(f"{checkpoint.path}: {error}", hint="Remove the link.") from error
    weights = _weight_files(checkpoint, found)
    for name in weights:
        if name.endswith(".safetensors"):
            _add_safetensors(checkpoint, found[name], name)
        else:
            _add_torch(checkpoint, found[name])
    if not checkpoint.tensors:
        raise BadInputError(
            f"{checkpoint.path} has no weights: no .safetensors, .bin or .pt file with tensors",
            hint="Give the folder that holds the weights, or one weights file.",
        )
    if TORCH_INDEX in found and weights and not weights[0].endswith(".safetensors"):
        _check_torch_index(checkpoint, found[TORCH_INDEX])
    for name, path in found.items():
        if name not in weights:
            checkpoint.files[name] = checkpoint.open_file(path)


def _check_torch_index(checkpoint: Checkpoint, index: Path) -> None:
    """Raises BadInputError where a tensor that the index lists is in none of the files, or in another one."""
    for tensor, name in load_strict(index.read_bytes(), str(index))["weight_map"].items():
        source = checkpoint.tensors.get(tensor)
        if source is None or source.file.name != name:
            raise BadInputError(
                f"{index}: the index disagrees with shard {name} about tensor {brief(repr(tensor))}, "
                "which the shard has not",
                hint="The files are of different versions. Download them again.",
            )


def _weight_files(checkpoint: Checkpoint, found: Mapping[str, Path]) -> list[str]:
    """Which files hold the model's tensors; the others come along as they are."""
    if INDEX in found:
        return _indexed(found, INDEX)
    for single in ("model.safetensors", "adapter_model.safetensors"):
        if single in found:
            return [single]
    top = [name for name in found if "/" not in name]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    if safetensors:
        _check_complete(checkpoint, safetensors)
        return safetensors
    if TORCH_INDEX in found:
        return _indexed(found, TORCH_INDEX)
    torch_files = [n for n in top if n.endswith(TORCH_SUFFIXES) and n not in _NO_TENSOR_FILES]
    for single in ("pytorch_model.bin", "adapter_model.bin"):
        if single in torch_files:
            return [single]
    _check_complete(checkpoint, torch_files)
    return torch_files


def _check_complete(checkpoint: Checkpoint, names: list[str]) -> None:
    """Raises BadInputError where the names count to N and one of the N is not there."""
    for name in names:
        match = _SHARD.match(name)
        if match:
            stem, _, total, suffix = match.groups()
            for number in range(1, min(int(total), 10_000) + 1):
                wanted = f"{stem}-{number:05d}-of-{total}.{suffix}"
                if wanted not in names:
                    raise BadInputError(
                        f"{checkpoint.path}: shard {wanted} is missing", hint="Download it again, whole."
                    )


def _indexed(found: Mapping[str, Path], index: str) -> list[str]:
    """The shards that an index names, checked against what they hold."""
    where = str(found[index])
    value = load_strict(found[index].read_bytes(), where)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{where}: has no weight_map")
    names: list[str] = []
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_safe_path(name):
            raise BadInputError(
                f"{where}: tensor {brief(repr(tensor))} is said to lie in {brief(repr(name))}, outside of the folder"
            )
        if name not in found:
            raise BadInputError(
                f"{where}: shard {brief(name)} is missing (tensor {brief(repr(tensor))} should be in it)",
                hint="Download it again, whole.",
            )
        if name not in names:
            names.append(name)
    if index == INDEX:
        _check_index(where, weight_map, {name: read_header(found[name]) for name in names})
    return names


def _check_index(where: str, weight_map: Mapping[str, str], headers: Mapping[str, SafetensorsHeader]) -> None:
    for name, header in headers.items():
        held = {entry.name for entry in header.entries}
        listed = {tensor for tensor, shard in weight_map.items() if shard == name}
        for tensor in sorted(listed ^ held):
            problem = "has not" if tensor in listed else "has, and the index says otherwise"
            raise BadInputError(
                f"{where}: the index disagrees with shard {name} about tensor {brief(repr(tensor))}, "
                f"which the shard {problem}",
                hint="The files are of different versions. Download them again.",
            )


def is_safe_path(name: str) -> bool:
    """Whether a relative path stays below the folder that it is joined to, on any system."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and "\0" not in name
        and ":" not in path.parts[0]
        and str(path) == name
    )


def _add_safetensors(checkpoint: Checkpoint, path: Path, name: str) -> None:
    import numpy as np

    header = read_header(path)
    file = checkpoint.open_file(path)
    head = np.empty(len(header.raw), np.uint8)
    file.read_into(0, head)
    if head.tobytes() != header.raw:
        raise _changed(path)
    for entry in header.entries:
        _add_tensor(checkpoint, entry.name, FileTensor(entry.dtype, entry.shape, file, len(header.raw) + entry.begin))
    checkpoint.shards.append(SourceShard(name, header))


def _add_torch(checkpoint: Checkpoint, path: Path) -> None:
    from mergepipe.store.torch_file import read_torch_file

    checkpoint.open_file(path)  # watches the file for changes; torch has its own descriptor
    tensors, notes = read_torch_file(path)
    checkpoint.notes += notes
    for name, source in tensors.items():
        _add_tensor(checkpoint, name, source)


def _changed(path: Path) -> BadInputError:
    return BadInputError(
        f"{path}: the file changed while it was being read", hint="Ingest it again when it is at rest."
    )


def _add_tensor(checkpoint: Checkpoint, name: str, source: TensorSource) -> None:
    if as_text(name) != name:
        raise BadInputError(f"{source.file}: the tensor name {brief(repr(name))} is not UTF-8", hint="Rename it.")
    earlier = checkpoint.tensors.get(name)
    if earlier is not None:
        raise BadInputError(
            f"tensor {brief(repr(name))} is in {earlier.file} and in {source.file}",
            hint="Two sets of weights lie in one folder. Ingest one of the files by itself.",
        )
    checkpoint.tensors[name] = source


def _neighbours(path: Path) -> str:
    from mergepipe.store.errors import nearest

    try:
        return nearest(path.name, [entry.name for entry in path.absolute().parent.iterdir()])
    except OSError:
        return ""
