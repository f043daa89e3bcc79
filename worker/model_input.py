"""Model input: a scheduled batch of sequences as the flat tensors of one step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AttentionPlan, PrefillSpan, Segments
from protocol.messages import BASE_GENERATION
from worker.adapter_pool import AdapterPool
from worker.kv_cache import KVCache
from worker.layers.step import Lora, Step
from worker.sequence import ScheduledSequence


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step: its rows are the scheduled tokens of the first sequence, then of the second, ..."""

    token_ids: Tensor  # int64 [num_tokens]
    step: Step
    sample_rows: Tensor | None  # int64: the rows whose logits are wanted; None: all of them
    fresh_blocks: list[int]  # blocks whose first slot is written in this step


def build_model_input(
    batch: list[ScheduledSequence], kv_cache: KVCache, pool: AdapterPool | None, window: int | None
) -> ModelInput:
    """The tensors of a batch (not empty). window: the model's sliding window, tokens."""
    block_size, device = kv_cache.block_size, kv_cache.data.device
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sample_rows: list[int] = []
    fresh_blocks: list[int] = []
    for scheduled in batch:
        sequence = scheduled.sequence
        start = sequence.num_computed_tokens
        end = start + scheduled.num_tokens
        assert 0 < scheduled.num_tokens <= sequence.num_uncomputed_tokens
        assert end <= len(sequence.block_table) * block_size
        token_ids += sequence.token_ids[start:end]
        positions += range(start, end)
        for position in range(start, end):
            block, offset = sequence.block_table[position // block_size], position % block_size
            slots.append(block * block_size + offset)
            if offset == 0:
                fresh_blocks.append(block)
        if scheduled.samples:
            sample_rows.append(len(token_ids) - 1)
    step = Step(
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        attention=plan_attention(batch, block_size, window, device),
        kv_layers=kv_cache.layers,
        lora=_lora(batch, pool, device),
    )
    rows = None if len(sample_rows) == len(token_ids) else torch.tensor(sample_rows, dtype=torch.int64, device=device)
    return ModelInput(torch.tensor(token_ids, device=device), step, rows, fresh_blocks)


def plan_attention(
    batch: list[ScheduledSequence], block_size: int, window: int | None, device: torch.device
) -> AttentionPlan:
    """How the rows of a batch attend to their sequences' blocks."""
    decode_rows: list[int] = []
    decodes: list[ScheduledSequence] = []
    prefills: list[PrefillSpan] = []
    row = 0
    for scheduled in batch:
        if scheduled.num_tokens == 1:
            decode_rows.append(row)
            decodes.append(scheduled)
        else:
            rows = slice(row, row + scheduled.num_tokens)
            prefills.append(_prefill_span(scheduled, rows, block_size, window, device))
        row += scheduled.num_tokens
    block_tables, mask = _decode_tables(decodes, block_size, window, device)
    is_run = bool(decode_rows) and decode_rows[-1] - decode_rows[0] == len(decode_rows) - 1
    return AttentionPlan(
        decode_rows=slice(decode_rows[0], decode_rows[-1] + 1)
        if is_run
        else torch.tensor(decode_rows, dtype=torch.int64, device=device),
        decode_block_tables=block_tables,
        decode_mask=mask,
        num_decodes=len(decodes),
        prefills=tuple(prefills),
    )


def _context_len(scheduled: ScheduledSequence) -> int:
    """Tokens of the sequence that have KV when this step has run."""
    return scheduled.sequence.num_computed_tokens + scheduled.num_tokens


def _prefill_span(
    scheduled: ScheduledSequence, rows: slice, block_size: int, window: int | None, device: torch.device
) -> PrefillSpan:
    context_len = _context_len(scheduled)
    num_blocks = -(-context_len // block_size)
    mask = None
    if scheduled.num_tokens < context_len or (window is not None and context_len > window):
        seen = torch.ones(scheduled.num_tokens, context_len, dtype=torch.bool, device=device)
        last = context_len - scheduled.num_tokens  # what the first row sees last: itself
        seen = seen.tril(last)
        mask = seen if window is None else seen.triu(last - window + 1)
    block_table = torch.tensor(scheduled.sequence.block_table[:num_blocks], device=device)
    return PrefillSpan(rows, block_table, context_len, mask)


def _decode_tables(
    decodes: list[ScheduledSequence], block_size: int, window: int | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Block tables of equal length, one after the other, and the mask of what stands behind each context's end."""
    if not decodes:
        return torch.empty(0, dtype=torch.int64, device=device), None
    lens = [_context_len(scheduled) for scheduled in decodes]
    num_blocks = -(-max(lens) // block_size)
    flat: list[int] = []
    for scheduled in decodes:
        table = scheduled.sequence.block_table[:num_blocks]
        # Filled up with a block of its own: what one sequence computes never reaches another, not even times zero.
        flat += table + [table[0]] * (num_blocks - len(table))
    slots = torch.arange(num_blocks * block_size, device=device)
    lens_column = torch.tensor(lens, device=device)[:, None, None, None]
    mask = slots < lens_column
    if window is not None:
        mask = mask & (slots >= lens_column - window)
    return torch.tensor(flat, device=device), mask


def _lora(batch: list[ScheduledSequence], pool: AdapterPool | None, device: torch.device) -> Lora | None:
    """The step's adapters; None if every row is the base model's."""
    rows: dict[int, list[int]] = {}
    row = 0
    for scheduled in batch:
        generation = scheduled.sequence.generation
        if generation != BASE_GENERATION:
            rows.setdefault(generation, []).extend(range(row, row + scheduled.num_tokens))
        row += scheduled.num_tokens
    if not rows:
        return None
    assert pool is not None, "an adapter's sequence came to a worker without adapters"
    residents = [pool.resident(generation) for generation in rows]
    return Lora(
        pool.chunks,
        Segments.of(
            list(rows.values()),
            [resident.chunk_ids for resident in residents],
            [resident.scales for resident in residents],
            device,
        ),
    )
