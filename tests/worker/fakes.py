"""A model without a model, adapters without weights: what the engine's tests put in place of torch."""

import hashlib
import math
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.errors import Error, ErrorCode
from protocol.messages import AnyEvent, Generate, ModelCard, Output, Outputs
from protocol.sampling import SamplingParams
from worker.adapter_cache import AdapterCache
from worker.adapter_config import AdapterError
from worker.adapter_service import AdapterService
from worker.arena import Arena
from worker.block_manager import BlockManager
from worker.engine import Engine
from worker.host_tier import NO_LIMIT
from worker.mailbox import Mail, Message, Outbox, Owner
from worker.scheduler import Scheduler
from worker.sequence import Sample, ScheduledSequence, SequenceStatus

OWNER: Owner = (b"g" * 16, 1)
EOS = 1
MODEL = ModelCard(
    names=["base", "org/base"],
    digest="d",
    created=0,
    vocab_size=997,
    max_model_len=256,
    eos_token_ids=[EOS],
    lora_enabled=True,
)


def next_token(token_ids: list[int], content: str, eos_odds: int = 0) -> int:
    """What the fake model says after these tokens under an adapter of this content; the end once in eos_odds."""
    digest = hashlib.sha256(repr((token_ids, content)).encode()).digest()
    if eos_odds and digest[4] % eos_odds == 0:
        return EOS
    return 2 + int.from_bytes(digest[:4]) % (MODEL.vocab_size - 2)


def mixed(contents: list[tuple[str, float]]) -> str:
    """The content of a mix; one of weight 1 alone is itself."""
    if len(contents) == 1 and contents[0][1] == 1.0:
        return contents[0][0]
    return "+".join(f"{content}*{weight}" for content, weight in sorted(contents))


