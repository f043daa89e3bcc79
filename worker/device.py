"""Where the model runs: what --device, --dtype, --lora-backend and --block-size mean on this machine."""

from dataclasses import dataclass

import torch

from worker.config import ConfigError, WorkerConfig
from worker.layers.ops import TORCH, Ops, triton_ops
from worker.memory import available_bytes

CPU_BLOCK_SIZE = 16
GPU_BLOCK_SIZE = 64  # the attention kernels read the keys of so many tokens at once


@dataclass(frozen=True, slots=True)
class Target:
    """The answers. uses_triton: the kernels of Triton, else their torch twins."""

    device: torch.device
    dtype: torch.dtype
    uses_triton: bool
    block_size: int  # tokens

    @property
    def ops(self) -> Ops:
        """What the layers are made of."""
        return triton_ops() if self.uses_triton else TORCH

    def available_bytes(self) -> int:
        """Memory that KV and adapters may still take there."""
        if self.device.type == "cpu":
            return available_bytes()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def find_target(config: WorkerConfig) -> Target:
    """Raises ConfigError where this machine cannot do what was asked for."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("--device cuda: torch finds no GPU here; use cpu")
    is_cuda = has_gpu and config.device != "cpu"
    if config.lora_backend == "triton" and not is_cuda:
        raise ConfigError("--lora-backend triton needs a GPU; use torch")
    uses_triton = is_cuda and config.lora_backend != "torch"
    block_size = config.block_size or (GPU_BLOCK_SIZE if is_cuda else CPU_BLOCK_SIZE)
    if uses_triton and (block_size < 16 or block_size & (block_size - 1)):
        raise ConfigError(f"--block-size {block_size}: on a GPU it must be a power of two, at least 16")
    default = torch.bfloat16 if is_cuda else torch.float32
    dtype = default if config.dtype == "auto" else getattr(torch, config.dtype)
    return Target(torch.device("cuda", 0) if is_cuda else torch.device("cpu"), dtype, uses_triton, block_size)
