"""What the device is told of a step: the same from a graph's buffers as from an eager step's tensors."""

import random
from array import array
from pathlib import Path

import pytest
import torch

from protocol.sampling import SamplingParams
from tests.tiny_models import write_tiny_model
from tests.worker.driver import CPU
from worker import step_buffers
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import LoraWeight, pack_adapter
from worker.chunk_layout import ChunkLayout
from worker.decode_graphs import Bucket
from worker.kv_cache import KVCache
from worker.last_tokens import LastTokens
from worker.paged_input import eager_step, lay_out
from worker.sequence import Sequence
from worker.step_buffers import BlockTables, StepBuffers
from worker.transfer import Download, upload_arrays
from worker.weights import load_model

VOCAB_SIZE, BLOCK_SIZE = 100, 4


def sequence(number: int, num_tokens: int, *, num_pending: int = 0) -> Sequence:
    """All but its last token are computed, in blocks of its own."""
    sampling = SamplingParams(max_tokens=50)
    made = Sequence(number, [number] * (num_tokens - num_pending), 1, sampling, 0, num_pending=num_pending)
    made.block_table = list(range(40 * number, 40 * number + -(-num_tokens // BLOCK_SIZE)))
    made.num_computed_tokens = num_tokens - 1
    return made


def test_codes_become_the_tokens_that_are_known_and_those_that_are_not() -> None:
    last = LastTokens(VOCAB_SIZE, 4, CPU)
    last.keep(torch.tensor([7, -1, 9]))
    last.set_rows({11: 2, 12: 1})
    codes = [*last.codes(sequence(3, 5).share(1)), *last.codes(sequence(11, 6, num_pending=1).share(1))]
    codes += last.codes(sequence(12, 2, num_pending=1).share(1))
    assert last.tokens(torch.tensor(codes)).ids().tolist() == [3, 9, 0], "what was no number is read as token 0"
    with pytest.raises(KeyError):
        last.codes(sequence(13, 6, num_pending=1).share(1))


def test_a_graphs_buffers_hold_what_an_eager_step_is_told(tmp_path: Path) -> None:
    _, config = load_model(write_tiny_model(tmp_path / "model", "llama3"), torch.float32, CPU)
    cache = KVCache(1, BLOCK_SIZE, config.num_layers, config.num_kv_heads, config.head_dim, torch.float32, CPU)
    last = LastTokens(VOCAB_SIZE, 8, CPU)
    buffers = StepBuffers(8, 64, BLOCK_SIZE, CPU)
    rng = random.Random(2)
    sequences = [sequence(number, rng.randint(1, 30)) for number in range(1, 9)]
    for _ in range(40):  # sequences come, go, grow, change places, and give their blocks up
        last.set_rows({s.sequence_id: row for row, s in enumerate(sequences)})
        shares = [s.share(1) for s in rng.sample(sequences, rng.randint(1, 8))]
        eager = eager_step(lay_out(shares, (8,)), cache, config, last)
        buffers.fill(shares, last)
        plan = eager.step.attention
        assert torch.equal(buffers.codes, eager.codes)
        assert torch.equal(buffers.positions, eager.step.positions)
        assert torch.equal(buffers.slots, eager.step.slot_mapping)
        assert torch.equal(buffers.context_lens[: len(shares)], plan.context_lens)
        assert buffers.num_live.tolist() == plan.num_live.tolist() == [len(shares)]
        for row, share in enumerate(shares):
            num_blocks = len(share.sequence.block_table)
            assert buffers.block_tables[row, :num_blocks].tolist() == share.sequence.block_table
            assert plan.block_tables[row, :num_blocks].tolist() == share.sequence.block_table
        grown = shares[0].sequence  # its next token is known, or still on the device
        grown.token_ids += [5] * (grown.num_pending + rng.randrange(2))
        grown.num_computed_tokens += 1
        grown.num_pending = grown.num_computed_tokens + 1 - len(grown.token_ids)
        if grown.num_tokens > len(grown.block_table) * BLOCK_SIZE:
            grown.block_table.append(900 + len(grown.block_table))
        if rng.random() < 0.2:
            grown.block_table[:] = rng.sample(range(1000), len(grown.block_table))


def test_what_did_not_reach_the_device_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose block tables or adapters could not be sent is done in another way; the next must not build on it."""
    tables = BlockTables(2, 16, CPU)
    before, after = [sequence(1, 9).share(1)], [sequence(2, 5).share(1)]
    tables.fill(before)
    with monkeypatch.context() as patch:
        patch.setattr(step_buffers, "upload", _fail)
        with pytest.raises(MemoryError):
            tables.fill(after)
    tables.fill(after)
    assert tables.on_device[0, :2].tolist() == after[0].sequence.block_table

    pool = AdapterPool(ChunkLayout.of(1, 8, 8, 8, 8), 4, torch.float32, CPU)
    cache = KVCache(1, BLOCK_SIZE, 1, 1, 8, torch.float32, CPU)
    bucket = Bucket(4, 16, cache, None, pool, 1, None, False)  # type: ignore[arg-type]
    for generation in (1, 2):
        weights = {(0, "q_proj"): LoraWeight(torch.ones(1, 8), torch.ones(8, 1), float(generation))}
        pool.upload(generation, pack_adapter(pool.layout, weights, torch.float32, ""), [generation])
    first, second = [(1, (1,), [0])], [(2, (2,), [0, 1])]
    bucket.set_adapters(first, None)
    work = bucket.work
    assert work is not None
    expected = [table.clone() for table in (work.short.records, work.short.scales)]
    with monkeypatch.context() as patch:  # half of it is there
        patch.setattr(work.short, "_fill_mixes", _fail)
        with pytest.raises(MemoryError):
            bucket.set_adapters(second, None)
    assert not torch.equal(work.short.records, expected[0])
    bucket.set_adapters(first, None)
    assert torch.equal(work.short.records, expected[0]) and torch.equal(work.short.scales[0], expected[1][0])


def _fail(*args: object) -> None:
    raise MemoryError


def test_arrays_travel_together_and_tensors_come_back() -> None:
    arrays = [array("q", [1, -2, 3]), array("i"), array("i", range(33)), array("q", [2**40])]
    tensors = upload_arrays(arrays, CPU)
    assert [tensor.tolist() for tensor in tensors] == [list(values) for values in arrays]
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.int32, torch.int32, torch.int64]
    download = Download(tensors)
    for tensor in tensors:
        tensor.zero_()  # as the next step would
    assert [t.tolist() for t in download.wait()] == [list(values) for values in arrays]
    assert Download([]).wait() == []
