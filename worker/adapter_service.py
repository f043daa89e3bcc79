"""AdapterService: adapter commands carried out, and adapters brought to the device when sequences need them.

Everything here runs on the engine thread; reading and checking content runs in the background and comes back as a
message. What a load does to others happens in one place, `_publish`: the order of those moments is the order of loads.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from protocol.errors import Error, ErrorCode
from protocol.messages import BASE_GENERATION, AdapterChanged, AdapterReply, AdapterState, LoadAdapter, UnloadAdapter
from worker.adapter import Adapter, Content
from worker.adapter_cache import AdapterCache
from worker.adapter_config import AdapterError
from worker.adapter_listing import AdapterListing
from worker.adapter_loads import BROKEN, GONE, MAX_LOADS, Failure, Load, Loads, Waiter, as_error, conflict, not_loaded
from worker.adapter_mixes import AdapterMixes
from worker.adapter_uploads import AdapterUploads
from worker.background import Background, log_failure
from worker.mailbox import Outbox, Owner
from worker.scheduler import Admission

if TYPE_CHECKING:
    from worker.adapter_loader import AdapterLoader
    from worker.adapter_pool import AdapterPool
    from worker.adapter_weights import PackedAdapter

log = logging.getLogger(__name__)


class AdapterService:
    """The adapters of this worker: loads, replaces, unloads, uploads."""

    def __init__(
        self,
        cache: AdapterCache,
        pool: "AdapterPool",
        loader: "AdapterLoader",
        outbox: Outbox,
        loads: Background,
        reloads: Background,
        *,
        base_names: frozenset[str],
        enabled: bool = True,
        resolves: bool = False,
        chunk_bytes: int = 0,
        max_mix_chunks: int = 1 << 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """reloads has threads of its own, so that a slow download under `loads` delays no request.

        resolves: whether the loader finds adapters by their names alone.
        """
        self.cache = cache
        self.num_loads = 0
        self._uploads = AdapterUploads(cache, pool)
        self._loader = loader
        self._outbox = outbox
        self._background = loads
        self._reload_background = reloads
        self._base_names = base_names
        self._enabled = enabled
        self._resolves = resolves
        self._clock = clock
        self._host: dict[int, PackedAdapter] = {}
        self._loads = Loads()
        self.listing = AdapterListing(cache, self._loads, chunk_bytes, lambda: loader.host_bytes)
        self._revoked: set[str] = set()  # unloaded on purpose: no request brings them back
        self._reloading: set[int] = set()
        self._unloads: dict[int, list[Waiter]] = {}  # by generation
        self._failures: list[Failure] = []
        self.mixes = AdapterMixes(self, pool, self._failures, max_mix_chunks)

    @property
    def num_uploads(self) -> int:
        """Copies to the device so far."""
        return self._uploads.num_begun

    # ------------------------------------------------------------------------------------------- sequences

    def bind(self, generation: int) -> Adapter | Error:
        """Holds a generation for a new sequence, to its end."""
        adapter = self.cache.get(generation)
        if adapter is None or adapter.unloaded:
            return GONE if self._enabled else Error(ErrorCode.LORA_DISABLED, "LoRA is not enabled", "model")
        self.cache.retain(adapter)
        return adapter

    def unbind(self, generation: int) -> None:
        """Undoes one bind, of a generation or a mix."""
        if generation < BASE_GENERATION:
            self.mixes.unbind(generation)
            return
        adapter = self.cache.get(generation)
        assert adapter is not None
        if self.cache.let_go(adapter):
            self._changed(adapter)

    def acquire(self, generation: int) -> Admission:
        """For the scheduler: see AdapterResidency."""
        if generation < BASE_GENERATION:
            return self.mixes.acquire(generation)
        adapter = self.cache.get(generation)
        assert adapter is not None
        admission = self.bring(adapter)
        if admission is Admission.GRANTED:
            self.cache.hold(adapter)
            self.cache.host.touch(adapter)
        return admission

    def bring(self, adapter: Adapter) -> Admission:
        """Has an adapter come to the device, if there is room; GRANTED if it is there."""
        if not adapter.on_device:
            if not self.cache.has_room(adapter.content):
                return Admission.FULL
            adapter.missed = True
            packed = self._host.get(adapter.generation)
            if packed is None:
                self._reload(adapter)
            if packed is None or not self._upload(adapter, packed):
                return Admission.LOADING
        return Admission.LOADING if self._uploads.is_arriving(adapter.content) else Admission.GRANTED

    def prefetch(self, generation: int, may_copy: bool) -> bool:
        """For the scheduler: see AdapterResidency."""
        adapter = self.cache.get(generation)
        if adapter is None or adapter.on_device:
            return True
        adapter.missed = True  # however short the wait will be
        if (packed := self._host.get(generation)) is not None:
            return may_copy and self.cache.has_free_places(adapter.content) and self._upload(adapter, packed)
        if generation not in self._reloading and self.cache.host.has_spare_places([*self._coming(), adapter]):
            self._reload(adapter)
        return False

    def release(self, generation: int) -> None:
        """For the scheduler: see AdapterResidency."""
        if generation < BASE_GENERATION:
            self.mixes.release(generation)
            return
        adapter = self.cache.get(generation)
        assert adapter is not None
        self.cache.unhold(adapter)

    def num_chunks_to_take(self, generation: int) -> int:
        """For the scheduler: see AdapterResidency."""
        adapter = self.cache.get(generation)
        if adapter is None:  # one of a mix may be gone
            return 0
        return adapter.num_chunks if adapter.content.idle or not adapter.on_device else 0

    def take_failures(self) -> list[Failure]:
        """Sequences to fail, said once."""
        failures = list(self._failures)
        self._failures.clear()
        return failures

    def _upload(self, adapter: Adapter, packed: "PackedAdapter") -> bool:
        if self._uploads.begin(adapter.content, packed):
            return True
        error = Error(ErrorCode.INTERNAL, "the adapter could not be copied to the device")
        self._failures.append(Failure(adapter.generation, error, waiting_only=True))
        return False

    # ----------------------------------------------------------------------------------------------- loads

    def load(self, owner: Owner, command: LoadAdapter) -> None:
        """Loads in the background; the reply follows."""
        waiter = Waiter(owner, command.request_id)
        holder = self.cache.named(command.name)
        if command.source is None and holder is not None and not command.replace:
            self._reply([waiter], self._refuse(command) or self._repin(holder, command.pinned))
            return
        if self._loads.join(command, waiter):  # the same again, while the first is at work: one load, one outcome
            return
        error = self._refuse(command)
        if error is None and len(self._loads) >= MAX_LOADS:
            error = Error(ErrorCode.OVERLOADED, f"{MAX_LOADS} adapter loads are at work already")
        if error is not None:
            self._reply([waiter], error)
            return
        load = self._loads.begin(command, self.cache.last_generation, waiter)
        if command.source is None:  # on this machine, and often a request waits for it
            job = partial(self._loader.load_named, command.name, load.cancelled)
            self._reload_background.submit(job, partial(self._loaded, load))
        else:
            job = partial(self._loader.load, command.source, trusted=False, cancelled=load.cancelled)
            self._background.submit(job, partial(self._loaded, load))

    def read(self, source: str) -> "PackedAdapter":
        """The content of an adapter of the operator's own list, on any thread. Raises AdapterError."""
        return self._loader.load(source, trusted=True)

    def load_now(self, name: str, source: str, pinned: bool, read: "Callable[[], PackedAdapter]") -> Error | None:
        """Loads an adapter of the operator's own list, before the worker serves. read: what `read` gives or raises."""
        command = LoadAdapter(request_id=0, name=name, source=source, pinned=pinned)
        error = self._refuse(command)
        if error is not None:
            return error
        try:
            packed = read()
        except Exception as exception:
            return as_error(exception)
        outcome = self._publish(command, packed)
        return outcome if isinstance(outcome, Error) else None

    def _loaded(self, load: Load, result: "PackedAdapter | Exception") -> None:
        if load.cancelled.is_set():
            self._release(result)
            return
        outcome: Adapter | Error = BROKEN
        try:
            outcome = as_error(result) if isinstance(result, Exception) else self._settle(load, result)
        finally:  # whatever happens, nobody waits for ever
            self._loads.end(load, outcome if isinstance(outcome, Error) else None)
            if isinstance(outcome, Error):
                self._release(result)
            self._reply(load.waiters, outcome)

    def _settle(self, load: Load, packed: "PackedAdapter") -> Adapter | Error:
        """Publishes what was loaded, unless the same has come under the name meanwhile."""
        command, holder = load.command, self.cache.named(load.command.name)
        if holder is not None and holder.generation > load.last_generation:
            is_twin = holder.digest == packed.digest and holder.pinned == bool(command.pinned)
            if not command.replace and (command.source is None or is_twin):
                self._release(packed)
                return holder
        return self._refuse(command) or load.overtaken or self._publish(command, packed)

    def _publish(self, command: LoadAdapter, packed: "PackedAdapter") -> Adapter | Error:
        holder = self.cache.named(command.name)
        pinned = command.pinned if command.pinned is not None else holder is not None and holder.pinned
        content = Content(
            digest=packed.digest,
            rank=packed.rank,
            modules=packed.modules,
            num_bytes=packed.num_bytes,
            stored_bytes=packed.stored_bytes,
            num_chunks=len(packed.chunks),
            is_sum=packed.parts.is_sum,
        )
        error = self.cache.check(command.name, content, pinned)
        if error is not None:
            return error
        source = command.source or command.name
        adapter, old = self.cache.publish(command.name, content, source=source, pinned=pinned, created=int(time.time()))
        self.num_loads += 1
        self._revoked.discard(command.name)
        self._keep_in_host(adapter, packed)
        if adapter.pinned:
            self._bring_pinned(adapter, packed)
        self._changed(adapter)
        if old is not None:
            self._changed(old)
        return adapter

    def _refuse(self, command: LoadAdapter) -> Error | None:
        """Why the name cannot be loaded as things stand."""
        name, holder = command.name, self.cache.named(command.name)
        if not self._enabled:
            return Error(ErrorCode.LORA_DISABLED, "LoRA is not enabled; start the worker with --enable-lora")
        if name in self._base_names:
            return Error(ErrorCode.ADAPTER_EXISTS, f"'{name}' is a name of the base model", "lora_name")
        if (error := conflict(name, holder, command.expected_generation)) is not None:
            return error
        if command.source is None:
            if command.replace and not self._resolves:
                return Error(ErrorCode.INVALID_REQUEST, "to replace an adapter takes a source", "lora_path")
            if holder is None and (not self._resolves or (command.on_demand and name in self._revoked)):
                return not_loaded(name)
        elif holder is not None and not command.replace:
            return Error(ErrorCode.ADAPTER_EXISTS, f"an adapter '{name}' is already loaded", "lora_name")
        return None

    def _repin(self, adapter: Adapter, pinned: bool | None) -> Adapter | Error:
        if pinned is None or pinned == adapter.pinned:
            return adapter
        if pinned:
            error = self.cache.check(adapter.name, adapter.content, True, repins=True)
            if error is not None:
                return error
        self.cache.set_pinned(adapter, pinned)
        packed = self._host.get(adapter.generation)
        if pinned and packed is not None:
            self._bring_pinned(adapter, packed)
        self._changed(adapter)
        return adapter

    def _bring_pinned(self, adapter: Adapter, packed: "PackedAdapter") -> None:
        if not adapter.on_device and self.cache.has_room(adapter.content):
            self._upload(adapter, packed)

    def _release(self, loaded: "Adapter | PackedAdapter | Exception") -> None:
        """Gives the store's copy back, beside the engine; of a load that failed there is none."""
        if not isinstance(loaded, Exception):
            self._reload_background.submit(partial(self._loader.release, loaded.digest), log_failure)

    def _coming(self) -> list[Adapter]:
        return [adapter for generation in self._reloading if (adapter := self.cache.get(generation)) is not None]

    def _reload(self, adapter: Adapter) -> None:
        if adapter.generation not in self._reloading:
            self._reloading.add(adapter.generation)
            job = partial(self._loader.reload, adapter.digest)
            self._reload_background.submit(job, partial(self._reloaded, adapter))

    def _reloaded(self, adapter: Adapter, result: "PackedAdapter | Exception") -> None:
        self._reloading.discard(adapter.generation)
        if adapter.state is AdapterState.REMOVED:
            return
        if isinstance(result, Exception) or result.digest != adapter.digest:
            log.error("adapter %s could not be read again: %s", adapter.name, result)
            error = Error(ErrorCode.ADAPTER_INVALID, f"the content of adapter '{adapter.name}' was lost; load it again")
            if isinstance(result, AdapterError) and result.error.code is ErrorCode.STORE_FULL:
                error = result.error
            self._failures.append(Failure(adapter.generation, error, waiting_only=True))
            return
        self._keep_in_host(adapter, result)

    def _keep_in_host(self, adapter: Adapter, packed: "PackedAdapter") -> None:
        self._host[adapter.generation] = packed
        for leaving in self.cache.host.add(adapter):
            del self._host[leaving.generation]

    # --------------------------------------------------------------------------------------------- unloads

    def unload(self, owner: Owner, command: UnloadAdapter) -> None:
        """Takes the name away now; the reply follows when the streams are done, or when the command's time is up."""
        name = command.name
        waiter = Waiter(owner, command.request_id, self._clock() + command.timeout_ms / 1000)
        error = conflict(name, self.cache.named(name), command.expected_generation)
        if error is not None:
            self._reply([waiter], error)
            return
        self._loads.forget(name)
        if self._resolves:
            self._revoked.add(name)
        loads = self._loads.cancel(name)
        for load in loads:
            self._reply(load.waiters, load.cancellation())
        adapter = self.cache.withdraw(name)
        if adapter is not None:
            self._unloads[adapter.generation] = [waiter]
            self._changed(adapter)
        elif (adapter := self.cache.draining(name)) is not None:
            self._unloads.setdefault(adapter.generation, []).append(waiter)
        else:
            self._reply([waiter], None if loads else not_loaded(name))
            return
        if adapter.state is not AdapterState.REMOVED and command.force:
            self._failures.append(Failure(adapter.generation, GONE, waiting_only=False))

    def expire(self) -> None:
        """Takes note of copies that are done, and answers unloads that have waited long enough; their streams go on."""
        self._uploads.note_arrivals()
        self.mixes.unreserve()
        now = self._clock()
        for generation, waiters in list(self._unloads.items()):
            due = [waiter for waiter in waiters if waiter.deadline_s <= now]
            adapter = self.cache.get(generation)
            assert adapter is not None
            if due:
                self._reply(due, adapter)
                self._unloads[generation] = [waiter for waiter in waiters if waiter not in due]
                if not self._unloads[generation]:
                    del self._unloads[generation]

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` will have something to do."""
        return min((waiter.deadline_s for waiters in self._unloads.values() for waiter in waiters), default=None)

    # --------------------------------------------------------------------------------------------- telling

    def _changed(self, adapter: Adapter) -> None:
        self._forget_removed(adapter)
        self._outbox.broadcast(AdapterChanged(adapter=adapter.info()))
        if adapter.state is AdapterState.REMOVED:
            self._release(adapter)
            self._reply(self._unloads.pop(adapter.generation, []), adapter)

    def _forget_removed(self, adapter: Adapter) -> None:
        if adapter.state is AdapterState.REMOVED:
            self._host.pop(adapter.generation, None)

    def _reply(self, waiters: list[Waiter], outcome: Adapter | Error | None) -> None:
        error = outcome if isinstance(outcome, Error) else None
        info, usage = (outcome.info(), outcome.usage()) if isinstance(outcome, Adapter) else (None, None)
        for waiter in waiters:
            reply = AdapterReply(request_id=waiter.request_id, adapter=info, usage=usage, error=error)
            self._outbox.send(waiter.owner, reply)
