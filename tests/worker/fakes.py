"""A model without a model, adapters without weights: what the engine's tests put in place of torch."""

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.errors import Error, ErrorCode
from protocol.messages import AnyEvent, Generate, ModelCard, Output, Outputs
from protocol.sampling import SamplingParams
from worker.adapter_cache import AdapterCache
from worker.adapter_config import AdapterError
from worker.adapter_service import AdapterService
from worker.block_manager import BlockManager
from worker.engine import Engine
from worker.mailbox import Mail, Message, Outbox, Owner
from worker.scheduler import Scheduler
from worker.sequence import Sample, ScheduledSequence

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


def next_token(token_ids: list[int], content: str) -> int:
    """What the fake model says after these tokens under an adapter of this content; never the end of text."""
    digest = hashlib.sha256(repr((token_ids, content)).encode()).digest()
    return 2 + int.from_bytes(digest[:4]) % (MODEL.vocab_size - 2)


def answer(prompt: list[int], num_tokens: int, content: str = "") -> list[int]:
    """The whole answer that any history must lead to."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids, content))
    return token_ids[len(prompt) :]


@dataclass
class FakePacked:
    """An adapter's content, as the loader gives it."""

    digest: str
    rank: int = 16
    modules: tuple[str, ...] = ("q_proj",)
    num_bytes: int = 64
    stored_bytes: int = 32

    @property
    def chunks(self) -> range:
        return range(-(-self.rank // 16))


@dataclass
class FakeLoader:
    """Sources are `content[:rank]`, or `bad`; a lock in `gates` holds the load of that source back."""

    gates: dict[str, threading.Event] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
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
        return FakePacked(content, self.ranks[content])

    def load_named(self, name: str, cancelled: threading.Event) -> FakePacked:
        if name.startswith("no-"):
            raise AdapterError(Error(ErrorCode.ADAPTER_NOT_FOUND, "there is no such adapter"))
        return self.load(name, trusted=False)

    def release(self, digest: str) -> None:
        self.held[digest] -= 1
        assert self.held[digest] >= 0
        self.held += Counter()  # without zeros

    def reload(self, digest: str) -> FakePacked:
        self.num_reloads += 1
        if digest in self.lost:
            raise AdapterError(Error(ErrorCode.ADAPTER_INVALID, "gone"))
        return FakePacked(digest, self.ranks[digest])


class FakePool:
    """Like AdapterPool: refuses chunks that belong to another."""

    def __init__(self) -> None:
        self.contents: dict[int, str] = {}
        self.chunks: dict[int, int] = {}
        self.broken = False
        self.slow = False  # copies do not arrive

    def upload(self, generation: int, packed: FakePacked, chunk_ids: tuple[int, ...]) -> None:
        if self.broken:
            raise MemoryError
        assert generation not in self.contents and len(chunk_ids) == len(packed.chunks)
        assert not self.chunks.keys() & set(chunk_ids)
        self.contents[generation] = packed.digest
        self.chunks |= dict.fromkeys(chunk_ids, generation)

    def is_ready(self, generation: int) -> bool:
        return generation in self.contents and not self.slow

    def remove(self, generation: int) -> None:
        del self.contents[generation]
        self.chunks = {chunk: owner for chunk, owner in self.chunks.items() if owner != generation}


class FakeRunner:
    """Keeps a KV of token ids and adapter contents by block, so that a wrong block shows in the tokens."""

    def __init__(
        self, block_size: int, pool: FakePool, on_run: Callable[[list[ScheduledSequence]], None] | None = None
    ):
        self.kv: dict[tuple[int, int], tuple[int, str]] = {}
        self.block_size = block_size
        self.pool = pool
        self.on_run = on_run
        self.largest_batch = 0

    def run(self, batch: list[ScheduledSequence]) -> list[Sample]:
        self.largest_batch = max(self.largest_batch, len(batch))
        if self.on_run:
            self.on_run(batch)
        samples = []
        for scheduled in batch:
            sequence, start = scheduled.sequence, scheduled.sequence.num_computed_tokens
            content = self.pool.contents[sequence.generation] if sequence.generation else ""
            for position in range(start, start + scheduled.num_tokens):
                self.kv[self._slot(sequence.block_table, position)] = (sequence.token_ids[position], content)
            if scheduled.samples:
                held = [self.kv[self._slot(sequence.block_table, p)] for p in range(len(sequence.token_ids))]
                assert all(other == content for _, other in held), "KV of another adapter"
                samples.append(Sample(next_token([token for token, _ in held], content), logprob=-1.0))
        return samples

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
        num_chunks: int = 4,
        policy: str = "lru",
        max_overtake_s: float = 1.0,
        enabled: bool = True,
        resolves: bool = False,
        hash_block: Callable[[bytes, bytes], bytes] | None = None,
    ) -> None:
        self.now = 100.0
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.outbox = Outbox()
        self.loader, self.pool = FakeLoader(), FakePool()
        self.cache = AdapterCache(
            num_chunks=num_chunks, max_per_batch=max_loras_per_batch, max_loaded=max_loaded, policy=policy
        )
        jobs = InlineJobs(self.inbox)
        self.jobs = jobs
        self.adapters = AdapterService(
            self.cache,
            self.pool,
            self.loader,
            self.outbox,
            jobs,
            jobs,
            base_names=frozenset(MODEL.names),
            enabled=enabled,
            resolves=resolves,
            chunk_bytes=64,
            clock=lambda: self.now,
        )
        self.blocks = BlockManager(num_blocks, block_size, hash_block)
        self.scheduler = Scheduler(
            self.blocks,
            self.adapters,
            max_running=max_running,
            max_prefill_tokens=max_prefill_tokens,
            max_adapters=max_loras_per_batch,
            max_overtake_s=max_overtake_s,
            clock=lambda: self.now,
        )
        self.runner = FakeRunner(block_size, self.pool)
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
            clock=lambda: self.now,
        )

    def put(self, *messages: Message) -> None:
        for message in messages:
            self.inbox.put(message)

    def step(self, num_steps: int = 1) -> None:
        """Steps that have something to do, with an audit after each."""
        for _ in range(num_steps):
            if not (self.scheduler.running or self.scheduler.waiting) and self.inbox.empty():
                return
            self.engine.step()
            self.check()

    def drain(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if not (self.scheduler.running or self.scheduler.waiting) and self.inbox.empty():
                break
            self.engine.step()
            self.check()
        else:
            raise AssertionError("sequences are left that never finish")
        assert self.blocks.num_free == self.blocks.num_blocks

    def check(self) -> None:
        self.scheduler.check_integrity()
        self.cache.check_integrity()
        assert set(self.pool.contents) == {a.generation for a in self.cache.adapters() if a.chunk_ids}
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
