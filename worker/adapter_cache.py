"""AdapterCache: the books of all adapters. Names, generations, who uses what, and where the content is.

A generation is a name bound to exact content. The content can be on the device (in chunks of rank 16), in host memory,
and always is in the private store, from which it comes back by digest. Generations of the same content share its place
on the device. Nothing here touches a tensor or a file.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from protocol.errors import Error, ErrorCode
from protocol.messages import AdapterMemory, AdapterState
from worker.adapter import Adapter, Content
from worker.arena import Arena
from worker.host_tier import NO_LIMIT, HostTier

MAX_ADAPTERS = 16_384  # names and draining generations together


class AdapterCache:
    """Names, generations, references, chunk ids and host places."""

    def __init__(
        self,
        *,
        num_chunks: int,
        max_per_batch: int,
        max_loaded: int,
        max_host_chunks: int = NO_LIMIT,
        policy: str = "lru",
        arena: Arena | None = None,
    ) -> None:
        """num_chunks: the most on the device. max_loaded, max_host_chunks: the most in host memory, of adapters and of
        their chunks. policy: lru or fifo, on the device. arena: shared with KV; by default adapters are alone in one.
        """
        self.max_chunks = num_chunks
        self.num_idle_chunks = 0
        self.on_leave: Callable[[Content], None] = lambda content: None  # told of all that is on the device no more
        self._arena = arena or Arena(num_chunks)
        self._arena.adapters = self
        self._max_per_batch = max_per_batch
        self._policy = policy
        self._names: dict[str, int] = {}
        self._adapters: dict[int, Adapter] = {}
        self._contents: dict[str, Content] = {}  # by digest: of all generations
        self._pinned: set[Adapter] = set()  # few, where all may be thousands
        self._num_chunks = 0  # on the device
        self._idle: set[Content] = set()
        self._first_idle: Content | None = None  # to go; None: there is none, or it is to be looked up
        self._device: OrderedDict[Content, None] = OrderedDict()  # what is on the device, the first to go first
        self.host = HostTier(max_loaded, max_host_chunks)
        self._last_generation = 0
        self._last_content = 0

    # ------------------------------------------------------------------------------------------ names, generations

    @property
    def last_generation(self) -> int:
        return self._last_generation

    def named(self, name: str) -> Adapter | None:
        """The generation that answers under a name."""
        generation = self._names.get(name)
        return None if generation is None else self._adapters[generation]

    def get(self, generation: int) -> Adapter | None:
        """A generation of which something is left."""
        return self._adapters.get(generation)

    def adapters(self) -> list[Adapter]:
        """Every generation of which something is left, oldest first."""
        return list(self._adapters.values())

    def draining(self, name: str) -> Adapter | None:
        """The newest unloaded generation of a name that its streams still keep."""
        found = [a for a in self._adapters.values() if a.name == name and a.unloaded]
        return found[-1] if found else None

    def names_of(self, generations: set[int]) -> list[str]:
        """The names of some generations, base left out."""
        return sorted({self._adapters[generation].name for generation in generations if generation in self._adapters})

    def memory(self, chunk_bytes: int, host_bytes: int) -> AdapterMemory:
        """What all of them take. For any thread: it reads copies."""
        adapters = self.adapters()
        return AdapterMemory(
            chunk_bytes=chunk_bytes,
            chunks_total=self.max_chunks,
            chunks_free=self.max_chunks - self._num_chunks,
            host_adapters=sum(adapter.in_host for adapter in adapters),
            host_adapters_max=self.host.max_adapters,
            host_bytes=host_bytes,
            disk_bytes=sum(content.stored_bytes for content in {adapter.content for adapter in adapters}),
        )

    def check(self, name: str, content: Content, pinned: bool, repins: bool = False) -> Error | None:
        """Why content cannot be published under a name, or None.

        repins: it is what the name stands for, and only its pin is to change.
        """
        replaced = self._names.get(name)
        others = [adapter for adapter in self._pinned if adapter.generation != replaced]
        if pinned and len(others) >= self._max_per_batch - 1:
            return _limit(
                f"adapter '{name}' cannot be pinned: {len(others)} are, and at most --max-loras-per-batch minus one"
                f" = {self._max_per_batch - 1} may be, so that a place is left for the rest. Load it unpinned, unload"
                " a pinned adapter, or start with a larger --max-loras-per-batch",
                "pinned",
            )
        sizes = {each.digest: each.num_chunks for each in (*self._contents.values(), content)}
        staying = {adapter.digest for adapter in others} | ({content.digest} if pinned else set())
        num_pinned = sum(sizes.pop(other) for other in staying)
        if num_pinned + max(sizes.values(), default=0) > self.max_chunks:
            return _limit(
                f"adapter '{name}' of rank {content.rank} does not fit: it takes {content.num_chunks} chunks, and the"
                f" device pool of {self.max_chunks} must hold all pinned adapters and the largest other at once",
                "lora_path",
            )
        if not repins and len(self._adapters) >= MAX_ADAPTERS:
            return _limit(f"at most {MAX_ADAPTERS} adapters can be loaded", "lora_name")
        return None

    def check_mix(self, adapters: list[Adapter], max_chunks: int) -> Error | None:
        """Why these cannot be on the device, or in one segment of at most max_chunks chunks, all at once; or None."""
        if len(adapters) > self._max_per_batch:
            most = f"--max-loras-per-batch, {self._max_per_batch}"
            return _limit(f"a mix of {len(adapters)} adapters is more than {most}", "lora_path")
        num_chunks = sum(adapter.num_chunks for adapter in adapters)
        pinned = {adapter.content for adapter in self._pinned}.difference(adapter.content for adapter in adapters)
        num_pinned = sum(content.num_chunks for content in pinned)
        if len(adapters) > 1 and num_chunks > min(max_chunks, self.max_chunks - num_pinned):
            return _limit(
                f"the mix takes {num_chunks} chunks of rank 16; it may take {max_chunks}, as one adapter, and"
                f" {self.max_chunks - num_pinned} are not taken by pinned adapters",
                "lora_path",
            )
        return None

    def publish(
        self, name: str, content: Content, *, source: str, pinned: bool, created: int
    ) -> tuple[Adapter, Adapter | None]:
        """Binds a name to new content: the new generation, and the one that the name has left. `check` comes first.

        If content of its digest is here already, the generation has that.
        """
        content = self._contents.setdefault(content.digest, content)
        if not content.number:
            self._last_content += 1
            content.number = self._last_content
        self._last_generation += 1
        adapter = Adapter(
            generation=self._last_generation,
            name=name,
            content=content,
            source=source,
            pinned=False,
            created=created,
        )
        content.generations.add(adapter.generation)
        self.set_pinned(adapter, pinned)
        old = self.named(name)
        self._adapters[adapter.generation] = adapter
        self._names[name] = adapter.generation
        if old is not None:
            self._drain(old)
        return adapter, old

    def withdraw(self, name: str) -> Adapter | None:
        """Takes a name away at once; its generation drains. None if nothing has that name."""
        adapter = self.named(name)
        if adapter is not None:
            del self._names[name]
            adapter.unloaded = True
            self._drain(adapter)
        return adapter

    def retain(self, adapter: Adapter) -> None:
        """One more unfinished sequence is bound to the generation."""
        adapter.num_sequences += 1
        adapter.content.num_sequences += 1
        adapter.num_requests += 1
        adapter.last_used = int(time.time())
        self._first_idle = None

    def let_go(self, adapter: Adapter) -> bool:
        """One less; true if that was the end of a draining generation."""
        adapter.num_sequences -= 1
        adapter.content.num_sequences -= 1
        adapter.last_used = int(time.time())
        self._first_idle = None
        if adapter.state is AdapterState.DRAINING and not adapter.num_sequences:
            self._remove(adapter)
            return True
        return False

    def _drain(self, adapter: Adapter) -> None:
        adapter.state = AdapterState.DRAINING
        self.set_pinned(adapter, False)
        if not adapter.num_sequences:
            self._remove(adapter)

    def _remove(self, adapter: Adapter) -> None:
        adapter.state = AdapterState.REMOVED
        self.set_reserved(adapter, False)
        self.host.drop(adapter)
        del self._adapters[adapter.generation]
        content = adapter.content
        content.generations.remove(adapter.generation)
        if not content.generations:
            self._leave_device(content)
            del self._contents[content.digest]

    # -------------------------------------------------------------------------------------------------- device

    def has_room(self, content: Content) -> bool:
        """Whether `place` would find room."""
        num_idle, arena = self.num_idle_chunks, self._arena
        in_arena = arena.num_free_pages + arena.num_unused_pages + num_idle
        return content.num_chunks <= min(in_arena, self.max_chunks - self._num_chunks + num_idle)

    def has_free_places(self, content: Content) -> bool:
        """Whether `place` would push nothing out."""
        return content.num_chunks <= min(self._arena.num_free_pages, self.max_chunks - self._num_chunks)

    def place(self, content: Content) -> bool:
        """Gives content its chunks, for which idle ones and cached KV may have to leave. False: there is no room."""
        assert not content.chunk_ids and content.generations
        if not self.has_room(content):
            return False
        content.chunk_ids = tuple(self._take_page() for _ in range(content.num_chunks))
        content.used_at = self._arena.tick()
        self._device[content] = None
        self._note_idle(content)
        return True

    def _take_page(self) -> int:
        while True:
            has_place = self._num_chunks < self.max_chunks
            page_id = self._arena.take_page() if has_place else None
            if page_id is not None:
                self._num_chunks += 1
                return page_id
            if has_place:
                self._arena.reclaim_page()
            else:
                self.give_up()

    def is_quiet(self, content: Content) -> bool:
        """Whether no step that is launched can touch the content's place, which it has just been given."""
        return all(map(self._arena.is_quiet, content.chunk_ids))

    def unplace(self, content: Content) -> None:
        """Takes the chunks back of what did not reach the device."""
        self._leave_device(content)

    def set_arriving(self, content: Content, is_arriving: bool) -> None:
        """The copy to the device has begun, or is done."""
        content.arriving = is_arriving
        self._note_idle(content)

    def set_pinned(self, adapter: Adapter, is_pinned: bool) -> None:
        """A pinned adapter does not leave the device. `check` comes first."""
        adapter.pinned = is_pinned
        if is_pinned:
            self._pinned.add(adapter)
        else:
            self._pinned.discard(adapter)
        self._note_needs(adapter)

    def set_reserved(self, adapter: Adapter, is_reserved: bool) -> None:
        """A reserved adapter does not leave the device."""
        adapter.reserved = is_reserved
        self._note_needs(adapter)

    def hold(self, adapter: Adapter) -> None:
        """One more running sequence needs the adapter where it is."""
        assert adapter.on_device
        adapter.num_running += 1
        adapter.num_hits += not adapter.missed
        adapter.num_misses += adapter.missed
        adapter.missed = False
        self._note_needs(adapter)

    def unhold(self, adapter: Adapter) -> None:
        """One less."""
        adapter.num_running -= 1
        adapter.content.used_at = self._arena.tick()
        if self._policy == "lru":
            self._device.move_to_end(adapter.content)
        self._note_needs(adapter)

    def _leave_device(self, content: Content) -> None:
        for page_id in content.chunk_ids:
            self._arena.free_page(page_id, content.used_at)
        self._num_chunks -= len(content.chunk_ids)
        content.chunk_ids = ()
        content.arriving = False
        self._device.pop(content, None)
        self._note_idle(content)
        self.on_leave(content)

    def _note_needs(self, adapter: Adapter) -> None:
        """To be called when anything has changed that `needs_device` depends on."""
        if adapter.needs_device:
            adapter.content.needed_by.add(adapter.generation)
        else:
            adapter.content.needed_by.discard(adapter.generation)
        self._note_idle(adapter.content)

    def _note_idle(self, content: Content) -> None:
        """Keeps count; to be called when anything has changed that `idle` and the order of going depend on."""
        self._first_idle = None
        if content in self._idle:
            self._idle.remove(content)
            self.num_idle_chunks -= content.num_chunks
        if content.idle:
            self._idle.add(content)
            self.num_idle_chunks += content.num_chunks

    # ------------------------------------------------------------------------------------------- for the arena

    def _first_to_go(self) -> Content | None:
        """The first that no sequence waits for, or failing that the first."""
        if self._first_idle is None and self._idle:  # it is asked for with every block: looked up once
            idle = (content for content in self._device if content in self._idle)
            self._first_idle = min(idle, key=lambda content: content.num_sequences > 0)
        return self._first_idle

    @property
    def idle_since(self) -> int | None:
        """See arena.Idle."""
        content = self._first_to_go()
        return None if content is None else content.used_at

    def give_up(self) -> None:
        """See arena.Idle."""
        content = self._first_to_go()
        assert content is not None
        self._leave_device(content)

    # --------------------------------------------------------------------------------------------------- audit

    def check_integrity(self) -> None:
        """Asserts that the books agree with each other."""
        contents = set(self._contents.values())
        used = [chunk_id for content in contents for chunk_id in content.chunk_ids]
        self._arena.check_integrity(used)
        assert self._num_chunks == len(used) <= self.max_chunks
        assert self._idle == {content for content in contents if content.idle}
        assert self.num_idle_chunks == sum(content.num_chunks for content in self._idle)
        assert set(self._device) == {content for content in contents if content.chunk_ids}
        assert contents == {adapter.content for adapter in self._adapters.values()}
        for content in contents:
            having = [adapter for adapter in self._adapters.values() if adapter.content is content]
            assert content is self._contents[content.digest]
            assert content.generations == {adapter.generation for adapter in having}
            assert content.needed_by == {adapter.generation for adapter in having if adapter.needs_device}
            assert content.num_sequences == sum(adapter.num_sequences for adapter in having)
            assert len(content.chunk_ids) in (0, content.num_chunks)
        self.host.check_integrity(self._adapters.values())
        assert self._pinned == {adapter for adapter in self._adapters.values() if adapter.pinned}
        assert len(self._pinned) <= self._max_per_batch - 1
        for name, generation in self._names.items():
            assert self._adapters[generation].name == name
        for adapter in self._adapters.values():
            named = self._names.get(adapter.name) == adapter.generation
            assert adapter.state is (AdapterState.READY if named else AdapterState.DRAINING)
            assert named or adapter.num_sequences > 0
            assert 0 <= adapter.num_running <= adapter.num_sequences
            assert adapter.on_device or not adapter.num_running


def _limit(message: str, param: str) -> Error:
    return Error(ErrorCode.ADAPTER_LIMIT, message, param)
