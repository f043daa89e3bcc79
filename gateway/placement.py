"""Fleet: the workers behind this gateway. Who gets a request, what is loaded everywhere."""

import asyncio
import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from gateway.errors import ApiError, UnknownAdapter, invalid, model_not_found, overloaded, unavailable
from gateway.lost_names import LostNames
from gateway.mixes import Adapter, Mix, names_of
from gateway.model_text import ModelText
from gateway.quotas import Quotas
from gateway.session import Session, SessionLost
from gateway.worker_client import WorkerClient
from protocol.errors import Error
from protocol.messages import (
    BASE_GENERATION,
    AdapterEntry,
    AdapterInfo,
    AdapterMemory,
    AdapterReply,
    AdapterState,
    MixMember,
    ModelCard,
)


@dataclass(slots=True)
class Lease:
    """The right to run sequences on one worker, with each adapter bound to the generation that answers now."""

    session: Session
    model: ModelCard
    text: ModelText
    generations: dict[str, int]  # of every adapter in use, mixed or alone
    num_sequences: int
    quotas: Quotas
    fingerprint: str  # of the model's and the adapters' content

    def release(self) -> None:
        """Gives the credits back; more than once is harmless."""
        if self.num_sequences:
            self.quotas.leave(self.generations.keys())
        self.session.num_reserved -= self.num_sequences
        self.num_sequences = 0

    def binding(self, adapter: Adapter) -> tuple[int, list[MixMember]]:
        """For a Generate: a generation, or a mix of some."""
        if isinstance(adapter, Mix):
            return BASE_GENERATION, [MixMember(self.generations[name], weight) for name, weight in adapter.members]
        return (BASE_GENERATION if adapter is None else self.generations[adapter]), []


