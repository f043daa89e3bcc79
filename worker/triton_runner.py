"""TritonRunner: runs a scheduled batch on a GPU. ModelRunner's counterpart for a model made of Triton kernels."""

import dataclasses

import torch
from torch import Tensor

from kernels import reference
from protocol.sampling import SamplingParams
from worker.adapter_pool import AdapterPool
from worker.decode_graphs import DecodeGraphs
from worker.kv_cache import KVCache
from worker.layers.side_stream import MAX_ROWS, SideStream
from worker.layers.step import Lora
from worker.model_config import ModelConfig
from worker.models.decoder import Decoder
from worker.paged_input import BUCKETS, Adapted, StepRows, adapted_rows, eager_step, lay_out, work_list
from worker.sampler import Sampler, is_plain_greedy
from worker.sequence import Sample, ScheduledSequence, Sequence

WARM_UP_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096)


class TritonRunner:
    """Owns what a step computes with. Decode steps are replayed from CUDA graphs where there are any."""

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        kv_cache: KVCache,
        pool: AdapterPool | None = None,
        *,
        max_chunks: int = 1,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """max_chunks: of one adapter. graphs: captured, of the same model, cache and pool."""
        self.model = model
        self.kv_cache = kv_cache
        self.pool = pool
        self._config = config
        self._max_chunks = max_chunks
        self._graphs = graphs
        self._buckets = graphs.buckets if graphs is not None else BUCKETS
        self._sampler = Sampler(config.eos_token_ids)
        device = kv_cache.data.device
        self._side = SideStream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def run(self, batch: list[ScheduledSequence]) -> list[Sample]:
        """Computes each entry's next num_tokens tokens, whose blocks its block table holds already.

        Returns one Sample for each entry that samples, in the batch's order.
        """
        rows = lay_out(batch, self.kv_cache.block_size, self._buckets)
        adapted = adapted_rows(rows, self.pool)
        sampled = [scheduled.sequence for scheduled in batch if scheduled.samples]
        if self._graphs is not None and self._graphs.fits(rows):
            tokens, logits = self._graphs.replay(rows, adapted)
            order = rows.sample_rows
            if all(map(is_plain_greedy, sampled)):
                chosen = tokens.tolist()
                return [_greedy_sample(chosen[row]) for row in order]
            return self._sampler.sample(logits[order].float(), sampled)
        hidden = self._forward(rows, adapted)
        return self._choose(self.model.logits(hidden[rows.sample_rows]), sampled) if sampled else []

    @torch.inference_mode()
    def warm_up(self, max_tokens: int) -> None:
        """Compiles what prompts of up to max_tokens tokens a step need. For boot: writes over the first KV blocks."""
        block_size = self.kv_cache.block_size
        most = min(max_tokens, self.kv_cache.num_blocks * block_size, self._config.max_position_embeddings)
        for num_tokens in sorted({size for size in (*WARM_UP_TOKENS, most) if 1 < size <= most}):
            blocks = list(range(-(-num_tokens // block_size)))
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            sequence = Sequence(0, [0] * num_tokens, num_tokens, sampling, 0, block_table=blocks)
            rows = lay_out([ScheduledSequence(sequence, num_tokens)], block_size, self._buckets)
            hidden = self._forward(rows, [])
            if self.pool is not None:
                hidden = self._forward(rows, [(0, (0,), list(range(num_tokens)))])
            self._choose(self.model.logits(hidden[rows.sample_rows]), [sequence])

    def _forward(self, rows: StepRows, adapted: list[Adapted]) -> Tensor:
        token_ids, step = eager_step(rows, self.kv_cache, self._config)
        if adapted:
            assert self.pool is not None
            work = work_list(adapted, len(rows.token_ids), self.pool, self._max_chunks)
            side = self._side if len(rows.token_ids) <= MAX_ROWS else None
            step = dataclasses.replace(step, lora=Lora(self.pool.chunks, work, side))
        return self.model.forward(token_ids, step)

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> list[Sample]:
        if all(map(is_plain_greedy, sequences)):
            return [_greedy_sample(token) for token in reference.argmax(logits).tolist()]
        return self._sampler.sample(logits.float(), sequences)


def _greedy_sample(token: int) -> Sample:
    """token as kernels.reference.argmax has it."""
    return Sample(max(token, 0), failed=token < 0)
