"""One memory for KV and adapters under a tiny model: whatever pushes whatever out, every answer is what it is alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.messages import LoadAdapter, UnloadAdapter
from tests.tiny_models import write_tiny_model
from tests.worker.fakes import MODEL, OWNER, Harness, generate
from tests.worker.recorded_copies import Recorded
from worker.adapter_pool import AdapterPool
from worker.adapter_targets import EMBEDDINGS, HEAD, Place
from worker.adapter_weights import LoraWeight, PackedAdapter, Rescale, module_shape, pack_adapter
from worker.chunk_layout import ChunkLayout
from worker.config import WorkerConfig
from worker.device import find_target
from worker.device_memory import DeviceMemory
from worker.engine import Engine
from worker.kv_cache import KVCache
from worker.mailbox import Admin, Start
from worker.memory import MemoryPlan
from worker.model_runner import ModelRunner
from worker.weights import load_model

CPU = torch.device("cpu")
# d has magnitudes as DoRA has, e changes the embeddings and the head and nothing else.
RANKS = {"a": 16, "b": 20, "c": 8, "d": 16, "e": 20}
CHUNKS = {"a": 1, "b": 2, "c": 1, "d": 2, "e": 2}
MODULES = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")


class RandomAdapters:
    """A loader whose sources are names; each is a random adapter, the same whenever it is asked."""

    def __init__(self, layout: ChunkLayout) -> None:
        self._layout = layout
        self.num_reloads = 0

    def load(self, source: str, trusted: bool, cancelled: object = None) -> PackedAdapter:
        draw, weights, rescales = torch.Generator().manual_seed(ord(source)), {}, {}
        places = [(layer, module) for layer in range(self._layout.num_layers) for module in MODULES]
        for place in [EMBEDDINGS, HEAD] if source == "e" else places:
            weights[place] = self._weight(place, RANKS[source], draw)
            if source == "d":
                factor, shift = torch.rand(2, module_shape(self._layout, place[1])[1], generator=draw) * 0.6 - 0.3
                rescales[place] = Rescale(factor, shift)
        packed = pack_adapter(self._layout, weights, torch.float32, source, rescales)
        assert len(packed.chunks) == CHUNKS[source]
        return packed

    def _weight(self, place: Place, rank: int, draw: torch.Generator) -> LoraWeight:
        num_in, num_out = module_shape(self._layout, place[1])
        a, b = torch.randn(rank, num_in, generator=draw), torch.randn(num_out, 1, generator=draw)
        size = 1.0 if place == EMBEDDINGS else num_in**-0.5  # of which one column is looked up
        return LoraWeight(a * size, b.expand(-1, rank) * 0.1, 0.5)

    def reload(self, digest: str) -> PackedAdapter:
        self.num_reloads += 1
        return self.load(digest, trusted=True)

    def release(self, digest: str) -> None:
        pass


def engine_with_model(
    model_dir: Path, num_spare: int, *, max_chunks: int = 4, **limits: Any
) -> tuple[Harness, DeviceMemory]:
    """Pages for max_chunks, which all adapters but d and e need four of, for one context, and num_spare more."""
    model, config = load_model(model_dir, torch.float32, CPU)
    target = find_target(WorkerConfig(device="cpu", block_size=4))
    chunk_bytes = config.chunk_layout().chunk_size * 4
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    blocks_per_page = -(-chunk_bytes // KVCache.block_bytes(4, *shape, torch.float32))
    num_pages = max_chunks + -(-256 // (4 * blocks_per_page)) + num_spare
    plan = MemoryPlan(num_pages, blocks_per_page, num_pages * blocks_per_page, max_chunks, 256)
    memory = DeviceMemory.of(plan, config, target)
    memory.kv_cache.data.fill_(torch.nan)
    harness = Harness(
        num_blocks=plan.max_blocks,
        num_chunks=max_chunks,
        max_prefill_tokens=64,
        arena=memory.arena,
        pool=memory.pool,
        loader=RandomAdapters(config.chunk_layout()),
        **limits,
    )
    harness.engine = Engine(
        MODEL, ModelRunner(model, config, memory.kv_cache, memory.pool), harness.scheduler, harness.blocks,
        harness.adapters, harness.inbox, harness.outbox, harness.mail.extend, max_loras_per_batch=2, runs_ahead=True,
        clock=lambda: harness.now,
    )  # fmt: skip
    for name in RANKS:
        harness.put(Admin(OWNER, LoadAdapter(request_id=900, name=name, source=name)))
        harness.drain()
    return harness, memory


def ask(harness: Harness, request_id: int, generation: int, num_prompt: int, num_tokens: int = 12) -> None:
    prompt = [5 + (request_id % 12 * 31 + 7 * i) % 300 for i in range(num_prompt)]
    fields = {"temperature": 0.0, "ignore_eos": True, "generation": generation}
    harness.put(Start(OWNER, generate(request_id, prompt, num_tokens, **fields)))


# Request → generation and prompt length; each prompt comes three times.
ASKED = {i: (i % 6, 20 + 37 * (i % 12 // 2)) for i in range(36)}


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> dict[int, list[int]]:
    plenty, _ = engine_with_model(model_dir, 60, max_chunks=8, max_loaded=5)
    for request_id, (generation, num_prompt) in ASKED.items():
        ask(plenty, request_id, generation, num_prompt)
        plenty.drain()
    assert plenty.adapters.num_uploads == len(RANKS)
    return {request_id: plenty.tokens(request_id) for request_id in ASKED}


@pytest.mark.parametrize("max_loaded", [3, 2])
def test_kv_and_adapters_fight_and_every_answer_is_what_it_is_with_plenty(
    model_dir: Path, expected: dict[int, list[int]], max_loaded: int
) -> None:
    tight, memory = engine_with_model(model_dir, 0, max_loaded=max_loaded)
    for request_id, (generation, num_prompt) in ASKED.items():
        ask(tight, request_id, generation, num_prompt)
        tight.step(request_id % 3)
    tight.drain()
    assert tight.adapters.num_uploads > len(RANKS), "adapters were pushed out"
    assert tight.scheduler.num_prefix_hits > 0, "and cached prefixes were found while there was room"
    for request_id in ASKED:
        assert tight.tokens(request_id) == expected[request_id]
    unload_all(tight, memory)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_plain_and_rare_adapters_in_turns_with_some_fetched_ahead(
    model_dir: Path, expected: dict[int, list[int]], seed: int
) -> None:
    rng = random.Random(seed)
    limits = {"max_loaded": rng.randint(2, 5), "max_running": rng.randint(1, 4), "max_loras_per_batch": 3}
    harness, memory = engine_with_model(
        model_dir, rng.choice([0, 2, 9]), max_chunks=rng.randint(4, 8), is_fair=seed % 3 > 0, **limits
    )
    for request_id in rng.sample(list(ASKED), len(ASKED)):
        ask(harness, request_id, *ASKED[request_id])
        harness.step(rng.choice([0, 1, 5]))
        harness.now += 0.1
    harness.drain()
    for request_id in ASKED:
        assert harness.tokens(request_id) == expected[request_id]
    unload_all(harness, memory)


def unload_all(harness: Harness, memory: DeviceMemory) -> None:
    """After that, nothing of the arena is in use."""
    for name in RANKS:
        harness.put(Admin(OWNER, UnloadAdapter(request_id=901, name=name, timeout_ms=0)))
        harness.drain()
    arena, listed = memory.arena, harness.cache.memory(1, 0)
    assert listed.chunks_free == listed.chunks_total and listed.host_adapters == 0
    assert arena.num_free_pages + arena.num_unused_pages == arena.num_pages
    arena.check_integrity([])


def test_on_a_gpu_a_page_changes_hands_behind_whoever_may_still_touch_it() -> None:
    layout = ChunkLayout.of(1, 8, 8, 8, 8)
    copies = Recorded()
    pool = AdapterPool(layout, 2, torch.float32, CPU, torch.zeros(2, layout.chunk_size + 3).view(-1), copies)
    weights = {(0, "q_proj"): LoraWeight(torch.ones(17, 8), torch.ones(8, 17), 1.0)}
    packed = pack_adapter(layout, weights, torch.float32, "")
    pool.upload(1, packed, [1, 0])
    assert copies.log == ["copies wait for steps", "copy", "event 0"], "steps may still write KV there"
    assert not pool.is_ready(1)
    pool.remove(1)
    assert copies.log[3:] == ["steps wait for 0"], "steps may write KV there, and the copy is on its way"
    pool.upload(2, packed, [0, 1], behind_steps=False)
    assert copies.log[4:] == ["copy", "event 1"]
    copies.events[1].is_done = True
    assert pool.is_ready(2)
    del copies.log[:]
    pool.remove(2)
    assert copies.log == []
    broken = PackedAdapter(32, (), torch.zeros(2, 7).unbind(), packed.scales, "")
    with pytest.raises(RuntimeError):
        pool.upload(3, broken, [0, 1])
    assert copies.log == ["copies wait for steps", "copy", "event 2", "steps wait for 2"], "a part may be on its way"
    pool.upload(4, packed, [0, 1])
