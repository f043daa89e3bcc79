"""A driver for the model runner in tests: sequences with blocks, run to the end in any split and mix."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from protocol.sampling import SamplingParams
from worker.adapter_pool import AdapterPool
from worker.kv_cache import KVCache
from worker.launched_step import LaunchedStep
from worker.model_config import ModelConfig
from worker.model_runner import ModelRunner
from worker.sequence import Sample, ScheduledSequence, Sequence
from worker.weights import load_model

if TYPE_CHECKING:
    from worker.triton_runner import TritonRunner

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, logprobs=5)


@dataclass
class Driver:
    """A runner and the blocks that its sequences have not taken yet."""

    runner: "ModelRunner | TritonRunner"
    free: list[int]
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    num_made: int = 0
    in_flight: list[tuple[list[ScheduledSequence], LaunchedStep]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model_dir: Path,
        block_size: int = 4,
        num_blocks: int = 256,
        num_chunks: int = 0,
        seed: int = 0,
        device: torch.device = CPU,
    ) -> "Driver":
        """Made of the torch twins, float32."""
        model, config = load_model(model_dir, torch.float32, device)
        cache, pool, free = one_memory(config, block_size, num_blocks, num_chunks, torch.float32, device, seed)
        return cls(ModelRunner(model, config, cache, pool), free)

    def add(self, prompt: list[int], generation: int = 0, sampling: SamplingParams = GREEDY, seed: int = 0) -> Sequence:
        sequence = Sequence(self.num_made, list(prompt), len(prompt), sampling, seed, generation, generation)
        self.num_made += 1
        self.samples[sequence.sequence_id] = []
        return sequence

    def step(self, batch: list[tuple[Sequence, int]]) -> None:
        """Runs one step of (sequence, num_tokens) and books its results as an engine would."""
        self.launch(batch)
        self.collect()

    def step_ahead(self, batch: list[tuple[Sequence, int]]) -> None:
        """Launches a step, then collects the one before."""
        self.launch(batch)
        while len(self.in_flight) > 1:
            self.collect()
        self.in_flight[0][1].sample_late()

    def launch(self, batch: list[tuple[Sequence, int]]) -> None:
        """Launches a step of (sequence, num_tokens) and books it."""
        block_size = self.runner.kv_cache.block_size
        for sequence, num_tokens in batch:
            while len(sequence.block_table) * block_size < sequence.num_computed_tokens + num_tokens:
                sequence.block_table.append(self.free.pop())
        shares = [sequence.share(num_tokens) for sequence, num_tokens in batch]
        self.in_flight.append((shares, self.runner.launch(shares)))
        for share in shares:
            share.book()

    def collect(self) -> None:
        """Takes in the oldest step that was launched."""
        shares, step = self.in_flight.pop(0)
        step.sample_late()
        sampled = [share.sequence for share in shares if share.samples]
        for sequence, sample in zip(sampled, step.collect(), strict=True):
            sequence.num_pending -= 1
            sequence.token_ids.append(sample.token_id)
            if sequence.matcher is not None:
                sequence.matcher.accept(sample.token_id)
            self.samples[sequence.sequence_id].append(sample)

    def finish(self, sequences: list[Sequence], num_outputs: int, chunk: int = 1 << 30) -> None:
        """Runs all sequences together until each has num_outputs; prompts go in chunks of at most `chunk` tokens."""
        while unfinished := [s for s in sequences if s.num_output_tokens < num_outputs]:
            self.step([(sequence, min(chunk, sequence.num_uncomputed_tokens)) for sequence in unfinished])


def one_memory(
    config: ModelConfig,
    block_size: int,
    num_blocks: int,
    num_chunks: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[KVCache, AdapterPool | None, list[int]]:
    """KV and adapters as they lie in an arena, chunks first; and the blocks, shuffled. What no one wrote is NaN."""
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    block_bytes, layout = KVCache.block_bytes(block_size, *shape, dtype), config.chunk_layout()
    per_page = -(-layout.chunk_size * dtype.itemsize // block_bytes) if num_chunks else 1
    num_pages = num_chunks + -(-num_blocks // per_page)
    memory = torch.full((num_pages * per_page * block_bytes // dtype.itemsize,), torch.nan, dtype=dtype, device=device)
    cache = KVCache(num_pages * per_page, block_size, *shape, dtype, device, memory)
    pool = AdapterPool(layout, num_pages, dtype, device, memory) if num_chunks else None
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return cache, pool, [num_chunks * per_page + block for block in shuffled]


def outputs(sequence: Sequence) -> list[int]:
    """The answer's token ids."""
    return sequence.token_ids[sequence.num_prompt_tokens :]
