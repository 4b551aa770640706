"""PyTorch files: what they hold is read bit for bit, and no code in them ever runs."""

from __future__ import annotations

import collections
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergepipe.store.checkpoint import Checkpoint, open_checkpoint
from mergepipe.store.dtypes import FROM_TORCH
from mergepipe.store.errors import BadInputError

# What files from before PyTorch 1.6 can have: torch itself cannot read its later types back from them.
LEGACY = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64"]
NUMBERS = torch.arange(24, dtype=torch.float32)


def save(folder: Path, value: Any, *, old: bool = False) -> Path:
    path = folder / "weights.pt"
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    return path


def content(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, source in checkpoint.tensors.items():
        out = np.empty(source.dtype.nbytes(int(np.prod(source.shape))), np.uint8)
        half = out.nbytes // 2
        source.read_into(0, out[:half])
        source.read_into(half, out[half:])
        found[name] = (source.dtype.name, source.shape, out.tobytes())
    return found


def expected(tensor: torch.Tensor, dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    return dtype, tuple(tensor.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("name", "old"), [*((n, False) for n in sorted(FROM_TORCH)), *((n, True) for n in LEGACY)])
def test_every_type(tmp_path: Path, name: str, old: bool) -> None:
    kind = getattr(torch, name)
    bits = torch.randint(0, 2 if name == "bool" else 256, (6 * kind.itemsize,), dtype=torch.uint8)
    with open_checkpoint(save(tmp_path, {"w": bits.view(kind).reshape(2, 3)}, old=old)) as checkpoint:
        assert content(checkpoint) == {"w": (FROM_TORCH[name].name, (2, 3), bits.numpy().tobytes())}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
class TestWhatIsThere:
    @pytest.mark.parametrize(
        "tensor",
        [
            NUMBERS.reshape(4, 6).t(),
            NUMBERS[5:9],
            NUMBERS[::5],
            NUMBERS.reshape(2, 3, 4).permute(2, 0, 1),
            NUMBERS[3],
            NUMBERS[::7][:1],  # one element with a stride of seven
            NUMBERS[:0],
            torch.empty(0, 5),
            NUMBERS[:3].expand(4, 3),
            torch.nn.Parameter(NUMBERS[:4]),
            torch.tensor([1 + 2j, 3 - 4j]).conj(),
            torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        ],
        ids=["transposed", "slice", "strided", "permuted", "0-d", "lone", "empty", "empty2d", "expanded", "parameter",
             "conjugate", "negative"],
    )  # fmt: skip
    def test_every_view(self, tmp_path: Path, tensor: torch.Tensor, old: bool) -> None:
        dtype = "C64" if tensor.is_complex() else "F32"
        with open_checkpoint(save(tmp_path, {"w": tensor}, old=old)) as checkpoint:
            assert content(checkpoint) == {"w": expected(tensor, dtype)}

    def test_tied_weights_are_two_names(self, tmp_path: Path, old: bool) -> None:
        shared = NUMBERS.reshape(4, 6)
        with open_checkpoint(save(tmp_path, {"embed": shared, "head": shared, "row": shared[1]}, old=old)) as found:
            assert content(found) == {
                "embed": expected(shared, "F32"),
                "head": expected(shared, "F32"),
                "row": expected(shared[1], "F32"),
            }

    def test_nested_state_gets_dotted_names_and_the_rest_is_noted(self, tmp_path: Path, old: bool) -> None:
        state = collections.OrderedDict(model={"a": NUMBERS[:1], 3: [NUMBERS[1:3], "text"]}, step=7)
        with open_checkpoint(save(tmp_path, state, old=old)) as checkpoint:
            assert set(checkpoint.tensors) == {"model.a", "model.3.0"}
            (note,) = checkpoint.notes
        assert "model.3.1" in note
        assert "step" in note

    def test_a_lone_tensor_has_an_empty_name(self, tmp_path: Path, old: bool) -> None:
        with open_checkpoint(save(tmp_path, NUMBERS, old=old)) as checkpoint:
            assert content(checkpoint) == {"": expected(NUMBERS, "F32")}


def test_a_large_view_is_laid_out_in_pieces(tmp_path: Path) -> None:
    """Not whole, and not again for each block."""
    matrix = torch.arange(1 << 20, dtype=torch.int32).reshape(1 << 10, 1 << 10)
    with open_checkpoint(save(tmp_path, {"w": matrix.t()})) as checkpoint:
        source = checkpoint.tensors["w"]
        out = np.empty(1 << 14, np.uint8)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            source.read_into(3 << 14, out)
        assert out.tobytes() == matrix.t()[12:16].contiguous().view(torch.uint8).numpy().tobytes()
        assert sum(max(event.cpu_memory_usage, 0) for event in profile.events()) < matrix.nbytes / 8


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.write_text, (self.marker, "ran")


class TestHostileFiles:
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "suffix"])
    def test_code_does_not_run(self, tmp_path: Path, form: str) -> None:
        marker = tmp_path / "marker"
        value = {"w": NUMBERS, "x": RunsCode(marker)}
        path = tmp_path / ("model.bin" if form == "suffix" else "model.pt")
        if form == "pickle":
            path.write_bytes(pickle.dumps(RunsCode(marker)))
        else:
            torch.save(value, path, _use_new_zipfile_serialization=form != "legacy")
        with pytest.raises(BadInputError, match="would run code") as caught:
            open_checkpoint(path)
        assert str(path) in caught.value.message
        assert "safetensors" in (caught.value.hint or "")
        assert not marker.exists()
        torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
        assert marker.exists(), "the file was harmless, and the test proves nothing"

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ({"a": {"b": NUMBERS}, "a.b": NUMBERS}, "two of its tensors would both be called 'a.b'"),
            ({1: NUMBERS, "1": NUMBERS}, "two of its tensors would both be called '1'"),
            ({"w": NUMBERS[:1].expand(1 << 40)}, "'w' repeats its elements"),
            ({"w": torch.empty(3, device="meta")}, "'w' has no data"),
            ({"w": torch.eye(2).to_sparse()}, "'w' is torch.float32 (torch.sparse_coo)"),
            ({"w": torch.zeros(2, dtype=torch.complex128)}, "'w' is torch.complex128"),
            ({"w\ud800": NUMBERS}, "is not UTF-8"),
            ({"step": 3}, "there is no tensor in it"),
            ([], "there is no tensor in it"),
        ],
    )
    def test_what_cannot_be_kept_is_named(self, tmp_path: Path, value: Any, said: str) -> None:
        path = save(tmp_path, value)
        with pytest.raises(BadInputError) as caught:
            open_checkpoint(path)
        assert str(path) in caught.value.message
        assert said in caught.value.message

    def test_a_dictionary_inside_of_itself(self, tmp_path: Path) -> None:
        value: dict[str, Any] = {"w": NUMBERS}
        value["self"] = value
        with pytest.raises(BadInputError, match="inside of itself"):
            open_checkpoint(save(tmp_path, value))

    @pytest.mark.parametrize("data", [b"", b"\x80", b"PK\x03\x04", b"not a pickle at all", bytes(1000)])
    def test_other_files(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "model.bin"
        path.write_bytes(data)
        with pytest.raises(BadInputError, match=r"model\.bin"):
            open_checkpoint(path)

    def test_another_zip(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
            archive.writestr("hello.txt", "hello")
        with pytest.raises(BadInputError, match=r"model\.pt"):
            open_checkpoint(tmp_path / "model.pt")

    @pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
    def test_damaged_files_fail_cleanly_or_not_at_all(self, tmp_path: Path, old: bool, deep: bool) -> None:
        good = save(tmp_path, {"a.w": NUMBERS.reshape(4, 6), "b": {"c": NUMBERS[:2].bfloat16()}}, old=old).read_bytes()
        source = random.Random(17)
        refused = 0
        for _ in range(3000 if deep else 60):
            data = bytearray(good)
            place = source.randrange(len(data))
            match source.randrange(3):
                case 0:
                    data[place] ^= 1 << source.randrange(8)
                case 1:
                    del data[place:]
                case 2:
                    data[place:place] = source.randbytes(5)
            path = tmp_path / "damaged.pt"
            path.write_bytes(data)
            try:
                with open_checkpoint(path) as checkpoint:
                    content(checkpoint)
            except BadInputError as error:
                assert "damaged.pt" in error.message
                refused += 1
        assert refused
