"""Weights: reads a model directory's safetensors; every tensor in them is used or the load fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.layers.ops import TORCH, Ops
from worker.model_config import ModelConfig, ModelError
from worker.models.decoder import Decoder

Progress = Callable[[int, int], None]  # bytes read, bytes in all
INDEX = "model.safetensors.index.json"


class TensorFile(Protocol):
    """An open safetensors file."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...


class WeightReader:
    """Hands out the tensors of a checkpoint by name, converted and copied: nothing keeps a file mapped."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device, progress: Progress) -> None:
        self.dtype = dtype
        self.device = device
        self._files = _open_files(model_dir, device)
        self._file_of = _file_of_tensors(model_dir, self._files)
        self._taken: set[str] = set()
        self._progress = progress
        self._num_read = 0
        self._num_total = sum(
            path.stat().st_size for path in model_dir.glob("*.safetensors") if path.name in self._files
        )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name, which must have this shape. Raises ModelError naming it."""
        return self.merge([(name, shape[0])], *shape[1:])

    def merge(self, names_and_rows: list[tuple[str, int]], *row_shape: int) -> Tensor:
        """Tensors of the given names and numbers of rows, one below the other in one new tensor."""
        num_rows = sum(rows for _, rows in names_and_rows)
        merged = torch.empty(num_rows, *row_shape, dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in names_and_rows:
            merged[start : start + rows].copy_(self._read(name, (rows, *row_shape)))
            start += rows
        return merged

    def check_all_taken(self) -> None:
        """Raises ModelError if the checkpoint holds a tensor that the model did not ask for."""
        # Old Llama checkpoints store the rotary frequencies, which the config determines.
        rest = sorted(n for n in self._file_of.keys() - self._taken if not n.endswith(".rotary_emb.inv_freq"))
        if rest:
            raise ModelError(f"the checkpoint holds {len(rest)} unexpected tensors, the first is {rest[0]}")
        self._progress(self._num_total, self._num_total)

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._file_of:
            raise ModelError(f"the checkpoint lacks the tensor {name}")
        tensor = self._file_of[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{name} has shape {list(tensor.shape)} where config.json asks for {list(shape)}")
        if not tensor.is_floating_point():
            raise ModelError(f"{name} is of type {tensor.dtype}, which is not supported")
        self._taken.add(name)
        self._num_read += tensor.nbytes
        self._progress(min(self._num_read, self._num_total), self._num_total)
        return tensor


def _open_files(model_dir: Path, device: torch.device) -> dict[str, TensorFile]:
    """The checkpoint's files by name, opened for the device: those of the index, or else model.safetensors."""
    names = ["model.safetensors"]
    index = model_dir / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{INDEX} is not a weight index") from None
    files: dict[str, TensorFile] = {}
    for name in names:
        if Path(name).name != name or not (model_dir / name).is_file():
            raise ModelError(f"the model directory has no file {name}")
        try:
            files[name] = safe_open(model_dir / name, framework="pt", device=str(device))
        except SafetensorError as error:
            raise ModelError(f"{name} is not a valid safetensors file: {error}") from None
    return files


def _file_of_tensors(model_dir: Path, files: dict[str, TensorFile]) -> dict[str, TensorFile]:
    file_of: dict[str, TensorFile] = {}
    for file_name, file in files.items():
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            if name in file_of:
                raise ModelError(f"{name} stands in two files, {file_name} is one")
            file_of[name] = file
    return file_of


def load_model(
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda done, total: None,
    ops: Ops = TORCH,
) -> tuple[Decoder, ModelConfig]:
    """The model of a directory with config.json and safetensors. Raises ModelError naming the key or tensor."""
    config = ModelConfig.read(model_dir)
    reader = WeightReader(model_dir, dtype, device, progress)
    model = Decoder(config, reader, ops)
    reader.check_all_taken()
    return model, config
