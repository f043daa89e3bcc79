"""Checkpoint: where the tensors of a model directory's safetensors stand, and single rows of them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.model_config import ModelError

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor stands."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it


def find_tensors(model_dir: Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors by name, and the bytes of their files: those of the index, or else model.safetensors."""
    names = ["model.safetensors"]
    index = model_dir / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{INDEX} is not a weight index") from None
    stored: dict[str, StoredTensor] = {}
    for file_name in names:
        path = model_dir / file_name
        if Path(file_name).name != file_name or not path.is_file():
            raise ModelError(f"the model directory has no file {file_name}")
        for name, tensor in _tensors_of(path).items():
            if name in stored:
                raise ModelError(f"{name} stands in two files, {file_name} is one")
            stored[name] = tensor
    return stored, sum((model_dir / name).stat().st_size for name in names)


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, whose header safetensors has found sound: its offsets lie in the file and fit."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{path.name} is not a valid safetensors file: {error}") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


class Checkpoint:
    """A model's tensors by name, read a few rows at a time: nothing is mapped, so no changing file ends a process."""

    def __init__(self, model_dir: Path) -> None:
        """Raises ModelError."""
        self._stored, _ = find_tensors(model_dir)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix, or elements of a vector, in the file's dtype. KeyError if there is none of this name.

        Raises ModelError if its file cannot be read any more.
        """
        stored = self._stored[name]
        dtype, row = DTYPES[stored.dtype], math.prod(stored.shape[1:])
        data = torch.empty(stop - start, *stored.shape[1:], dtype=dtype)
        left = data.view(-1).view(torch.uint8).numpy().data
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.offset + start * row * dtype.itemsize)
                while left and (num_read := file.readinto(left)):
                    left = left[num_read:]
        except OSError as error:
            raise ModelError(f"{stored.path.name} cannot be read: {error}") from None
        if left:
            raise ModelError(f"{stored.path.name} is shorter than it was")
        return data

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> list[int]:
        """KeyError if there is no tensor of this name."""
        return list(self._stored[name].shape)
