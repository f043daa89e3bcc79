"""Adapter: what is known of one generation, a name bound to exact content; and of the content, which names may share.

Their books are the adapter cache's.
"""

from dataclasses import dataclass, field

from protocol.messages import AdapterInfo, AdapterState, AdapterUsage


@dataclass(slots=True, kw_only=True, eq=False)
class Content:
    """What a digest stands for. It is on the device once at the most, whatever number of generations has it."""

    digest: str
    rank: int
    modules: tuple[str, ...]
    num_bytes: int
    stored_bytes: int  # in the private store
    num_chunks: int
    is_sum: bool = True  # so that it may be weighted and added to others: see adapter_weights.Parts
    # By it sequences, steps and the pool know the content. Given with its first generation, above 0, never reused.
    number: int = 0
    generations: set[int] = field(default_factory=set)  # those that have it
    needed_by: set[int] = field(default_factory=set)  # those of them for which it has to stay on the device
    num_sequences: int = 0  # unfinished ones, of all of them
    chunk_ids: tuple[int, ...] = ()  # its pages of the arena; empty: not on the device
    arriving: bool = False  # its copy to chunk_ids is not done
    used_at: int = 0  # the arena's tick at which it came to the device or a sequence last ran with it

    @property
    def idle(self) -> bool:
        """Whether its chunks may go to another adapter, or to KV."""
        return bool(self.chunk_ids) and not self.arriving and not self.needed_by


@dataclass(slots=True, kw_only=True, eq=False)
class Adapter:
    """One generation of an adapter."""

    generation: int
    name: str
    content: Content
    source: str
    pinned: bool
    created: int  # unix seconds
    state: AdapterState = AdapterState.READY
    unloaded: bool = False  # taken away on purpose: nothing new may start on it, unlike on a replaced one
    num_sequences: int = 0  # unfinished sequences bound to it
    num_running: int = 0  # those of them whose steps need it on the device
    reserved: bool = False  # a waiting mix has it on the device already and waits for others
    in_host: bool = False
    num_requests: int = 0  # sequences ever bound to it
    num_hits: int = 0
    num_misses: int = 0
    missed: bool = False  # a sequence waits for its copy
    last_used: int = 0  # unix seconds

    @property
    def digest(self) -> str:
        """Of its content."""
        return self.content.digest

    @property
    def num_chunks(self) -> int:
        """Of its content, on the device and in host memory."""
        return self.content.num_chunks

    @property
    def on_device(self) -> bool:
        """Whether its content is there, or on its way."""
        return bool(self.content.chunk_ids)

    @property
    def needs_device(self) -> bool:
        """Whether its content must not leave the device."""
        return self.num_running > 0 or self.pinned or self.reserved

    def info(self) -> AdapterInfo:
        """As gateways see it."""
        return AdapterInfo(
            name=self.name,
            generation=self.generation,
            digest=self.digest,
            state=self.state,
            source=self.source,
            pinned=self.pinned,
            rank=self.content.rank,
            modules=list(self.content.modules),
            num_bytes=self.content.num_bytes,
            created=self.created,
        )

    def usage(self) -> AdapterUsage:
        """Where its content is and how it was used. What generations share, each of them says."""
        is_removed = self.state is AdapterState.REMOVED
        return AdapterUsage(
            device_bytes=self.content.num_bytes if self.on_device and not is_removed else 0,
            host_bytes=self.content.num_bytes if self.in_host else 0,
            disk_bytes=0 if is_removed else self.content.stored_bytes,
            num_unfinished=self.num_sequences,
            num_requests=self.num_requests,
            num_hits=self.num_hits,
            num_misses=self.num_misses,
            last_used=self.last_used,
        )