def answer(prompt: list[int], num_tokens: int, content: str = "", eos_odds: int = 0) -> list[int]:
    """The whole answer that any history must lead to."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + num_tokens and (token_ids[-1] != EOS or len(token_ids) == len(prompt)):
        token_ids.append(next_token(token_ids, content, eos_odds))
    return token_ids[len(prompt) :]


@dataclass
class FakePacked:
    """An adapter's content, as the loader gives it."""

    digest: str
    rank: int = 16
    modules: tuple[str, ...] = ("q_proj",)
    num_bytes: int = 64
    stored_bytes: int = 32
    is_sum: bool = True

    @property
    def parts(self) -> "FakePacked":
        return self

    @property
    def chunks(self) -> range:
        return range(-(-self.rank // 16))


@dataclass
class FakeLoader:
    """Sources are `content[:rank]`, or `bad`; a lock in `gates` holds the load of that source back. One whose content
    begins with dora is no sum."""

    gates: dict[str, threading.Event] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    full: set[str] = field(default_factory=set)  # of these there is no host memory to read them into
    num_loads: int = 0
    num_reloads: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)  # copies in the store, by digest

    def load(self, source: str, trusted: bool, cancelled: threading.Event | None = None) -> FakePacked:
        self.num_loads += 1
        if source in self.gates:
            assert self.gates[source].wait(10)
        if source == "bad":
            raise AdapterError(Error(ErrorCode.ADAPTER_INVALID, "rank must be positive", "r"))
        if source == "crash":
            raise ZeroDivisionError
        content, _, rank = source.partition(":")
        self.ranks[content] = int(rank or 16)
        self.held[content] += 1
        return FakePacked(content, self.ranks[content], is_sum=not content.startswith("dora"))

    def load_named(self, name: str, cancelled: threading.Event) -> FakePacked:
        if name.startswith("no-"):
            raise AdapterError(Error(ErrorCode.ADAPTER_NOT_FOUND, "there is no such adapter"))
        return self.load(name, trusted=False)

    def release(self, digest: str) -> None:
        self.held[digest] -= 1
        assert self.held[digest] >= 0
        self.held += Counter()  # without zeros

    @property
    def host_bytes(self) -> int:
        return 0

    def reload(self, digest: str) -> FakePacked:
        self.num_reloads += 1
        if digest in self.lost:
            raise AdapterError(Error(ErrorCode.ADAPTER_INVALID, "gone"))
        if digest in self.full:
            raise AdapterError(Error(ErrorCode.STORE_FULL, "full"))
        return FakePacked(digest, self.ranks[digest])


class FakePool:
    """Like AdapterPool: refuses chunks that belong to another, and writes behind what is launched."""

    def __init__(self) -> None:
        self.contents: dict[int, str] = {}
        self.chunks: dict[int, int] = {}
        self.memory: dict[int, str] = {}  # what the device has in each chunk
        self.mixes: dict[int, tuple[tuple[int, float], ...]] = {}
        self.broken = False
        self.slow = False  # copies do not arrive
        self.wait_for_steps: Callable[[], None] = lambda: None
        self.overwrite: Callable[[int], None] = lambda chunk: None  # told of each chunk that is written

    def upload(self, number: int, packed: FakePacked, chunk_ids: tuple[int, ...], behind_steps: bool = True) -> None:
        if self.broken:
            raise MemoryError
        assert number not in self.contents and len(chunk_ids) == len(packed.chunks)
        assert not self.chunks.keys() & set(chunk_ids)
        if behind_steps:
            self.wait_for_steps()
        self.contents[number] = packed.digest
        self.chunks |= dict.fromkeys(chunk_ids, number)
        self.memory |= dict.fromkeys(chunk_ids, packed.digest)
        for chunk in chunk_ids:
            self.overwrite(chunk)

    def note_done(self) -> None:
        pass

    def is_ready(self, number: int) -> bool:
        return number in self.contents and not self.slow

    def remove(self, number: int) -> None:
        del self.contents[number]
        self.chunks = {chunk: owner for chunk, owner in self.chunks.items() if owner != number}

    def chunk_ids(self, number: int) -> list[int]:
        """Of a resident adapter."""
        assert number in self.contents, "an adapter that is not there"
        return [chunk for chunk, owner in self.chunks.items() if owner == number]

    def parts(self, number: int) -> list[tuple[list[int], float]]:
        """Chunks and weights of a resident adapter or mix; none: the base model."""
        members = self.mixes.get(number) or ([(number, 1.0)] if number else [])
        return [(self.chunk_ids(member), weight) for member, weight in members]


@dataclass
class FakeShare:
    """What the device is told of a share when its step is launched, and nothing more."""

    sequence_id: int
    start: int
    end: int
    known: list[int]  # its tokens; one may be missing
    block_table: list[int]
    parts: list[tuple[list[int], float]]  # chunks and weights
    samples: bool


class FakeStep:
    """A launched step."""

    def __init__(self, runner: "FakeRunner", batch: list[ScheduledSequence]) -> None:
        self.runner = runner
        self.batch = batch
        self.shares = [self._share(scheduled) for scheduled in batch]
        self.is_sampled = False
        self.samples: list[Sample] | None = None

    def _share(self, scheduled: ScheduledSequence) -> FakeShare:
        sequence = scheduled.sequence
        known = sequence.token_ids[scheduled.start : scheduled.end]
        if len(known) < scheduled.num_tokens:
            assert len(known) == scheduled.num_tokens - 1, "one token is pending"
            assert sequence.sequence_id in self.runner.choosing, "and the step before chooses it"
            assert self.runner.newest is not None and self.runner.newest.is_sampled, "or has enqueued it"
        return FakeShare(
            sequence.sequence_id,
            scheduled.start,
            scheduled.end,
            known,
            list(sequence.block_table),
            self.runner.pool.parts(sequence.content),
            scheduled.samples,
        )

    def sample_late(self) -> None:
        assert not self.is_sampled and self.runner.newest is self
        self.is_sampled = True
        for scheduled in self.batch:
            is_known = len(scheduled.sequence.token_ids) >= scheduled.end
            assert is_known or scheduled.sequence.status is not SequenceStatus.RUNNING

    def collect(self) -> list[Sample]:
        assert self.is_sampled
        while self.samples is None:
            self.runner.run_oldest()
        return self.samples


class FakeRunner:
    """A device with a KV of token ids and adapter contents by block, so that a wrong block shows in the tokens.

    It runs its steps in order; a lazy one not before somebody waits for them. With blocks_per_page KV and chunks are
    one memory: what is written as one is lost as the other.
    """

    def __init__(
        self, block_size: int, pool: FakePool, *, lazy: bool = True, eos_odds: int = 0, blocks_per_page: int = 0
    ):
        self.kv: dict[tuple[int, int], tuple[int, str]] = {}
        self.block_size = block_size
        self.pool = pool
        self.lazy = lazy
        self.eos_odds = eos_odds
        self.on_run: Callable[[list[ScheduledSequence]], None] | None = None
        self.launched: deque[FakeStep] = deque()
        self.newest: FakeStep | None = None
        self.choosing: set[int] = set()  # sequences whose token the newest step chooses
        self.last: dict[int, int] = {}  # on the device: the tokens that the last step has chosen
        pool.wait_for_steps = self.run_all
        self.blocks_per_page = blocks_per_page
        if blocks_per_page:
            pool.overwrite = self._lose_kv

    def _lose_kv(self, page: int) -> None:
        self.kv = {slot: held for slot, held in self.kv.items() if slot[0] // self.blocks_per_page != page}

    def launch(self, batch: list[ScheduledSequence]) -> FakeStep:
        if self.on_run:
            self.on_run(batch)
        step = FakeStep(self, batch)
        self.newest, self.choosing = step, {s.sequence.sequence_id for s in batch if s.samples}
        self.launched.append(step)
        if not self.lazy:
            self.run_all()
        return step

    def drain(self) -> None:
        self.run_all()

    def run_all(self) -> None:
        while self.launched:
            self.run_oldest()

    def run_oldest(self) -> None:
        step = self.launched.popleft()
        chosen = {}
        for share in step.shares:
            contents = []
            for chunk_ids, weight in share.parts:
                held_there = {self.pool.memory[chunk] for chunk in chunk_ids}
                assert len(held_there) == 1, "chunks of another adapter"
                contents.append((held_there.pop(), weight))
            content = mixed(contents)
            is_whole = len(share.known) == share.end - share.start
            tokens = share.known if is_whole else [*share.known, self.last[share.sequence_id]]
            for position, token in zip(range(share.start, share.end), tokens, strict=True):
                slot = self._slot(share.block_table, position)
                self.kv[slot] = (token, content)
                if self.blocks_per_page:
                    self.pool.memory[slot[0] // self.blocks_per_page] = "KV"
            if share.samples:
                held = [self.kv[self._slot(share.block_table, p)] for p in range(share.end)]
                assert all(other == content for _, other in held), "KV of another adapter"
                chosen[share.sequence_id] = next_token([token for token, _ in held], content, self.eos_odds)
        self.last = chosen
        step.samples = [Sample(token, logprob=-1.0) for token in chosen.values()]

    def _slot(self, block_table: list[int], position: int) -> tuple[int, int]:
        return block_table[position // self.block_size], position % self.block_size


class Harness:
    """An engine with fakes, stepped by hand, and everything that it has sent."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_running: int = 8,
        max_prefill_tokens: int = 16,
        max_loras_per_batch: int = 2,
        max_loaded: int = 4,
        max_host_chunks: int = NO_LIMIT,
        num_chunks: int = 4,
        policy: str = "lru",
        max_overtake_s: float = 1.0,
        max_waiting_s: float = math.inf,
        is_fair: bool = True,
        prefill_budget: Callable[[int], int] | None = None,
        enabled: bool = True,
        resolves: bool = False,
        hash_block: Callable[[bytes, bytes], bytes] | None = None,
        runs_ahead: bool = True,
        lazy: bool = True,
        eos_odds: int = 0,
        may_fail: bool = False,
        num_pages: int = 0,
        blocks_per_page: int = 1,
        arena: Arena | None = None,
        pool: object = None,
        loader: object = None,
    ) -> None:
        """may_fail: a step that fails is done again by the engine; else it fails the test.

        num_pages: of one arena for KV and adapters, of which they take at most num_blocks and num_chunks; 0: two.
        arena, pool, loader: real ones, for an engine with a real model.
        """
        self.arena = arena or (Arena(num_pages, blocks_per_page) if num_pages else None)
        self.now = 100.0
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.outbox = Outbox()
        self.loader, self.pool = FakeLoader(), FakePool()
        self.has_fake_pool = pool is None
        self.cache = AdapterCache(
            num_chunks=num_chunks,
            max_per_batch=max_loras_per_batch,
            max_loaded=max_loaded,
            max_host_chunks=max_host_chunks,
            policy=policy,
            arena=self.arena,
        )
        jobs = InlineJobs(self.inbox)
        self.jobs = jobs
        self.adapters = AdapterService(
            self.cache,
            pool or self.pool,
            loader or self.loader,
            self.outbox,
            jobs,
            jobs,
            base_names=frozenset(MODEL.names),
            enabled=enabled,
            resolves=resolves,
            chunk_bytes=64,
            clock=lambda: self.now,
        )
        self.blocks = BlockManager(num_blocks, block_size, hash_block, self.arena)
        self.scheduler = Scheduler(
            self.blocks,
            self.adapters,
            max_running=max_running,
            max_prefill_tokens=max_prefill_tokens,
            max_adapters=max_loras_per_batch,
            max_overtake_s=max_overtake_s,
            max_waiting_s=max_waiting_s,
            is_fair=is_fair,
            prefill_budget=prefill_budget,
            clock=lambda: self.now,
        )
        of_pages = blocks_per_page if num_pages else 0
        self.runner = FakeRunner(block_size, self.pool, lazy=lazy, eos_odds=eos_odds, blocks_per_page=of_pages)
        self.mail: Mail = []
        self.engine = Engine(
            MODEL,
            self.runner,
            self.scheduler,
            self.blocks,
            self.adapters,
            self.inbox,
            self.outbox,
            self.mail.extend,
            max_loras_per_batch=max_loras_per_batch,
            runs_ahead=runs_ahead,
            clock=lambda: self.now,
        )
        if not may_fail:
            self.engine._steps._run_one_by_one = self._refuse_failure  # type: ignore[method-assign]

    def _refuse_failure(self, batch: list[ScheduledSequence]) -> None:
        raise AssertionError(f"a step with {len(batch)} sequences failed")

    def put(self, *messages: Message) -> None:
        for message in messages:
            self.inbox.put(message)

    @property
    def is_idle(self) -> bool:
        """Whether the engine would wait for a message."""
        has_work = self.scheduler.running or self.scheduler.waiting or not self.engine._steps.is_empty
        return not has_work and self.inbox.empty()

    def step(self, num_steps: int = 1) -> None:
        """Steps that have something to do, with an audit after each."""
        for _ in range(num_steps):
            if self.is_idle:
                return
            self.engine.step()
            self.check()

    def drain(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if self.is_idle:
                break
            self.engine.step()
            self.check()
        else:
            raise AssertionError("sequences are left that never finish")
        pinned = sum(c.num_chunks for c in {a.content for a in self.cache.adapters() if a.pinned} if c.chunk_ids)
        in_arena = (
            (self.arena.num_pages - pinned) * self.arena.blocks_per_page if self.arena else self.blocks.num_blocks
        )
        assert self.blocks.num_free == min(self.blocks.num_blocks, in_arena)

    def check(self) -> None:
        self.scheduler.check_integrity()
        self.cache.check_integrity()
        assert not self.has_fake_pool or set(self.pool.contents) == {
            a.content.number for a in self.cache.adapters() if a.on_device
        }
        assert set(self.adapters._host) == {a.generation for a in self.cache.adapters() if a.in_host}

    def events(self, kind: type) -> list[AnyEvent]:
        return [event for _, event in self.mail if isinstance(event, kind)]

    def outputs(self, request_id: int, owner: Owner = OWNER) -> list[Output]:
        return [
            output
            for to, event in self.mail
            if to == owner and isinstance(event, Outputs)
            for output in event.outputs
            if output.request_id == request_id
        ]

    def tokens(self, request_id: int, owner: Owner = OWNER) -> list[int]:
        """The answer so far; offsets must fit."""
        tokens: list[int] = []
        for output in self.outputs(request_id, owner):
            assert output.offset == len(tokens)
            tokens += output.token_ids
        return tokens


class InlineJobs:
    """Background work that is done when asked, or when `hold` is lifted."""

    def __init__(self, inbox: "queue.SimpleQueue[Message]") -> None:
        self._inbox = inbox
        self.hold = False
        self.held: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], object], done: Callable[[object], None]) -> None:
        from worker.mailbox import JobDone

        def run() -> None:
            try:
                result: object = job()
            except Exception as error:
                result = error
            self._inbox.put(JobDone(done, result))

        if self.hold:
            self.held.append(run)
        else:
            run()

    def release(self, index: int = 0) -> None:
        self.held.pop(index)()


def generate(request_id: int, prompt: list[int], max_tokens: int = 8, **fields: object) -> Generate:
    sampling = {key: fields.pop(key) for key in list(fields) if key in SamplingParams.__struct_fields__}
    return Generate(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        **fields,
    )
