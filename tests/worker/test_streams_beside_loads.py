"""Streams beside adapters that are loaded, replaced and unloaded all the time, under a tiny model in float32.

On a GPU, where the kernels run with CUDA graphs and one step ahead, and on the CPU. There as here steps and copies are
late: on the GPU both wait a while at random, each on its stream, so that what does not wait for the other overtakes it;
on the CPU a copy is done only when it has been asked for a few times, or steps are told to wait for it.
"""

import contextlib
import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.messages import AdapterReply, FinishReason, LoadAdapter, UnloadAdapter
from tests.tiny_models import write_tiny_model
from tests.worker.fakes import MODEL, OWNER, Harness, generate
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import LoraWeight, PackedAdapter, module_shape, pack_adapter
from worker.chunk_layout import MODULES, ChunkLayout
from worker.config import WorkerConfig
from worker.copy_stream import CopyStream
from worker.device import Target, find_target
from worker.device_memory import DeviceMemory
from worker.engine import Engine
from worker.host_arena import HostArena, pin_memory
from worker.kv_cache import KVCache
from worker.mailbox import Admin, Cancel, Start
from worker.memory import MemoryPlan
from worker.model_config import ModelConfig
from worker.model_runner import ModelRunner
from worker.models.decoder import Decoder
from worker.sequence import ScheduledSequence
from worker.step_pipeline import LaunchedStep, Runner
from worker.weights import load_model

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
BLOCK_SIZE = 16
MAX_MODEL_LEN = 128
MAX_LORAS = 4
MAX_CHUNKS = 8
CHUNKS = (1, 1, 2, 3)  # of an adapter, by its content
STEADY = [f"steady-{content}" for content in range(8)]  # 14 chunks in all
GUESTS = ["guest-0", "guest-1", "guest-2"]  # names that come and go
GUEST_CONTENTS = range(8, 18)
FIRST_SEED = 700  # so that nowhere two tokens are almost alike: see LEAST_GAP
NUM_PROMPTS = 4
NUM_TOKENS = 24
STOPS = list(range(0, 320, 8))
MOST_CANCELS = 15
SEEDS = [0, 5, 13, 15]  # of histories in which a pool that waits for no copy, or lets go of what it reads, is seen
LEAST_GAP = 3e-4  # nats between the best two tokens, anywhere: what float32 rounds is much less
GPU_CYCLES = 2_000_000  # about a millisecond, which is longer than a step takes

Expected = dict[tuple[int, int], list[int]]  # by content (-1: the base model) and prompt


class RandomAdapters:
    """A loader whose sources are numbers; each is a random adapter, the same whenever it is asked."""

    def __init__(self, layout: ChunkLayout, device: torch.device) -> None:
        self._layout = layout
        self._arena = HostArena(layout, torch.float32, pin_memory if device.type == "cuda" else None)

    def load(self, source: str, trusted: bool, cancelled: object = None) -> PackedAdapter:
        content = int(source)
        num_chunks, draw, weights = (
            CHUNKS[content % len(CHUNKS)],
            torch.Generator().manual_seed(FIRST_SEED + content),
            {},
        )
        for layer in range(self._layout.num_layers):
            for module in MODULES[content % 2 :: 2] if content % 3 else MODULES:
                num_in, num_out = module_shape(self._layout, module)
                a = torch.randn(16 * num_chunks, num_in, generator=draw) * num_in**-0.5
                b = torch.randn(num_out, 16 * num_chunks, generator=draw) * (16 * num_chunks) ** -0.5
                weights[layer, module] = LoraWeight(a, b, 0.5)
        packed = pack_adapter(self._layout, weights, torch.float32, source)
        room = self._arena.take(num_chunks)
        for place, chunk in zip((*room.chunks, room.scales), (*packed.chunks, packed.scales), strict=True):
            place.copy_(chunk)
        return dataclasses.replace(packed, chunks=room.chunks, scales=room.scales, room=room)

    def reload(self, digest: str) -> PackedAdapter:
        return self.load(digest, trusted=True)

    def release(self, digest: str) -> None:
        pass


@dataclass(eq=False)
class Arrival:
    """An event of LateCopies."""

    copies: "LateCopies"
    num_to_ask: int

    def query(self) -> bool:
        self.num_to_ask -= 1
        if self.num_to_ask < 0:
            self.copies.run_until(self)
        return self not in self.copies.queue