class Fleet:
    """All workers. They serve one model: one with another model than the first that answered gets no work."""

    def __init__(self, endpoints: Collection[str], build: str = "", quotas: Quotas | None = None) -> None:
        self._quotas = quotas or Quotas()
        self._lost = LostNames()
        gateway_id = os.urandom(16)
        self.workers = [WorkerClient(endpoint, gateway_id, build, self._lost) for endpoint in endpoints]

    def start(self) -> None:
        """Connects; returns at once."""
        for worker in self.workers:
            worker.start()

    async def close(self) -> None:
        """Closes every connection."""
        await asyncio.gather(*(worker.close() for worker in self.workers))

    def ready(self) -> list[WorkerClient]:
        """The workers that may be given work."""
        ready = [worker for worker in self.workers if worker.ready]
        if len(self.workers) == 1 or (model := self.model) is None:
            return ready
        return [worker for worker in ready if worker.model is not None and worker.model.digest == model.digest]

    @property
    def model(self) -> ModelCard | None:
        """The model that is served; known from the first connection on, even while no worker answers."""
        for worker in self.workers:
            if worker.model is not None:
                return worker.model
        return None

    def require_model(self) -> ModelCard:
        """The model, if a worker is there to run it; otherwise the 503."""
        model = self.model
        if model is None or not self.ready():
            raise unavailable()
        return model

    def require_text(self) -> ModelText:
        """The model's text side; a 503 without a worker."""
        text = next((worker.text for worker in self.ready() if worker.text is not None), None)
        if text is None:
            raise unavailable()
        return text

    def adapters(self) -> dict[str, AdapterInfo]:
        """The adapters that answer, by name, in the order of their loading. To be read only."""
        ready = self.ready()
        if len(ready) == 1:
            return ready[0].adapters
        found: dict[str, AdapterInfo] = {}
        for worker in ready:
            for name, info in worker.adapters.items():
                found.setdefault(name, info)
        return found

    def why_missing(self, unknown: UnknownAdapter) -> ApiError:
        """The 404 of a name that never was or was unloaded; a 503 if it went with a worker, for it may come again."""
        name = unknown.adapter
        if any(name in worker.adapters for worker in self.workers if not worker.ready):
            failure = unavailable(f"The worker that has the adapter {name!r} does not answer; try again shortly.")
        elif name in self._lost:
            failure = unavailable(
                f"The worker that had the adapter {name!r} was started again; load the adapter again."
            )
        else:
            return unknown
        failure.param = unknown.param
        return failure

    def admit(self, adapters: Collection[Adapter], num_sequences: int, again: bool = False) -> Lease:
        """Reserves a place for the sequences on the least loaded worker that has all the adapters.

        again: they had one, which was given back just now; their quotas have counted them.
        Raises a 503 without a worker, a 404 if an adapter is gone, a 429 if no worker has room.
        """
        ready = self.ready()
        if not ready:
            raise unavailable()
        names = names_of(adapters)
        able = [worker for worker in ready if all(name in worker.adapters for name in names)]
        if not able:
            missing = (name for name in names if not any(name in worker.adapters for worker in ready))
            raise model_not_found(next(missing, names[0]))
        worker = max(able, key=_num_free)
        session, model, text = worker.session, worker.model, worker.text
        assert session is not None and model is not None and text is not None
        if num_sequences > session.max_streams:
            message = f"n times the number of prompts must be at most {session.max_streams}."
            raise invalid("n", message)
        if _num_free(worker) < num_sequences:
            raise overloaded()
        self._quotas.enter(names, again)
        session.num_reserved += num_sequences
        generations = {name: worker.adapters[name].generation for name in names}
        contents = [model.digest, *sorted(worker.adapters[name].digest for name in names)]
        fingerprint = hashlib.sha256(" ".join(contents).encode()).hexdigest()[:12]
        return Lease(session, model, text, generations, num_sequences, self._quotas, fingerprint)

    async def load(
        self, name: str, source: str | None, pinned: bool | None, replace: bool, expected_generation: int | None = None
    ) -> AdapterReply:
        """Loads an adapter on every worker; the reply is the first that failed, or one of them."""
        loads = (w.load_adapter(name, source, pinned, replace, expected_generation) for w in self._require_ready())
        return _worst(await asyncio.gather(*loads))

    async def find(self, name: str) -> AdapterReply:
        """Has the workers' resolvers load an adapter that a request names."""
        ready = self._require_ready()
        loads = (worker.load_adapter(name, None, None, False, on_demand=True) for worker in ready)
        return _worst(await asyncio.gather(*loads))

    async def unload(
        self, name: str, timeout_ms: int, force: bool = False, expected_generation: int | None = None
    ) -> AdapterReply:
        """Unloads an adapter from every worker that has it; the reply is the first that failed, or one of them.

        What is unfinished in it is so on all of them together.
        """
        ready = self._require_ready()
        self._lost.forget(name)
        for worker in self.workers:
            worker.forget_if_lost(name)
        ready = [worker for worker in ready if name in worker.adapters] or ready
        unloads = (worker.unload_adapter(name, timeout_ms, force, expected_generation) for worker in ready)
        replies = await asyncio.gather(*unloads)
        worst = _worst(replies)
        if worst.usage is None:
            return worst
        num_unfinished = sum(reply.usage.num_unfinished for reply in replies if reply.usage is not None)
        usage = msgspec.structs.replace(worst.usage, num_unfinished=num_unfinished)
        return msgspec.structs.replace(worst, usage=usage)

    async def list_adapters(self, name: str | None = None) -> list[tuple[int, list[AdapterEntry], AdapterMemory]]:
        """What each worker has, with the worker's number; a 503 if none answers."""
        ready = self._require_ready()
        answers = await asyncio.gather(*(worker.list_adapters(name) for worker in ready), return_exceptions=True)
        lists = []
        for worker, answer in zip(ready, answers, strict=True):
            if isinstance(answer, SessionLost):
                continue
            if isinstance(answer, BaseException):
                raise answer
            lists.append((self.workers.index(worker), *answer))
        if not lists:
            raise unavailable()
        return lists

    def _require_ready(self) -> list[WorkerClient]:
        if not (ready := self.ready()):
            raise unavailable()
        return ready


def _num_free(worker: WorkerClient) -> int:
    session = worker.session
    return 0 if session is None else session.max_streams - session.num_reserved


def _worst(replies: list[AdapterReply]) -> AdapterReply:
    """The first failure, which says how many failed; or a worker that still drains; or any."""
    failed = [reply for reply in replies if reply.error is not None]
    if failed and (error := failed[0].error) is not None and len(failed) < len(replies):
        message = f"{error.message} ({len(failed)} of {len(replies)} workers failed; the others did it)"
        return AdapterReply(request_id=0, error=Error(error.code, message, error.param))
    draining = [reply for reply in replies if reply.adapter is not None and reply.adapter.state != AdapterState.REMOVED]
    return [*failed, *draining, *replies][0]
