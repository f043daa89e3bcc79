"""Model input: a scheduled batch of sequences as the flat tensors of one step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AttentionPlan, DecodeGroup, Edges, PrefillSpan, Segments, Tokens, kv_rows
from worker.adapter_pool import AdapterPool, ResidentAdapter, ResidentMix
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.layers.step import Lora, Step
from worker.sequence import BASE_CONTENT, ScheduledSequence
from worker.step_extras import edges_of, rescaled_of


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step: its rows are the scheduled tokens of the first sequence, then of the second, ..."""

    tokens: Tokens
    step: Step
    sample_rows: Tensor | None  # int64: the rows whose logits are wanted; None: all of them
    fresh_blocks: list[int]  # blocks whose first slot is written in this step


def build_model_input(
    batch: list[ScheduledSequence],
    kv_cache: KVCache,
    lora: Lora | None,
    window: int | None,
    last_tokens: LastTokens,
    edges: Edges | None = None,
) -> ModelInput:
    """The tensors of a batch (not empty). window: the model's sliding window, tokens."""
    block_size, device = kv_cache.block_size, kv_cache.data.device
    codes: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    sample_rows: list[int] = []
    fresh_blocks: list[int] = []
    for scheduled in batch:
        sequence = scheduled.sequence
        start, end = scheduled.start, scheduled.end
        assert start < end <= len(sequence.block_table) * block_size
        codes += last_tokens.codes(scheduled)
        positions += range(start, end)
        for position in range(start, end):
            block = sequence.block_table[position // block_size]
            blocks.append(block)
            if position % block_size == 0:
                fresh_blocks.append(block)
        if scheduled.samples:
            sample_rows.append(len(codes) - 1)
    positions_tensor = torch.tensor(positions, device=device)
    step = Step(
        positions=positions_tensor,
        slot_mapping=(torch.tensor(blocks, device=device), positions_tensor % block_size),
        attention=plan_attention(batch, kv_cache, window),
        kv_layers=kv_cache.layers,
        lora=lora,
        edges=edges,
    )
    rows = None if len(sample_rows) == len(codes) else torch.tensor(sample_rows, dtype=torch.int64, device=device)
    return ModelInput(last_tokens.tokens(torch.tensor(codes, device=device)), step, rows, fresh_blocks)


def plan_attention(batch: list[ScheduledSequence], kv_cache: KVCache, window: int | None) -> AttentionPlan:
    """How the rows of a batch attend to their sequences' blocks."""
    decodes: dict[int, list[tuple[int, ScheduledSequence]]] = {}
    prefills: list[PrefillSpan] = []
    row = 0
    for scheduled in batch:
        if scheduled.num_tokens == 1:
            decodes.setdefault(_length_class(scheduled), []).append((row, scheduled))
        else:
            rows = slice(row, row + scheduled.num_tokens)
            prefills.append(_prefill_span(scheduled, rows, kv_cache, window))
        row += scheduled.num_tokens
    groups = tuple(_decode_group(group, kv_cache, window) for group in decodes.values())
    return AttentionPlan(groups, tuple(prefills))


def _length_class(scheduled: ScheduledSequence) -> int:
    """Decodes of one class attend together, each at the cost of the longest: contexts up to 256, 512, 1024, ..."""
    return max(8, (scheduled.end - 1).bit_length())


def _decode_group(group: list[tuple[int, ScheduledSequence]], kv_cache: KVCache, window: int | None) -> DecodeGroup:
    """A group from its rows and sequences."""
    sequences = [scheduled for _, scheduled in group]
    lens = [scheduled.end for scheduled in sequences]
    return DecodeGroup(
        rows=torch.tensor([row for row, _ in group], device=kv_cache.data.device),
        kv_rows=kv_rows(_decode_tables(sequences, max(lens), kv_cache), kv_cache.layers[0]),
        context_len=max(lens),
        mask=_decode_mask(lens, window, kv_cache.data),
    )


def _prefill_span(scheduled: ScheduledSequence, rows: slice, kv_cache: KVCache, window: int | None) -> PrefillSpan:
    context_len, device = scheduled.end, kv_cache.data.device
    mask = None
    if scheduled.num_tokens < context_len or (window is not None and context_len > window):
        seen = torch.ones(scheduled.num_tokens, context_len, dtype=torch.bool, device=device)
        last = context_len - scheduled.num_tokens  # what the first row sees last: itself
        seen = seen.tril(last)
        mask = seen if window is None else seen.triu(last - window + 1)
    num_blocks = -(-context_len // kv_cache.block_size)
    block_table = torch.tensor(scheduled.sequence.block_table[:num_blocks], device=device)[None]
    return PrefillSpan(rows, kv_rows(block_table, kv_cache.layers[0]), context_len, mask)


def _decode_tables(decodes: list[ScheduledSequence], longest: int, kv_cache: KVCache) -> Tensor:
    """Block tables of equal length: int64 [num_decodes, num_blocks]."""
    num_blocks = -(-longest // kv_cache.block_size)
    flat: list[int] = []
    for scheduled in decodes:
        table = scheduled.sequence.block_table[:num_blocks]
        # Filled up with a block of its own: what one sequence computes never reaches another, not even times zero.
        flat += table + [table[0]] * (num_blocks - len(table))
    return torch.tensor(flat, device=kv_cache.data.device).view(len(decodes), num_blocks)


def _decode_mask(lens: list[int], window: int | None, like: Tensor) -> Tensor | None:
    """0 where a decode sees a token, -inf elsewhere, in like's dtype and device; None if all see all."""
    longest = max(lens)
    if min(lens) == longest and (window is None or longest <= window):
        return None
    tokens = torch.arange(longest, device=like.device)
    lens_column = torch.tensor(lens, device=like.device)[:, None, None, None]
    hidden = tokens >= lens_column
    if window is not None:
        hidden |= tokens < lens_column - window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


class LoraPlanner:
    """Works out a step's adapters, and keeps the last step's: a batch that goes on decoding has the same ones."""

    def __init__(self, pool: AdapterPool | None) -> None:
        self._pool = pool
        self._key: object = None
        self._planned: tuple[Lora | None, Edges | None] = (None, None)

    def plan(self, batch: list[ScheduledSequence]) -> tuple[Lora | None, Edges | None]:
        """What the step's adapters have in the layers, and at the edges; nothing if every row is the base model's."""
        shape = [(scheduled.sequence.content, scheduled.num_tokens) for scheduled in batch]
        contents = dict.fromkeys(content for content, _ in shape if content != BASE_CONTENT)
        if not contents:
            return None, None
        assert self._pool is not None, "an adapter's sequence came to a worker without adapters"
        residents = {number: self._pool.resident_or_mix(number) for number in contents}
        key = (shape, [resident.all_chunk_ids for resident in residents.values()])
        if self._key != key:
            rows = _rows_by_content(shape)
            self._planned = self._lora(residents, rows), edges_of(rows, self._pool)
            self._key = key
        return self._planned

    def _lora(self, residents: Mapping[int, ResidentAdapter | ResidentMix], rows: dict[int, list[int]]) -> Lora | None:
        assert self._pool is not None
        layered = {number: resident for number, resident in residents.items() if resident.chunk_ids}
        if not layered:
            return None
        segments = Segments.of(
            [rows[number] for number in layered],
            [resident.chunk_ids for resident in layered.values()],
            [resident.scales for resident in layered.values()],
            self._pool.chunks.device,
        )
        return Lora(self._pool.chunks, segments, rescaled=rescaled_of(rows, self._pool))


def _rows_by_content(shape: list[tuple[int, int]]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    row = 0
    for content, num_tokens in shape:
        rows.setdefault(content, []).extend(range(row, row + num_tokens))
        row += num_tokens
    return rows