@dataclass(eq=False)
class LateCopies(CopyStream):
    """A stream on the CPU, whose steps run when they are launched: copies and events, in order."""

    rng: random.Random
    queue: deque[Callable[[], object] | Arrival] = field(default_factory=deque)

    def run_until(self, event: Arrival) -> None:
        while event in self.queue:
            item = self.queue.popleft()
            if not isinstance(item, Arrival):
                item()

    def wait_for_steps(self) -> None:
        pass

    def copying(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self) -> Arrival:  # type: ignore[override]
        self.queue.append(Arrival(self, self.rng.choice([0, 4, 40])))
        return self.queue[-1]  # type: ignore[return-value]

    def hold_steps(self, event: Arrival) -> None:  # type: ignore[override]
        self.run_until(event)


class LatePool(AdapterPool):
    """Whose copies go through LateCopies."""

    def _copy(self, packed: PackedAdapter, chunk_ids: Any) -> Tensor:
        assert isinstance(self._copies, LateCopies)
        # What keeps the memory that it is copied from is the pool's business.
        self._copies.queue.append(partial(super()._copy, dataclasses.replace(packed, room=None), chunk_ids))
        return self.scales[chunk_ids[0]]


class GpuCopies(CopyStream):
    """Some begin late."""

    def __init__(self, device: torch.device, rng: random.Random) -> None:
        super().__init__(device)
        self._rng = rng

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        with super().copying():
            torch.cuda._sleep(self._rng.choice([0, 0, GPU_CYCLES, 4 * GPU_CYCLES]))
            yield


class GpuSteps:
    """A runner some of whose steps begin late, so that they still run when the host has gone on."""

    def __init__(self, runner: Runner, rng: random.Random) -> None:
        self._runner, self._rng = runner, rng

    def launch(self, batch: list[ScheduledSequence]) -> LaunchedStep:
        torch.cuda._sleep(self._rng.choice([0, 0, GPU_CYCLES]))
        return self._runner.launch(batch)

    def drain(self) -> None:
        self._runner.drain()


def late_pool(memory: DeviceMemory, layout: ChunkLayout, device: torch.device, rng: random.Random) -> AdapterPool:
    flat = memory.kv_cache.data.view(-1)
    if device.type == "cuda":
        return AdapterPool(layout, memory.arena.num_pages, torch.float32, device, flat, GpuCopies(device, rng))
    return LatePool(layout, memory.arena.num_pages, torch.float32, device, flat, LateCopies(rng))


def make_runner(
    model: Decoder, config: ModelConfig, memory: DeviceMemory, target: Target, rng: random.Random
) -> Runner:
    if not target.uses_triton:
        return ModelRunner(model, config, memory.kv_cache, memory.pool)
    from worker.decode_graphs import DecodeGraphs
    from worker.last_tokens import LastTokens
    from worker.mixed_graphs import MixedGraphs
    from worker.triton_runner import TritonRunner

    state = (model, config, memory.kv_cache, memory.pool, LastTokens(config.vocab_size, 64, target.device))
    sizes = {"max_chunks": max(CHUNKS), "max_model_len": MAX_MODEL_LEN}
    graphs = DecodeGraphs(*state, max_rows=16, **sizes)
    mixed = MixedGraphs(*state, graphs.memory, max_rows=64, max_sequences=64, **sizes)
    runner = TritonRunner(*state[:4], max_chunks=max(CHUNKS), graphs=graphs, mixed=mixed)
    return GpuSteps(runner, rng)


