"""Where the model runs: what the settings that depend on the device mean on this machine."""

from dataclasses import dataclass

import torch

from worker.config import ConfigError, WorkerConfig
from worker.layers.ops import TORCH, Ops, triton_ops
from worker.memory import available_bytes


@dataclass(frozen=True, slots=True)
class Defaults:
    """Of settings that are left out."""

    block_size: int  # tokens
    max_running_requests: int
    chunked_prefill_size: int  # tokens
    mem_fraction: float


CPU_DEFAULTS = Defaults(16, 32, 512, 0.5)
# The attention kernels read the keys of 64 tokens at once. 1024 rows of an 8B model are 21 ms of an H200's tensor cores
# at their best, which bounds what others' tokens wait. Graphs and activations get a tenth of the memory.
GPU_DEFAULTS = Defaults(64, 256, 1024, 0.9)
# Beside up to so many answers, a GPU's step has half of the rows: few prompts cost the answers beside them little, for
# a step of few rows waits for the weights. With more answers, or none, steps half as large only lose more of their time
# to adapters. Served, H200, Llama-3.1-8B's shape, tokens/s in steps of 1024 rows | of 512: 16 clients 2,986 | 3,109,
# 64 7,663 | 7,976, 256 11,470 | 11,210; on eight adapters 2,699 | 2,771, 6,937 | 7,202, 10,380 | 9,868
# (tests/bench/LOG.md).
FEW_ANSWERS = 128


@dataclass(frozen=True, slots=True)
class Target:
    """The answers. uses_triton: the kernels of Triton, else their torch twins."""

    device: torch.device
    dtype: torch.dtype
    uses_triton: bool
    block_size: int  # tokens
    max_running_requests: int
    chunked_prefill_size: int  # tokens
    mem_fraction: float

    @property
    def ops(self) -> Ops:
        """What the layers are made of."""
        return triton_ops() if self.uses_triton else TORCH

    def prefill_budget(self, num_answers: int) -> int:
        """Prompt tokens of a step with so many answers."""
        if self.device.type != "cuda":
            return self.chunked_prefill_size
        return gpu_prefill_budget(self.chunked_prefill_size, num_answers)

    def available_bytes(self) -> int:
        """Memory that KV and adapters may still take there."""
        if self.device.type == "cpu":
            return available_bytes()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def gpu_prefill_budget(chunked_prefill_size: int, num_answers: int) -> int:
    """Target.prefill_budget on a GPU, where a step's time is that of its rows: answers take the place of as many prompt
    tokens, up to half of them."""
    most = -(-chunked_prefill_size // 2) if 0 < num_answers <= FEW_ANSWERS else chunked_prefill_size
    return most - min(num_answers, most // 2)


def find_target(config: WorkerConfig) -> Target:
    """Raises ConfigError where this machine cannot do what was asked for."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("--device cuda: torch finds no GPU here; use cpu")
    is_cuda = has_gpu and config.device != "cpu"
    if config.lora_backend == "triton" and not is_cuda:
        raise ConfigError("--lora-backend triton needs a GPU; use torch")
    uses_triton = is_cuda and config.lora_backend != "torch"
    defaults = GPU_DEFAULTS if is_cuda else CPU_DEFAULTS
    block_size = config.block_size or defaults.block_size
    if uses_triton and (block_size < 16 or block_size & (block_size - 1)):
        raise ConfigError(f"--block-size {block_size}: on a GPU it must be a power of two, at least 16")
    default = torch.bfloat16 if is_cuda else torch.float32
    dtype = default if config.dtype == "auto" else getattr(torch, config.dtype)
    return Target(
        device=torch.device("cuda", 0) if is_cuda else torch.device("cpu"),
        dtype=dtype,
        uses_triton=uses_triton,
        block_size=block_size,
        max_running_requests=config.max_running_requests or defaults.max_running_requests,
        chunked_prefill_size=config.chunked_prefill_size or defaults.chunked_prefill_size,
        mem_fraction=config.mem_fraction or defaults.mem_fraction,
    )
