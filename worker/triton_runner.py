"""TritonRunner: runs a scheduled batch on a GPU. ModelRunner's counterpart for a model made of Triton kernels."""

import dataclasses

import torch
from torch import Tensor

from kernels import Edges, Rescaled
from kernels.gpu import argmax, launch, sample
from protocol.sampling import SamplingParams
from worker.adapter_pool import AdapterPool
from worker.decode_graphs import DecodeGraphs
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.launched_step import LaunchedStep
from worker.layers.side_stream import MAX_ROWS, SideStream
from worker.layers.step import Lora
from worker.mixed_graphs import Hidden, MixedGraphs
from worker.model_config import ModelConfig
from worker.models.decoder import Decoder
from worker.paged_input import BUCKETS, Adapted, StepRows, adapted_rows, eager_step, lay_out, work_list
from worker.prompt_logprobs import is_scored, score_prompts
from worker.sampler import Draws, Sampler
from worker.sequence import ScheduledSequence, Sequence
from worker.step_extras import edges_of, edges_of_each, rescaled_of

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
        max_rows: int = 256,
        graphs: DecodeGraphs | None = None,
        mixed: MixedGraphs | None = None,
    ) -> None:
        """max_chunks: of one adapter. max_rows: sequences in one step; with graphs, their LastTokens say it.

        graphs, mixed: captured, of the same model, cache, pool and LastTokens.
        """
        self.model = model
        self.kv_cache = kv_cache
        self.pool = pool
        self._config = config
        self._max_chunks = max_chunks
        self._graphs, self._mixed = graphs, mixed
        self._buckets = graphs.buckets if graphs is not None else BUCKETS
        self._sampler = Sampler(config.eos_token_ids, _draw)
        device = kv_cache.data.device
        self._side = SideStream(device) if device.type == "cuda" else None
        self._last_tokens = LastTokens(config.vocab_size, max_rows, device) if graphs is None else graphs.last_tokens

    @torch.inference_mode()
    def launch(self, batch: list[ScheduledSequence]) -> LaunchedStep:
        """Enqueues the next num_tokens tokens of each entry, whose blocks its block table holds already.

        Nothing here waits for the device, so that the step is there before the one at work is done.
        """
        mixed_sizes = (self._mixed.sizes, self._mixed.sizes_alone) if self._mixed is not None else ()
        rows = lay_out(batch, self._buckets, *mixed_sizes)
        adapted = adapted_rows(rows, self.pool)
        sampled = [scheduled for scheduled in batch if scheduled.samples]
        of_adapters = {number: of_adapter for number, _, of_adapter in adapted}
        rescaled, edges = rescaled_of(of_adapters, self.pool), edges_of(of_adapters, self.pool)
        is_plain = edges is None and not any(map(is_scored, batch))
        if self._graphs is not None and is_plain and self._graphs.fits(rows, rescaled):
            tokens, logits = self._graphs.replay(rows, adapted, rescaled)
            of_sampled = [row for row, scheduled in enumerate(batch) if scheduled.samples]
            return LaunchedStep(self._sampler, self._last_tokens, sampled, of_sampled, logits, tokens)
        in_layers = [entry for entry in adapted if entry[1]]
        if self._mixed is not None and edges is None and rescaled is None and self._mixed.fits(rows):
            hidden = self._mixed.replay(rows, in_layers)
        else:
            hidden = self._eager(rows, in_layers, rescaled, edges)
        scores = score_prompts(rows.shares, rows.first_rows, hidden.states, self._logits)
        logits, tokens = self._best(hidden)
        place = {scheduled.sequence.sequence_id: row for row, scheduled in enumerate(hidden.sampled)}
        of_sampled = [place[scheduled.sequence.sequence_id] for scheduled in sampled]
        return LaunchedStep(self._sampler, self._last_tokens, sampled, of_sampled, logits, tokens, scores)

    def drain(self) -> None:
        """Waits until nothing runs of what launch has enqueued, of one that failed halfway too."""
        if self.kv_cache.data.device.type == "cuda":
            torch.cuda.synchronize(self.kv_cache.data.device)

    @torch.inference_mode()
    def warm_up(self, max_tokens: int) -> None:
        """Compiles what prompts of up to max_tokens tokens a step need, alone and beside answers.

        For boot: writes over the first KV blocks.
        """
        room = self.kv_cache.num_blocks * self.kv_cache.block_size
        most = min(max_tokens, room, self._config.max_position_embeddings)
        for num_tokens in sorted({size for size in (*WARM_UP_TOKENS, most) if 1 < size <= most}):
            prompt = self._made(num_tokens)
            batches = [[prompt.share(num_tokens)]]
            if launch.long_rows(num_tokens):  # else the kernels beside answers are the same
                batches.append([self._made(1).share(1), prompt.share(num_tokens - 1)])
            for batch in batches:
                rows = lay_out(batch, self._buckets)
                self._best(self._eager(rows, []))
                if self.pool is not None:
                    all_rows = list(range(num_tokens))
                    rescaled = Rescaled.of([all_rows], [0], self.pool.chunks.device)
                    self._eager(rows, [(0, (0,), all_rows)], rescaled)
        self._warm_up_draws()

    def _made(self, num_tokens: int) -> Sequence:
        blocks = list(range(-(-num_tokens // self.kv_cache.block_size)))
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        return Sequence(0, [0] * num_tokens, num_tokens, sampling, 0, block_table=blocks)

    def _warm_up_draws(self) -> None:
        """Of every number of rows, as far as kernels differ by it: see launch.argmax_blocks."""
        vocab_size, device = self._config.vocab_size, self.kv_cache.data.device
        params = SamplingParams(max_tokens=1, temperature=1.0)
        num_rows = 1
        while num_rows < 2 * self._buckets[-1]:
            draws = Draws.of([params] * num_rows, [0.5] * num_rows, vocab_size, device)
            _draw(torch.zeros(num_rows, vocab_size, device=device), draws)
            num_rows *= 2

    def _eager(
        self, rows: StepRows, adapted: list[Adapted], rescaled: Rescaled | None = None, edges: Edges | None = None
    ) -> Hidden:
        """A step launched kernel by kernel. adapted: whose adapters have chunks in the layers."""
        eager = eager_step(rows, self.kv_cache, self._config, self._last_tokens)
        step = dataclasses.replace(eager.step, edges=edges)
        if adapted:
            assert self.pool is not None
            work = work_list(adapted, rows.num_rows, self.pool, self._max_chunks, step.has_answers)
            side = self._side if rows.num_rows <= MAX_ROWS else None
            step = dataclasses.replace(step, lora=Lora(self.pool.chunks, work, side, rescaled))
        states = self.model.forward(self._last_tokens.tokens(eager.codes), step)
        return Hidden(states, eager.sampled, eager.sample_rows)

    def _logits(self, hidden: Tensor, contents: list[int]) -> Tensor:
        return self.model.logits(hidden, edges_of_each(contents, self.pool))

    def _best(self, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Logits and best tokens of the rows that sample; the next step finds them."""
        if not hidden.sampled:
            return hidden.states[:0], torch.empty(0, dtype=torch.int64, device=hidden.states.device)
        contents = [scheduled.sequence.content for scheduled in hidden.sampled]
        logits = self._logits(hidden.states.index_select(0, hidden.sample_rows), contents)
        tokens = argmax(logits, launch.semaphores(logits.device))
        self._last_tokens.keep(tokens)
        return logits, tokens


def _draw(logits: Tensor, draws: Draws) -> Tensor:
    """worker.sampler.sample_tokens as kernels."""
    top_ks = draws.top_k.masked_fill(draws.top_k >= logits.shape[1], 0).int()
    semaphores = launch.semaphores(logits.device)
    return sample(logits, draws.temperatures, top_ks, draws.top_p.float(), draws.min_p, draws.uniforms, semaphores)
