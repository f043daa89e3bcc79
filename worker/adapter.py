"""Adapter: what is known of one generation, a name bound to exact content; its books are the adapter cache's."""

from dataclasses import dataclass

from protocol.messages import AdapterInfo, AdapterState, AdapterUsage


@dataclass(slots=True, kw_only=True, eq=False)
class Adapter:
    """One generation of an adapter."""

    generation: int
    name: str
    digest: str
    source: str
    rank: int
    modules: tuple[str, ...]
    num_bytes: int
    stored_bytes: int  # in the private store
    num_chunks: int
    pinned: bool
    created: int  # unix seconds
    state: AdapterState = AdapterState.READY
    unloaded: bool = False  # taken away on purpose: nothing new may start on it, unlike on a replaced one
    num_sequences: int = 0  # unfinished sequences bound to it
    num_running: int = 0  # those of them whose steps need it on the device
    chunk_ids: tuple[int, ...] = ()  # its pages of the arena; empty: not on the device
    arriving: bool = False  # its copy to chunk_ids is not done
    is_sum: bool = True  # so that it may be weighted and added to others: see adapter_weights.Parts
    reserved: bool = False  # a waiting mix has it on the device already and waits for others
    used_at: int = 0  # the arena's tick at which it came to the device or a sequence last ran with it
    in_host: bool = False
    num_requests: int = 0  # sequences ever bound to it
    num_hits: int = 0
    num_misses: int = 0
    missed: bool = False  # a sequence waits for its copy
    last_used: int = 0  # unix seconds

    @property
    def idle(self) -> bool:
        """Whether its chunks may go to another adapter, or to KV."""
        is_needed = self.num_running or self.pinned or self.arriving or self.reserved
        return bool(self.chunk_ids) and not is_needed

    def info(self) -> AdapterInfo:
        """As gateways see it."""
        return AdapterInfo(
            name=self.name,
            generation=self.generation,
            digest=self.digest,
            state=self.state,
            source=self.source,
            pinned=self.pinned,
            rank=self.rank,
            modules=list(self.modules),
            num_bytes=self.num_bytes,
            created=self.created,
        )

    def usage(self) -> AdapterUsage:
        """Where its content is and how it was used."""
        return AdapterUsage(
            device_bytes=self.num_bytes if self.chunk_ids else 0,
            host_bytes=self.num_bytes if self.in_host else 0,
            disk_bytes=0 if self.state is AdapterState.REMOVED else self.stored_bytes,
            num_unfinished=self.num_sequences,
            num_requests=self.num_requests,
            num_hits=self.num_hits,
            num_misses=self.num_misses,
            last_used=self.last_used,
        )
