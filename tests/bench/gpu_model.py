"""What the GPU benchmarks measure: Llama-3.1-8B's shape with random weights, resident adapters, KV, and a runner."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from protocol.sampling import SamplingParams
from tests.bench.bench_cpu_decode import RandomWeights, weights_of
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import PackedAdapter
from worker.chunk_layout import MODULES
from worker.decode_graphs import DecodeGraphs
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.launched_step import LaunchedStep
from worker.layers.ops import triton_ops
from worker.mixed_graphs import MixedGraphs
from worker.model_config import ModelConfig, Rope
from worker.models.decoder import Decoder
from worker.sequence import Sample, Sequence
from worker.triton_runner import TritonRunner

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
BLOCK_SIZE, MAX_MODEL_LEN, NUM_ADAPTERS = 64, 8192, 64
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.2e12, 790e12  # of an H200
LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=Rope(500000.0, "llama3", 8.0),
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=None,
    eos_token_ids=(2,),
    dtype="bfloat16",
)


@dataclass(frozen=True, slots=True)
class Captured:
    """A runner with its graphs, and the seconds that they took."""

    runner: TritonRunner
    graphs: DecodeGraphs
    seconds: float


class GpuModel:
    """The model, KV for num_blocks blocks, and 64 adapters of a rank on all modules: generations 1 to 64."""

    def __init__(self, rank: int, num_blocks: int) -> None:
        config = LLAMA_8B
        self.decoder = Decoder(config, RandomWeights(DTYPE, DEVICE), triton_ops())
        sizes = (config.num_layers, config.num_kv_heads, config.head_dim)
        self.cache = KVCache(num_blocks, BLOCK_SIZE, *sizes, DTYPE, DEVICE)
        self.cache.data.normal_()
        self.weight_bytes = sum(weight.nbytes for weight in weights_of(self.decoder))
        self.kv_bytes = KVCache.block_bytes(1, *sizes, DTYPE)  # of a token
        layout = config.chunk_layout()
        self.num_chunks = layout.num_chunks(rank)
        self.pool = AdapterPool(layout, self.num_chunks * NUM_ADAPTERS, DTYPE, DEVICE)
        chunks = (torch.randn(self.num_chunks, layout.chunk_size, device=DEVICE) * 0.02).to(DTYPE)
        packed = PackedAdapter(rank, MODULES, chunks.unbind(), torch.ones(config.num_layers, len(MODULES)), "")
        for i in range(NUM_ADAPTERS):
            self.pool.upload(i + 1, packed, range(i * self.num_chunks, (i + 1) * self.num_chunks))

    def capture(
        self, max_rows: int, pool: AdapterPool | None, prompt_rows: int = 0, max_sequences: int = 256
    ) -> Captured:
        """A runner with graphs up to so many rows. pool: this model's, or None for a worker without LoRA.

        prompt_rows: of the largest step with prompts in it that has a graph, for up to max_sequences; 0: none has.
        """
        start = time.perf_counter()
        last_tokens = LastTokens(LLAMA_8B.vocab_size, max(max_rows, max_sequences), DEVICE)
        state = (self.decoder, LLAMA_8B, self.cache, pool, last_tokens)
        sizes = {"max_chunks": self.num_chunks, "max_model_len": MAX_MODEL_LEN}
        graphs = DecodeGraphs(*state, max_rows=max_rows, **sizes)
        mixed = None
        if prompt_rows:
            mixed = MixedGraphs(*state, graphs.memory, max_rows=prompt_rows, max_sequences=max_sequences, **sizes)
        seconds = time.perf_counter() - start
        runner = TritonRunner(
            self.decoder, LLAMA_8B, self.cache, pool, max_chunks=self.num_chunks, graphs=graphs, mixed=mixed
        )
        return Captured(runner, graphs, seconds)

    def eager(self, pool: AdapterPool | None) -> TritonRunner:
        """A runner without graphs."""
        return TritonRunner(self.decoder, LLAMA_8B, self.cache, pool, max_chunks=self.num_chunks)

    def floor_ms(self, num_rows: int, context: int) -> float:
        """What bytes and operations allow a decode step without adapters."""
        gemm = max(self.weight_bytes / BYTES_PER_SECOND, num_rows * self.weight_bytes / FLOPS_PER_SECOND)
        return 1e3 * (gemm + num_rows * context * self.kv_bytes / BYTES_PER_SECOND)


def sequence(index: int, content: int, num_tokens: int, num_computed: int, blocks_each: int) -> Sequence:
    """A greedy sequence of some tokens, of which num_computed have KV, in blocks of its own."""
    blocks = list(range(index * blocks_each, (index + 1) * blocks_each))
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    tokens = [(5 + 7 * index + 11 * i) % LLAMA_8B.vocab_size for i in range(num_tokens)]
    return Sequence(
        index, tokens, num_tokens, sampling, 0, content=content, block_table=blocks, num_computed_tokens=num_computed
    )


def run_steps(runner: TritonRunner, sequences: list[Sequence], num_tokens: int, num_steps: int) -> list[float]:
    """Milliseconds from step to step.

    num_tokens: of each sequence in a step. After a decode step (1 token) the sequences have grown; a prompt's step is
    the same each time.
    """

    def launch() -> LaunchedStep:
        launched = runner.launch([each.share(num_tokens) for each in sequences])
        if num_tokens == 1:
            for each in sequences:
                each.num_computed_tokens += 1
                each.num_pending += 1
        return launched

    def take(samples: list[Sample]) -> None:
        if num_tokens == 1:
            for each, sample in zip(sequences, samples, strict=True):
                each.num_pending -= 1
                each.token_ids.append(sample.token_id)

    return run_one_ahead(launch, num_steps, take)


def run_one_ahead(
    launch: Callable[[], LaunchedStep], num_steps: int, take: Callable[[list[Sample]], None] = lambda samples: None
) -> list[float]:
    """Milliseconds from step to step, run as the engine runs them. The one place that knows how."""
    times: list[float] = []
    under_way: LaunchedStep | None = None
    last_s = time.perf_counter()
    for i in range(num_steps + 1):
        launched = launch() if i < num_steps else None
        if under_way is not None:
            samples = under_way.collect()
            now = time.perf_counter()
            times.append(1e3 * (now - last_s))
            last_s = now
            take(samples)
        under_way = launched
    return times


def prompt_flops(weight_bytes: int, num_sequences: int, num_tokens: int) -> float:
    """Operations of a step of prompts of num_tokens tokens in all: linears, causal attention, and the head."""
    config = LLAMA_8B
    head = config.vocab_size * config.hidden_size
    linears = 2.0 * (weight_bytes / DTYPE.itemsize - head) * num_tokens + 2.0 * head * num_sequences
    pairs = num_sequences * math.comb(num_tokens // num_sequences + 1, 2)
    return linears + 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs
