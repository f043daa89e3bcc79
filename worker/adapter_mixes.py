"""AdapterMixes: weighted sums of adapters that sequences are bound to. To the rest of the worker a mix is one adapter.

A mix has a number below 0 where an adapter has its generation: sequences are grouped by it, the scheduler asks for it,
and AdapterPool.resident knows it. Everything here runs on the engine thread.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.errors import Error, ErrorCode
from protocol.messages import BASE_GENERATION, MixMember
from worker.adapter import Adapter
from worker.adapter_loads import GONE, Failure
from worker.scheduler import Admission

if TYPE_CHECKING:
    from worker.adapter_pool import AdapterPool
    from worker.adapter_service import AdapterService

# Generations and their weights, in the order in which they are summed.
Weighted = tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Mix:
    """One mix, as long as a sequence is bound to it."""

    number: int
    adapters: list[Adapter]
    weighted: Weighted
    namespace: bytes  # of its KV
    client: str  # whose share its tokens are counted in: that of its largest weight
    num_sequences: int = 0

    @property
    def generations(self) -> tuple[int, ...]:
        """Of its adapters."""
        return tuple(generation for generation, _ in self.weighted)


class AdapterMixes:
    """All mixes in use."""

    def __init__(
        self, service: "AdapterService", pool: "AdapterPool", failures: list[Failure], max_chunks: int
    ) -> None:
        """pool: it is told what each number stands for. max_chunks: of a mix's adapters together.

        failures: where the engine looks for sequences that must end.
        """
        self._service = service
        self._cache = service.cache
        self._pool = pool
        self._failures = failures
        self._max_chunks = max_chunks
        self._mixes: dict[int, Mix] = {}
        self._numbers: dict[Weighted, int] = {}
        self._last_number = BASE_GENERATION
        self._reserved: list[Adapter] = []

    def bind(self, members: list[MixMember]) -> Mix | Error:
        """Holds every generation of a mix for a new sequence, to its end; or none."""
        adapters: list[tuple[Adapter, float]] = []
        for member in members:
            adapter = self._cache.get(member.generation)
            if adapter is None or adapter.unloaded:
                return GONE
            adapters.append((adapter, member.weight))
        # Floats are not added in any order alike, and cached KV is exact: the order is that of the content.
        adapters.sort(key=lambda entry: (entry[0].digest, entry[0].generation))
        error = _check_members(adapters) or self._cache.check_mix([a for a, _ in adapters], self._max_chunks)
        if error is not None:
            return error
        weighted = tuple((adapter.generation, weight) for adapter, weight in adapters)
        mix = self._mixes.get(self._numbers.get(weighted, BASE_GENERATION)) or self._begin(adapters, weighted)
        mix.num_sequences += 1
        for adapter in mix.adapters:
            self._cache.retain(adapter)
        return mix

    def _begin(self, adapters: list[tuple[Adapter, float]], weighted: Weighted) -> Mix:
        self._last_number -= 1
        namespace = b"".join(f"{adapter.digest}*{weight!r}+".encode() for adapter, weight in adapters)
        heaviest, _ = max(adapters, key=lambda entry: abs(entry[1]))
        mix = Mix(self._last_number, [adapter for adapter, _ in adapters], weighted, namespace, heaviest.name)
        self._mixes[mix.number] = mix
        self._numbers[weighted] = mix.number
        self._pool.mixes[mix.number] = tuple((adapter.content.number, weight) for adapter, weight in adapters)
        return mix

    def unbind(self, number: int) -> None:
        """Undoes one bind."""
        mix = self._mixes[number]
        mix.num_sequences -= 1
        if not mix.num_sequences:
            del self._mixes[number], self._numbers[mix.weighted], self._pool.mixes[number]
        for generation in mix.generations:
            self._service.unbind(generation)

    def acquire(self, number: int) -> Admission:
        """For the scheduler: brings all to the device, then holds all. Until then none is held, so nothing can lock up.

        What is there already is kept for it from those that ask later in the same step, or two mixes in a small pool
        could take each other's adapters for ever.
        """
        mix = self._mixes[number]
        for adapter in mix.adapters:
            if adapter.on_device:
                self._reserve(adapter)
        admissions = set()
        for adapter in mix.adapters:
            admissions.add(self._service.bring(adapter))
            if adapter.on_device:
                self._reserve(adapter)
        if admissions == {Admission.GRANTED}:
            for adapter in mix.adapters:
                self._cache.hold(adapter)
                self._cache.host.touch(adapter)
                self._cache.set_reserved(adapter, False)  # held, it needs no more
            return Admission.GRANTED
        if Admission.FULL not in admissions:
            return Admission.LOADING
        error = self._cache.check_mix(mix.adapters, self._max_chunks)
        if error is not None:  # others have been pinned since
            self._failures.append(Failure(number, error, waiting_only=True))
        return Admission.FULL

    def release(self, number: int) -> None:
        """For the scheduler: undoes one granted acquire."""
        for generation in self._mixes[number].generations:
            self._service.release(generation)

    def _reserve(self, adapter: Adapter) -> None:
        if not adapter.reserved:
            self._cache.set_reserved(adapter, True)
            self._reserved.append(adapter)

    def unreserve(self) -> None:
        """Before each step: who asks first in it has the choice."""
        for adapter in self._reserved:
            self._cache.set_reserved(adapter, False)
        self._reserved.clear()


def _check_members(adapters: list[tuple[Adapter, float]]) -> Error | None:
    """Why these cannot be weighted and added."""
    for adapter, _ in adapters:
        if not adapter.content.is_sum:
            message = (
                f"adapter '{adapter.name}' cannot be mixed or scaled: it has DoRA's magnitudes, or changes embed_tokens"
                " or lm_head"
            )
            return Error(ErrorCode.INVALID_REQUEST, message, "lora_path")
    return None
