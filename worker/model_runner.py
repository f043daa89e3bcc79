"""ModelRunner: runs a scheduled batch through the model and chooses the next tokens."""

from itertools import accumulate

import torch
from torch import Tensor

from worker.adapter_pool import AdapterPool
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.launched_step import LaunchedStep
from worker.model_config import ModelConfig
from worker.model_input import LoraPlanner, build_model_input
from worker.models.decoder import Decoder
from worker.prompt_logprobs import score_prompts
from worker.sampler import Sampler
from worker.sequence import ScheduledSequence
from worker.step_extras import edges_of_each


class ModelRunner:
    """Owns what a step computes with: the model, the KV cache and the adapters. Sequences are only read."""

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        kv_cache: KVCache,
        pool: AdapterPool | None = None,
        *,
        max_rows: int = 256,
    ) -> None:
        """max_rows: sequences in one step."""
        self.model = model
        self.kv_cache = kv_cache
        self.pool = pool
        self._planner = LoraPlanner(pool)
        self._window = config.sliding_window
        self._sampler = Sampler(config.eos_token_ids)
        self._last_tokens = LastTokens(config.vocab_size, max_rows, kv_cache.data.device)

    @torch.inference_mode()
    def launch(self, batch: list[ScheduledSequence]) -> LaunchedStep:
        """Computes each entry's next num_tokens tokens, whose blocks its block table holds already."""
        lora, edges = self._planner.plan(batch)
        model_input = build_model_input(batch, self.kv_cache, lora, self._window, self._last_tokens, edges)
        if model_input.fresh_blocks:
            # Slots behind a context's end are masked by a factor of 0, which a NaN left by an earlier owner survives.
            self.kv_cache.data[model_input.fresh_blocks] = 0
        hidden = self.model.forward(model_input.tokens, model_input.step)
        first_rows = accumulate((scheduled.num_tokens for scheduled in batch[:-1]), initial=0)
        scores = score_prompts(batch, list(first_rows), hidden, self._logits)
        sampled = [scheduled for scheduled in batch if scheduled.samples]
        if model_input.sample_rows is not None:
            hidden = hidden[model_input.sample_rows]
        logits = self._logits(hidden, [s.sequence.content for s in sampled]) if sampled else hidden
        return LaunchedStep(self._sampler, self._last_tokens, sampled, list(range(len(sampled))), logits, scores=scores)

    def drain(self) -> None:
        """Launching is computing here."""

    def _logits(self, hidden: Tensor, contents: list[int]) -> Tensor:
        return self.model.logits(hidden, edges_of_each(contents, self.pool))