def engine_on(
    device: str, model_dir: Path, seed: int, num_spare: int, max_chunks: int, max_loaded: int
) -> tuple[Harness, DeviceMemory]:
    """An engine with pages for max_chunks, for one context, and num_spare more. What no one wrote is NaN."""
    rng = random.Random(seed)
    target = find_target(WorkerConfig(device=device, dtype="float32", block_size=BLOCK_SIZE))
    model, config = load_model(model_dir, torch.float32, target.device, ops=target.ops)
    layout = config.chunk_layout()
    block_bytes = KVCache.block_bytes(
        BLOCK_SIZE, config.num_layers, config.num_kv_heads, config.head_dim, torch.float32
    )
    per_page = -(-layout.chunk_size * 4 // block_bytes)
    num_pages = max_chunks + -(-MAX_MODEL_LEN // (BLOCK_SIZE * per_page)) + num_spare
    plan = MemoryPlan(num_pages, per_page, num_pages * per_page, max_chunks, MAX_MODEL_LEN)
    memory = DeviceMemory.of(plan, config, target)
    memory.kv_cache.data.fill_(torch.nan)
    memory = dataclasses.replace(memory, pool=late_pool(memory, layout, target.device, rng))
    runner = make_runner(model, config, memory, target, rng)
    harness = Harness(
        num_blocks=plan.max_blocks,
        block_size=BLOCK_SIZE,
        num_chunks=max_chunks,
        max_prefill_tokens=64,
        max_loaded=max_loaded,
        max_loras_per_batch=MAX_LORAS,
        arena=memory.arena,
        pool=memory.pool,
        loader=RandomAdapters(layout, target.device),
    )
    harness.engine = Engine(
        MODEL, runner, harness.scheduler, harness.blocks, harness.adapters, harness.inbox, harness.outbox,
        harness.mail.extend, max_loras_per_batch=MAX_LORAS, runs_ahead=True, clock=lambda: harness.now,
    )  # fmt: skip
    harness.engine._steps._run_one_by_one = harness._refuse_failure  # type: ignore[method-assign]
    return harness, memory


class Client:
    """Loads and asks, and remembers which content it has loaded where, and what it has asked of it."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.loaded: dict[str, int] = {}  # names and their contents
        self.asked: dict[int, tuple[int, int]] = {}  # by request: content and prompt
        self.cancelled: set[int] = set()
        self._num_commands = 0

    def load(self, name: str, content: int, pinned: bool = False) -> None:
        """Also in another's place."""
        self._num_commands += 1
        is_new = name not in self.loaded
        command = LoadAdapter(
            request_id=self._num_commands, name=name, source=str(content), pinned=pinned, replace=not is_new
        )
        self._admin(command)
        self.loaded[name] = content

    def unload(self, name: str, force: bool = False) -> None:
        self._num_commands += 1
        self._admin(UnloadAdapter(request_id=self._num_commands, name=name, timeout_ms=0, force=force))
        del self.loaded[name]

    def _admin(self, command: LoadAdapter | UnloadAdapter) -> None:
        self.harness.put(Admin(OWNER, command))
        while command.request_id not in (replies := self._replies()):
            self.harness.step()
        assert replies[command.request_id].error is None

    def _replies(self) -> dict[int, AdapterReply]:
        return {reply.request_id: reply for reply in self.harness.events(AdapterReply)}

    def ask(self, name: str | None, prompt: int, **more: Any) -> int:
        """Returns the request's id. None: the base model."""
        request_id = len(self.asked)
        adapter = self.harness.cache.named(name) if name else None
        fields = {"temperature": 0.0, "ignore_eos": True, "generation": adapter.generation if adapter else 0} | more
        # The prompts have a beginning of two blocks in common, which only the same content may find computed.
        token_ids = [5 + 7 * i % 300 for i in range(40)] + [3 + 29 * prompt, 9 + prompt]
        self.harness.put(Start(OWNER, generate(request_id, token_ids, NUM_TOKENS, **fields)))
        self.asked[request_id] = (self.loaded[name] if name else -1, prompt)
        return request_id

    def cancel(self, request_id: int) -> None:
        self.harness.put(Cancel(OWNER, request_id))
        self.cancelled.add(request_id)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Expected:
    """What the CPU says under every content to every prompt, in quiet: all are there, and nothing comes or goes."""
    contents = [*range(len(STEADY)), *GUEST_CONTENTS]
    harness, _ = engine_on("cpu", model_dir, 0, 60, 40, max_loaded=20)
    client = Client(harness)
    for content in contents:
        client.load(str(content), content)
    for name in [*map(str, contents), None]:
        for prompt in range(NUM_PROMPTS):
            client.ask(name, prompt, logprobs=2)
    harness.drain()
    assert harness.adapters.num_uploads == len(contents)
    answers = {asked: harness.tokens(request_id) for request_id, asked in client.asked.items()}
    assert len({tuple(answer) for answer in answers.values()}) == len(answers), "each says something else"
    tops = [output.logprobs[0].top for i in client.asked for output in harness.outputs(i) if output.logprobs]
    assert len(tops) == NUM_TOKENS * len(answers)
    assert min(best - next_best for (_, best), (_, next_best) in tops) > LEAST_GAP
    return answers


def a_turn(client: Client, rng: random.Random, may_ask: bool) -> None:
    """One thing that happens beside the streams."""
    name = rng.choice(GUESTS)
    content = rng.choice(GUEST_CONTENTS)
    pinned = CHUNKS[content % len(CHUNKS)] == 1 and rng.random() < 0.5  # so that a place is left for the largest
    match rng.choice(["load", "load", "pass by", "pass by", "ask", "ask", "cancel", "unload", "force"]):
        case "load" | "pass by" as kind:
            client.load(name, content, pinned)
            if kind == "pass by":  # before it has come to the device
                client.unload(name)
        case "ask" if may_ask and name in client.loaded:
            client.ask(name, rng.randrange(NUM_PROMPTS))
        case "cancel" if len(client.cancelled) < MOST_CANCELS:
            client.cancel(rng.choice(list(client.asked)[-12:]))
        case "unload" | "force" as kind if name in client.loaded:
            client.unload(name, force=kind == "force")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_stream_is_what_it_is_in_quiet(device: str, model_dir: Path, expected: Expected, seed: int) -> None:
    rng = random.Random(seed)
    harness, memory = engine_on(device, model_dir, seed, seed % 4, MAX_CHUNKS, max_loaded=(7, 4)[seed % 2])
    client = Client(harness)
    for content, name in enumerate(STEADY):
        client.load(name, content)
    steady = rng.sample([*STEADY, None] * 10, 90)
    while steady or harness.scheduler.running or harness.scheduler.waiting:
        while steady and len(harness.scheduler.running) + len(harness.scheduler.waiting) < 12:
            # Some end where it is not known before: then the step behind is on its way already.
            client.ask(steady.pop(), rng.randrange(NUM_PROMPTS), stop_token_ids=STOPS if rng.random() < 0.5 else [])
            harness.step()
        a_turn(client, rng, may_ask=bool(steady))
        harness.step(rng.randint(1, 4))
        harness.now += 0.1
    num_misses = sum(harness.cache.named(name).num_misses for name in STEADY)  # type: ignore[union-attr]
    assert num_misses > len(STEADY), "some were pushed out and came again"
    assert harness.scheduler.num_prefix_hits > 0
    check(client, expected)
    for name in list(client.loaded):
        client.unload(name)
    harness.drain()
    assert memory.arena.num_free_pages + memory.arena.num_unused_pages == memory.arena.num_pages
    memory.arena.check_integrity([])


def check(client: Client, expected: Expected) -> None:
    """Every answer is the quiet one, or its beginning: up to a token to stop at, a cancel, or an unload by force."""
    num_stopped = num_whole = 0
    for request_id, asked in client.asked.items():
        found, outputs = client.harness.tokens(request_id), client.harness.outputs(request_id)
        assert found == expected[asked][: len(found)], asked
        if request_id in client.cancelled:
            continue
        if outputs[-1].error is not None:
            assert asked[0] in GUEST_CONTENTS
            continue
        is_stopped = outputs[-1].finish_reason is FinishReason.STOP
        assert found[-1] in STOPS if is_stopped else len(found) == NUM_TOKENS
        num_stopped += is_stopped
        num_whole += not is_stopped
    assert num_whole > 25 and num_stopped > 15


@pytest.mark.parametrize("device", DEVICES)
def test_old_streams_finish_on_the_old_content(device: str, model_dir: Path, expected: Expected) -> None:
    """Replaced again and again in the midst of streams, which have the same prompt: no KV is found in another's."""
    harness, _ = engine_on(device, model_dir, 9, 4, MAX_CHUNKS, max_loaded=4)
    client = Client(harness)
    for turn, content in enumerate([8, 9, 12, 8, 13, 9, 16, 12]):
        client.load("replaced", content, pinned=turn % 3 == 0)
        newest = [client.ask("replaced", prompt) for prompt in range(3)][-1]
        while not harness.tokens(newest):
            harness.step()
        assert len(harness.tokens(newest)) < NUM_TOKENS, "in its midst"
    client.unload("replaced")
    harness.drain()
    assert harness.scheduler.num_prefix_hits > 0
    for request_id, asked in client.asked.items():
        assert harness.tokens(request_id) == expected[asked]
