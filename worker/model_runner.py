"""ModelRunner: runs a scheduled batch through the model and chooses the next tokens."""

import torch

from worker.adapter_pool import AdapterPool
from worker.kv_cache import KVCache
from worker.model_config import ModelConfig
from worker.model_input import LoraPlanner, build_model_input
from worker.models.decoder import Decoder
from worker.sampler import Sampler
from worker.sequence import Sample, ScheduledSequence


class ModelRunner:
    """Owns what a step computes with: the model, the KV cache and the adapters. Sequences are only read."""

    def __init__(self, model: Decoder, config: ModelConfig, kv_cache: KVCache, pool: AdapterPool | None = None) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.pool = pool
        self._planner = LoraPlanner(pool)
        self._window = config.sliding_window
        self._sampler = Sampler(config.eos_token_ids)

    @torch.inference_mode()
    def run(self, batch: list[ScheduledSequence]) -> list[Sample]:
        """Computes each entry's next num_tokens tokens, whose blocks its block table holds already.

        Returns one Sample for each entry that samples, in the batch's order.
        """
        model_input = build_model_input(batch, self.kv_cache, self._planner.plan(batch), self._window)
        if model_input.fresh_blocks:
            # Slots behind a context's end are masked by a factor of 0, which a NaN left by an earlier owner survives.
            self.kv_cache.data[model_input.fresh_blocks] = 0
        hidden = self.model.forward(model_input.token_ids, model_input.step)
        sampled = [scheduled.sequence for scheduled in batch if scheduled.samples]
        if not sampled:
            return []
        if model_input.sample_rows is not None:
            hidden = hidden[model_input.sample_rows]
        return self._sampler.sample(self.model.logits(hidden).float(), sampled)
