"""DecodeGraphs: decode steps as CUDA graphs, one for each bucket of rows, without adapters and with.

On request there is a third of each bucket, for steps in which some adapter has magnitudes (DoRA).

A graph holds everything from the step before's tokens to its own: their look-up, the forward pass, the logits, each
row's best token, and where the next step finds it. It is captured once and serves any mix of adapters and contexts:
what changes from step to step stands in buffers at fixed addresses.
"""

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import PagedPlan, Rescaled, WorkList
from kernels.gpu import argmax, launch
from worker.adapter_pool import AdapterPool
from worker.graph_capture import capture
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.layers.side_stream import MAX_ROWS, SideStream
from worker.layers.step import Lora, Step
from worker.model_config import ModelConfig
from worker.models.decoder import Decoder
from worker.paged_input import BUCKETS, Adapted, StepRows, table_width, work_of
from worker.step_buffers import StepBuffers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Captured:
    """One graph and what it leaves behind."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # int64 [num_rows]: the best, -1 where the logits are not numbers
    logits: Tensor  # [num_rows, vocab_size]


class Bucket:
    """The buffers of one number of rows, and its graphs."""

    def __init__(
        self, num_rows: int, max_blocks: int, kv_cache: KVCache, window: int | None, pool: AdapterPool | None,
        max_chunks: int, side: SideStream, with_magnitudes: bool,
    ) -> None:  # fmt: skip
        device = kv_cache.data.device
        num_kv_heads = kv_cache.data.shape[3]
        self.num_rows = num_rows
        self.buffers = StepBuffers(num_rows, max_blocks, kv_cache.block_size, device)
        self.semaphores = torch.zeros(num_rows, dtype=torch.int32, device=device)  # of the argmax
        plan = PagedPlan(
            block_tables=self.buffers.block_tables,
            context_lens=self.buffers.context_lens,
            num_decodes=num_rows,
            num_live=self.buffers.num_live,
            tiles=None,
            window=window,
            semaphores=torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=device),
        )
        base = Step(self.buffers.positions, self.buffers.slots, plan, kv_cache.layers, None, has_answers=True)
        self.steps = [base]
        self.work: WorkList | None = None
        self._pool = pool
        # Of Rescaled; behind the rows that adapters with magnitudes have, -1.
        self.magnitudes = torch.full((num_rows, 2), -1, dtype=torch.int64, device=device)
        if pool is not None:
            self.work = WorkList(pool.scales, num_rows, max_chunks, launch.block_rows(num_rows))
            self.work.update(num_rows, [])
            lora = Lora(pool.chunks, self.work, side if num_rows <= MAX_ROWS else None)
            self.steps.append(dataclasses.replace(base, lora=lora))
            if with_magnitudes:
                lora = dataclasses.replace(lora, rescaled=Rescaled(self.magnitudes, ()))
                self.steps.append(dataclasses.replace(base, lora=lora))
        self.graphs: list[Captured] = []  # without adapters, with, with magnitudes
        self.adapted: list[Adapted] = []  # what the work list describes

    def set_adapters(self, adapted: list[Adapted], rescaled: Rescaled | None) -> None:
        """Brings the work list up to date; a batch that goes on decoding has the same one."""
        assert self.work is not None and self._pool is not None
        if adapted != self.adapted:
            self.adapted = []  # should the update fail, nobody may build on it
            self.work.update(self.num_rows, work_of(adapted, self._pool))
            self.adapted = adapted
        if rescaled is not None:
            self.magnitudes.fill_(-1)
            self.magnitudes[: len(rescaled.table)].copy_(rescaled.table)


class DecodeGraphs:
    """All buckets up to max_rows."""

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        kv_cache: KVCache,
        pool: AdapterPool | None,
        last_tokens: LastTokens,
        *,
        max_rows: int,
        max_chunks: int,
        max_model_len: int,
        with_magnitudes: bool = False,
    ) -> None:
        """Captures them, which takes seconds. max_chunks: of one adapter; max_model_len: the longest context.

        with_magnitudes: also for steps with adapters that have them (DoRA).
        """
        self.buckets = (*(bucket for bucket in BUCKETS if bucket < max_rows), max_rows)
        self.last_tokens = last_tokens
        self.memory: Any = torch.cuda.graph_pool_handle()  # of all graphs: no two run at once
        self._model = model
        self._with_magnitudes = with_magnitudes
        device = kv_cache.data.device
        side = SideStream(device)
        width = table_width(max_model_len, kv_cache.block_size)
        self._of = {
            num_rows: Bucket(num_rows, width, kv_cache, config.sliding_window, pool, max_chunks, side, with_magnitudes)
            for num_rows in self.buckets
        }
        self._capture_all()

    def fits(self, rows: StepRows, rescaled: Rescaled | None) -> bool:
        """Whether there is a graph for these rows, of which some may have magnitudes."""
        return not rows.prefills and rows.num_rows in self._of and (self._with_magnitudes or rescaled is None)

    def replay(self, rows: StepRows, adapted: list[Adapted], rescaled: Rescaled | None = None) -> tuple[Tensor, Tensor]:
        """Enqueues a step that fits: each row's best token (-1: no number) and logits, padding included.

        They are overwritten by the next replay.
        """
        bucket = self._of[rows.num_rows]
        bucket.buffers.fill(rows.decodes, self.last_tokens)
        if adapted:
            bucket.set_adapters(adapted, rescaled)
        captured = self.captured(rows.num_rows, bool(adapted), rescaled is not None)
        captured.graph.replay()
        return captured.tokens, captured.logits

    def captured(self, num_rows: int, has_adapters: bool, has_magnitudes: bool = False) -> Captured:
        """The graph of a bucket."""
        return self._of[num_rows].graphs[2 if has_magnitudes else 1 if has_adapters else 0]

    @torch.inference_mode()
    def _capture_all(self) -> None:
        log.info("CUDA graphs: capturing %d sizes up to %d sequences", len(self.buckets), self.buckets[-1])
        whole, self._model = self._model, self._model.shallow()
        with launch.compiling():
            for bucket in self._of.values():
                for step in bucket.steps:
                    self._run(bucket, step)
        self._model = whole
        for num_rows in reversed(self.buckets):  # the largest first: the smaller ones fit into its memory
            bucket = self._of[num_rows]
            for step in bucket.steps:
                graph, made = capture(partial(self._run, bucket, step), self.memory)
                bucket.graphs.append(Captured(graph, *made))
            log.info("CUDA graphs: %d sequences done", num_rows)

    def _run(self, bucket: Bucket, step: Step) -> tuple[Tensor, Tensor]:
        hidden = self._model.forward(self.last_tokens.tokens(bucket.buffers.codes), step)
        logits = self._model.logits(hidden)
        tokens = argmax(logits, bucket.semaphores)
        self.last_tokens.keep(tokens)
        return tokens, logits
