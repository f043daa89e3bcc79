"""A driver whose runner is made of the Triton kernels, on a GPU or, eager only, in Triton's interpreter."""

from pathlib import Path

import torch

from tests.worker.driver import Driver
from worker.adapter_pool import AdapterPool
from worker.decode_graphs import DecodeGraphs
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.layers.ops import triton_ops
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
    max_model_len: int = 256,
    seed: int = 0,
    with_magnitudes: bool = False,
) -> Driver:
    """graph_rows: sequences in the largest captured step; 0: no graphs. What no one wrote is NaN."""
    model, config = load_model(model_dir, dtype, DEVICE, ops=triton_ops())
    cache = KVCache(num_blocks, block_size, config.num_layers, config.num_kv_heads, config.head_dim, dtype, DEVICE)
    cache.data.fill_(torch.nan)
    pool = AdapterPool(config.chunk_layout(), num_chunks, dtype, DEVICE) if num_chunks else None
    if pool is not None:
        pool.chunks.fill_(torch.nan)
        _synchronize()  # uploads go by a stream of their own
    graphs = None
    if graph_rows:
        last_tokens = LastTokens(config.vocab_size, 64, DEVICE)
        sizes = {"max_rows": graph_rows, "max_chunks": max_chunks, "max_model_len": max_model_len}
        graphs = DecodeGraphs(model, config, cache, pool, last_tokens, with_magnitudes=with_magnitudes, **sizes)
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return Driver(TritonRunner(model, config, cache, pool, max_chunks=max_chunks, graphs=graphs), shuffled)
