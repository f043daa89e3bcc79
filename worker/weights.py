"""Weights: reads a model directory's safetensors; every tensor in them is used or the load fails."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from worker.checkpoint import DTYPES, StoredTensor, find_tensors
from worker.layers.ops import TORCH, Ops
from worker.model_config import ModelConfig, ModelError
from worker.models.decoder import Decoder
from worker.weight_copier import WeightCopier

Progress = Callable[[int, int], None]  # bytes read, bytes in all


class WeightReader:
    """Hands out the tensors of a checkpoint by name, converted and copied: nothing keeps a file mapped.

    They are filled in the background; `finish` waits for that.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device, progress: Progress) -> None:
        self.dtype = dtype
        self.device = device
        self._stored, self._num_total = find_tensors(model_dir)
        self._taken: set[str] = set()
        self._progress = progress
        self._num_read = 0
        self._copier = WeightCopier(device)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name, which must have this shape. Raises ModelError naming it."""
        return self.merge([(name, shape[0])], *shape[1:])

    def merge(self, names_and_rows: list[tuple[str, int]], *row_shape: int) -> Tensor:
        """Tensors of the given names and numbers of rows, one below the other in one new tensor."""
        num_rows = sum(rows for _, rows in names_and_rows)
        merged = torch.empty(num_rows, *row_shape, dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in names_and_rows:
            stored = self._checked(name, (rows, *row_shape))
            self._copier.copy(stored.path, stored.offset, DTYPES[stored.dtype], merged[start : start + rows])
            start += rows
        return merged

    def check_all_taken(self) -> None:
        """Raises ModelError if the checkpoint holds a tensor that the model did not ask for."""
        # Old Llama checkpoints store the rotary frequencies, which the config determines.
        rest = sorted(n for n in self._stored.keys() - self._taken if not n.endswith(".rotary_emb.inv_freq"))
        if rest:
            raise ModelError(f"the checkpoint holds {len(rest)} unexpected tensors, the first is {rest[0]}")

    def finish(self) -> None:
        """Waits until all that was handed out is filled. Raises ModelError if a file cannot be read."""
        try:
            for num_bytes in self._copier.finish():
                self._num_read += num_bytes
                self._progress(min(self._num_read, self._num_total), self._num_total)
        except OSError as error:
            raise ModelError(f"reading the weights failed: {error}") from None
        self._progress(self._num_total, self._num_total)

    def close(self) -> None:
        """Ends what is still under way."""
        self._copier.close()

    def _checked(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        if name not in self._stored:
            raise ModelError(f"the checkpoint lacks the tensor {name}")
        stored = self._stored[name]
        if stored.shape != shape:
            raise ModelError(f"{name} has shape {list(stored.shape)} where config.json asks for {list(shape)}")
        if stored.dtype not in DTYPES:
            raise ModelError(f"{name} is of type {stored.dtype}, which is not supported")
        self._taken.add(name)
        return stored


class LoadingModel:
    """A model whose weights are on their way: its tensors exist, and hold what they should after `finish`."""

    def __init__(
        self, model_dir: Path, dtype: torch.dtype, device: torch.device, progress: Progress, ops: Ops = TORCH
    ) -> None:
        """Raises ModelError naming the key or tensor that does not fit."""
        self.config = ModelConfig.read(model_dir)
        self._reader = WeightReader(model_dir, dtype, device, progress)
        try:
            self.decoder = Decoder(self.config, self._reader, ops)
            self._tied = self._tied_lm_head()
            self._reader.check_all_taken()
        except BaseException:
            self._reader.close()
            raise

    def close(self) -> None:
        """Ends the loading, done or not."""
        self._reader.close()

    def finish(self) -> None:
        """Waits for the weights. Raises ModelError."""
        self._reader.finish()
        self.close()
        if self._tied is not None and not torch.equal(self._tied, self.decoder.embed_tokens):
            raise ModelError("tie_word_embeddings is true but lm_head.weight differs from model.embed_tokens.weight")
        self._tied = None

    def _tied_lm_head(self) -> Tensor | None:
        """Tied checkpoints mostly leave lm_head out; one that has it must mean what it says."""
        if not self.config.tie_word_embeddings or "lm_head.weight" not in self._reader:
            return None
        return self._reader.take("lm_head.weight", self.config.vocab_size, self.config.hidden_size)


def load_model(
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda done, total: None,
    ops: Ops = TORCH,
) -> tuple[Decoder, ModelConfig]:
    """The model of a directory with config.json and safetensors. Raises ModelError naming the key or tensor."""
    loading = LoadingModel(model_dir, dtype, device, progress, ops)
    try:
        loading.finish()
    finally:
        loading.close()
    return loading.decoder, loading.config
