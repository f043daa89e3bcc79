"""A driver whose runner is made of the Triton kernels, on a GPU or, eager only, in Triton's interpreter."""

from pathlib import Path

import torch

from tests.worker.driver import Driver, one_memory
from worker.adapter_pool import AdapterPool
from worker.decode_graphs import DecodeGraphs
from worker.last_tokens import LastTokens
from worker.layers.ops import triton_ops
from worker.mixed_graphs import MixedGraphs
from worker.triton_runner import TritonRunner
from worker.weights import load_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def wait_for_adapters(pool: AdapterPool) -> None:
    """Until what was uploaded is there: no step may use it before."""
    if pool.chunks.is_cuda:
        _synchronize()


def triton_driver(
    model_dir: Path,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = 16,
    num_blocks: int = 64,
    num_chunks: int = 0,
    max_chunks: int = 4,
    graph_rows: int = 0,
    prompt_rows: int = 128,
    max_model_len: int = 256,
    seed: int = 0,
    with_magnitudes: bool = False,
) -> Driver:
    """graph_rows: sequences in the largest captured step of decodes; 0: no graphs. What no one wrote is NaN.

    prompt_rows: of the largest captured step with prompts in it.
    """
    model, config = load_model(model_dir, dtype, DEVICE, ops=triton_ops())
    cache, pool, free = one_memory(config, block_size, num_blocks, num_chunks, dtype, DEVICE, seed)
    _synchronize()  # uploads go by a stream of their own
    graphs = mixed = None
    if graph_rows:
        state = (model, config, cache, pool, LastTokens(config.vocab_size, 64, DEVICE))
        sizes = {"max_chunks": max_chunks, "max_model_len": max_model_len}
        graphs = DecodeGraphs(*state, max_rows=graph_rows, with_magnitudes=with_magnitudes, **sizes)
        mixed = MixedGraphs(*state, graphs.memory, max_rows=prompt_rows, max_sequences=64, **sizes)
    return Driver(TritonRunner(model, config, cache, pool, max_chunks=max_chunks, graphs=graphs, mixed=mixed), free)
