"""MixedGraphs: steps with prompts in them as CUDA graphs, one for each size, without adapters and with.

Launched one by one, a step's kernels take the host 8 to 20 ms, whatever their size: as long as the GPU needs for 512
rows, and beside many answers, which keep the host busy too, for 1024. In a graph, a few prompts cost the answers beside
them little, since a step of few rows waits for the weights.

A graph ends with the hidden states. Whose logits are wanted differs from step to step, and what is behind them is
launched one by one.
"""

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import PagedPlan, WorkList
from kernels.gpu import launch
from worker.adapter_pool import AdapterPool
from worker.graph_capture import capture
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.layers.side_stream import MAX_ROWS, SideStream
from worker.layers.step import Lora, Step
from worker.model_config import ModelConfig
from worker.models.decoder import Decoder
from worker.paged_input import Adapted, StepRows, row_arrays, table_width, tokens_per_tile, work_of
from worker.sequence import ScheduledSequence
from worker.step_buffers import PromptBuffers

log = logging.getLogger(__name__)

# Rows of a step, padding included. An H200's GEMMs of Llama-3.1-8B's shape take, ms a step: 4.0, 4.4, 5.1, 5.8, 6.8,
# 7.7 and 9.6 (743 TFLOP/s); 448 rows take 13.3, 640 take 12.4, 768 15.4, 1024 20.6 and 2048 43.0 (tests/bench/LOG.md).
SIZES = (64, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024)
_MAX_SHORT_PROMPTS = 64  # of a step in a graph: what there are tiles for beyond those that are full


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a replay leaves behind, until the next."""

    states: Tensor  # [num_rows, hidden_size]
    sampled: list[ScheduledSequence]
    sample_rows: Tensor  # int64 [len(sampled)]: of the states


class _Size:
    """The work list of one number of rows, and its graphs."""

    def __init__(self, num_rows: int, pool: AdapterPool | None, max_chunks: int) -> None:
        self.work: WorkList | None = None
        if pool is not None:
            self.work = WorkList(pool.scales, num_rows, max_chunks, launch.block_rows(num_rows))
            self.work.update(num_rows, [])
        self.graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []  # without adapters, with


class MixedGraphs:
    """All sizes up to max_rows."""

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        kv_cache: KVCache,
        pool: AdapterPool | None,
        last_tokens: LastTokens,
        graph_pool: Any,
        *,
        max_rows: int,
        max_sequences: int,
        max_chunks: int,
        max_model_len: int,
    ) -> None:
        """Captures them. max_sequences: in a step; max_chunks: of one adapter; max_model_len: the longest context."""
        self.sizes = (*(size for size in SIZES if size < max_rows), *((max_rows,) if max_rows <= SIZES[-1] else ()))
        # Larger steps of prompts alone have long segments, and take the GPU longer than the host.
        self.sizes_alone = tuple(size for size in self.sizes if not launch.long_rows(size))
        self._model, self._kv_cache, self._pool, self._last_tokens = model, kv_cache, pool, last_tokens
        self._window, self._num_kv_heads = config.sliding_window, config.num_kv_heads
        self._per_tile = tokens_per_tile(config, kv_cache.data.element_size())
        device, most = kv_cache.data.device, self.sizes[-1]
        max_sequences = min(most, max_sequences)
        width = table_width(max_model_len, kv_cache.block_size)
        self._buffers = PromptBuffers(most, max_sequences, self._max_tiles(most), width, device)
        self._semaphores = torch.zeros(max_sequences * self._num_kv_heads, dtype=torch.int32, device=device)
        self._of = {size: _Size(size, pool, max_chunks) for size in self.sizes}
        self._side = SideStream(device)
        self._capture_all(graph_pool)

    def fits(self, rows: StepRows) -> bool:
        """Whether there is a graph for these rows, none of which may have magnitudes or change the embeddings."""
        sizes = self.sizes if rows.decodes else self.sizes_alone
        if not rows.prefills or rows.num_rows not in sizes or not self._buffers.fits(rows):
            return False
        num_tiles = sum(-(-scheduled.num_tokens // self._per_tile) for scheduled in rows.prefills)
        return num_tiles <= self._max_tiles(rows.num_rows)

    def replay(self, rows: StepRows, adapted: list[Adapted]) -> Hidden:
        """Enqueues a step that fits, up to the hidden states."""
        arrays = row_arrays(rows, self._kv_cache.block_size, self._per_tile, self._last_tokens)
        num_sampled = len(arrays.sampled)
        self._buffers.fill(rows, arrays)
        size = self._of[rows.num_rows]
        if adapted:
            assert size.work is not None and self._pool is not None
            size.work.update(rows.num_rows, work_of(adapted, self._pool))
        graph, states = size.graphs[bool(adapted)]
        graph.replay()
        return Hidden(states, arrays.sampled, self._buffers.sample_rows[:num_sampled])

    def _max_tiles(self, num_rows: int) -> int:
        """Of PagedPlan.tiles, in the graphs of so many rows."""
        return -(-num_rows // self._per_tile) + _MAX_SHORT_PROMPTS

    def _steps(self, num_rows: int) -> list[Step]:
        """Without adapters, and with."""
        buffers, size = self._buffers, self._of[num_rows]
        plan = PagedPlan(
            block_tables=buffers.block_tables,
            context_lens=buffers.context_lens,
            num_decodes=min(num_rows, len(buffers.context_lens)),
            num_live=buffers.num_live,
            tiles=buffers.tiles[: self._max_tiles(num_rows)],
            window=self._window,
            semaphores=self._semaphores,
        )
        positions, slots = buffers.positions[:num_rows], buffers.slots[:num_rows]
        base = Step(positions, slots, plan, self._kv_cache.layers, None, has_answers=True)
        if size.work is None or self._pool is None:
            return [base]
        # As an eager step of as many rows has it: with one adapter more it may have to be one, and says the same then.
        lora = Lora(self._pool.chunks, size.work, self._side if num_rows <= MAX_ROWS else None)
        return [base, dataclasses.replace(base, lora=lora)]

    @torch.inference_mode()
    def _capture_all(self, graph_pool: Any) -> None:
        log.info("CUDA graphs: capturing steps with prompts of up to %d rows", self.sizes[-1])
        whole, self._model = self._model, self._model.shallow()
        with launch.compiling():
            for num_rows in self.sizes:
                for step in self._steps(num_rows):
                    self._run(num_rows, step)
        self._model = whole
        for num_rows in reversed(self.sizes):  # the largest first: the smaller ones fit into its memory
            for step in self._steps(num_rows):
                self._of[num_rows].graphs.append(capture(partial(self._run, num_rows, step), graph_pool))
            log.info("CUDA graphs: %d rows with prompts done", num_rows)

    def _run(self, num_rows: int, step: Step) -> Tensor:
        return self._model.forward(self._last_tokens.tokens(self._buffers.codes[:num_rows]), step)
