"""Every message between gateway and worker: one tagged union of commands and one of events.

A connection is: Hello → Welcome (or Reject), then commands one way and events the other until either side is gone.
Request ids are chosen by the gateway, unique within its session, and used once.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from protocol.errors import Error
from protocol.sampling import SamplingParams, TokenId

BASE_GENERATION = 0  # the base model, no adapter
MAX_LISTED_ADAPTERS = 500  # in one Welcome or AdapterList, so that none outgrows a frame
MAX_MIX = 8  # adapters in a mix
MAX_MIX_WEIGHT = 100.0  # of a mix's adapter, either sign

AdapterName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"\A[A-Za-z0-9][A-Za-z0-9._:/-]*\Z")]
ProcessId = Annotated[bytes, Meta(min_length=16, max_length=16)]  # random at each boot
Unsigned = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class FinishReason(StrEnum):
    """Why a sequence ended of itself. A sequence that failed carries an Error instead."""

    STOP = "stop"  # end-of-text token or one of stop_token_ids
    LENGTH = "length"  # max_tokens or the end of the context


class AdapterState(StrEnum):
    """Where an adapter generation is in its life, as far as a gateway must know."""

    READY = "ready"  # its name answers
    DRAINING = "draining"  # its name has moved or is gone; its streams finish
    REMOVED = "removed"  # nothing of it is left


# -------------------------------------------------------------------------------------- what both sides describe


class ModelCard(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The base model as gateways show it and as both sides check requests against."""

    names: list[str]  # the served names; the first is the one shown
    digest: str
    created: int  # unix seconds at which the worker started
    vocab_size: Annotated[int, Meta(ge=1)]
    max_model_len: Annotated[int, Meta(ge=1)]  # prompt and answer together, tokens
    eos_token_ids: list[TokenId]
    lora_enabled: bool
    adapter_resolver: bool = False  # whether a name that is not loaded may be found and loaded on first use
    prompt_logprobs: bool = False  # whether this worker can give the logprobs of a prompt's tokens
    grammars: bool = False  # whether it can hold answers to grammars


class AdapterInfo(Struct, frozen=True, kw_only=True):
    """One generation of an adapter: a name bound to exact content."""

    name: AdapterName
    generation: Annotated[int, Meta(ge=1)]  # increases with every load of this worker's life
    digest: str  # SHA-256 of the content
    state: AdapterState
    source: str  # as the operator gave it; for admin routes only
    pinned: bool
    rank: int
    modules: list[str]
    num_bytes: int
    created: int  # unix seconds of the load


class AdapterUsage(Struct, frozen=True, kw_only=True):
    """Where a generation's content is, and how it was used. Bytes are 0 where it is not."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int  # its copy in the worker's store; generations of equal content share one
    num_unfinished: int  # sequences bound to it
    num_requests: int  # sequences ever bound to it
    num_hits: int  # times that a sequence found it on the device when its turn came
    num_misses: int  # times that one had to wait for the copy
    last_used: int  # unix seconds at which the last sequence came or ended; 0: never


class AdapterEntry(Struct, frozen=True, kw_only=True):
    """One line of an AdapterList: a generation, a load at work (no info yet), or a load that failed (an error)."""

    name: AdapterName
    source: str  # as it was given; for admin routes only
    info: AdapterInfo | None = None
    usage: AdapterUsage | None = None
    error: Error | None = None


class AdapterMemory(Struct, frozen=True, kw_only=True):
    """What adapters take of the worker, all of them together."""

    chunk_bytes: int  # of rank 16
    chunks_total: int  # the most that adapters may take on the device, where KV takes what they leave
    chunks_free: int
    host_adapters: int
    host_adapters_max: int
    host_bytes: int
    disk_bytes: int


class FileInfo(Struct, frozen=True):
    """A tokenizer file that the gateway fetches from the worker."""

    name: str
    size: int
    sha256: str


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """What the worker says of itself in every heartbeat. Counters run from the start of the process."""

    step_number: int
    step_age_ms: int  # since the running step began; 0 when idle
    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    block_size: int
    prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int
    prefix_cache_queries_total: int  # prompt tokens looked up
    prefix_cache_hits_total: int  # prompt tokens found
    adapter_loads_total: int
    adapter_uploads_total: int
    running_adapters: list[str]
    waiting_adapters: list[str]
    max_loras_per_batch: int


# ------------------------------------------------------------------------------------ commands: gateway → worker


class Command(Struct, tag_field="type", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all commands. The worker refuses unknown types and unknown fields."""


class Hello(Command, frozen=True, kw_only=True, tag="hello"):
    """Opens a session. A new session of the same gateway ends everything of its older ones."""

    protocol_min: Unsigned
    protocol_max: Unsigned
    gateway: ProcessId
    build: str


class MixMember(Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter of a weighted sum of adapters: what it adds to the base model counts `weight` times."""

    generation: Annotated[int, Meta(ge=1)]
    weight: Annotated[float, Meta(ge=-MAX_MIX_WEIGHT, le=MAX_MIX_WEIGHT)]


class Generate(Command, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """Starts a sequence. Answered by Outputs until one carries a finish reason or an error."""

    request_id: Unsigned
    prompt_token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    sampling: SamplingParams
    generation: Unsigned = BASE_GENERATION  # the adapter generation that the gateway bound the request to
    # In its place, a weighted sum of generations, each there once. An adapter of weight 1 alone is no mix.
    mix: Annotated[list[MixMember], Meta(max_length=MAX_MIX)] = []
    cache_salt: Annotated[str, Meta(max_length=128)] = ""  # prefix-cache entries are shared under the same salt only
    trace: Annotated[str, Meta(max_length=128)] = ""  # the HTTP request's id, for the log


class Abort(Command, frozen=True, kw_only=True, tag="abort"):
    """Ends a sequence; nothing more is said of it. Unknown ids are ignored: it may have ended already."""

    request_id: Unsigned


class LoadAdapter(Command, frozen=True, kw_only=True, tag="load_adapter"):
    """Loads, or with `replace` reloads, an adapter under a name. Answered by one AdapterReply.

    Without a source the name must answer in the end: it does already, and only its pin may change, or the worker's
    resolver finds it, with `replace` once more. A load never replaces what one that began after it has brought.
    """

    request_id: Unsigned
    name: AdapterName
    source: Annotated[str, Meta(min_length=1, max_length=4096)] | None
    pinned: bool | None = None  # None: as it is; a new adapter is not
    replace: bool = False
    expected_generation: Unsigned | None = None  # only if this generation holds the name; 0: only if none does
    on_demand: bool = False  # for a request, not for an administrator: what was unloaded on purpose stays away


class UnloadAdapter(Command, frozen=True, kw_only=True, tag="unload_adapter"):
    """Takes the name away at once, lets its streams finish, then frees. Answered by one AdapterReply.

    Loads of the name that are at work are cancelled; if there was nothing else, the reply carries no adapter. A name
    that is gone but still drains is waited for, or forced, once more.
    """

    request_id: Unsigned
    name: AdapterName
    timeout_ms: Annotated[int, Meta(ge=0, le=3_600_000)]  # how long to wait for the streams before replying
    force: bool = False  # fail the streams instead of waiting
    expected_generation: Unsigned | None = None  # only if this generation holds the name


class ListAdapters(Command, frozen=True, kw_only=True, tag="list_adapters"):
    """Asks what is loaded, loading or draining. Answered by one AdapterList, however long the running step takes."""

    request_id: Unsigned
    name: AdapterName | None = None  # of this name only
    after: Unsigned = 0  # generations above this one; with 0 the loads at work and those that failed come first


class FetchFile(Command, frozen=True, kw_only=True, tag="fetch_file"):
    """Asks for a piece of a tokenizer file. Answered by one FileChunk."""

    request_id: Unsigned
    name: Annotated[str, Meta(max_length=128)]
    offset: Unsigned


class GatewayHeartbeat(Command, frozen=True, kw_only=True, tag="heartbeat"):
    """Keeps the session's lease; says how far the gateway has read."""

    last_seq_seen: Unsigned


class Goodbye(Command, frozen=True, kw_only=True, tag="goodbye"):
    """The gateway closes the session."""


AnyCommand = (
    Hello | Generate | Abort | LoadAdapter | UnloadAdapter | ListAdapters | FetchFile | GatewayHeartbeat | Goodbye
)


# -------------------------------------------------------------------------------------- events: worker → gateway


class Event(Struct, tag_field="type", frozen=True, kw_only=True):
    """Base of all events. A gateway reads past fields that it does not know."""


class Welcome(Event, frozen=True, kw_only=True, tag="welcome"):
    """Accepts a session."""

    protocol: Unsigned
    worker: ProcessId  # also the epoch of everything that follows
    model: ModelCard
    files: list[FileInfo]
    adapters: list[AdapterInfo]
    credits: Annotated[int, Meta(ge=1)]  # sequences that this session may have unfinished
    status: WorkerStatus


class Reject(Event, frozen=True, kw_only=True, tag="reject"):
    """Refuses or ends a session; `reason` is for the log. The gateway opens a new one or gives up."""

    reason: str
    protocol_min: Unsigned
    protocol_max: Unsigned


class TokenLogprobs(Struct, frozen=True):
    """The logprob of a chosen token and of the likeliest ones at its place, best first."""

    logprob: float
    top: list[tuple[int, float]] = []


class Output(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step brought for one sequence. Token `offset` of the answer is token_ids[0]."""

    request_id: Unsigned
    offset: Unsigned
    token_ids: list[TokenId]
    logprobs: list[TokenLogprobs] | None = None  # one for each token, when asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # one for each but the prompt's first; in the first output
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop_token_ids member or end-of-text token that ended it; part of token_ids
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache; said in the first output
    error: Error | None = None


class Outputs(Event, frozen=True, kw_only=True, tag="outputs"):
    """Everything that one engine step brought for one gateway."""

    outputs: list[Output]


class AdapterReply(Event, frozen=True, kw_only=True, tag="adapter_reply"):
    """How a LoadAdapter or UnloadAdapter ended. The AdapterChanged that it caused was sent before it."""

    request_id: Unsigned
    adapter: AdapterInfo | None = None
    usage: AdapterUsage | None = None
    error: Error | None = None


class AdapterList(Event, frozen=True, kw_only=True, tag="adapter_list"):
    """At most MAX_LISTED_ADAPTERS generations, oldest first; `more` follow after the last of them."""

    request_id: Unsigned
    adapters: list[AdapterEntry]
    more: bool
    memory: AdapterMemory


class AdapterChanged(Event, frozen=True, kw_only=True, tag="adapter_changed"):
    """An adapter generation came to be or changed state; sent to every session, whoever caused it."""

    adapter: AdapterInfo


class FileChunk(Event, frozen=True, kw_only=True, tag="file_chunk"):
    """A piece of a tokenizer file; at most FILE_CHUNK_BYTES."""

    request_id: Unsigned
    data: bytes
    error: Error | None = None


class WorkerHeartbeat(Event, frozen=True, kw_only=True, tag="heartbeat"):
    """The worker lives, and how its engine is doing; credits are the absolute number, not a difference."""

    last_seq_seen: Unsigned
    credits: int
    status: WorkerStatus


AnyEvent = Welcome | Reject | Outputs | AdapterReply | AdapterList | AdapterChanged | FileChunk | WorkerHeartbeat


# ----------------------------------------------------------------------------------------------------- envelopes


class CommandEnvelope(Struct, frozen=True, forbid_unknown_fields=True):
    """One frame to the worker. Hello travels with an empty epoch and seq 0."""

    epoch: bytes
    session: Unsigned
    seq: Unsigned
    body: AnyCommand


class EventEnvelope(Struct, frozen=True):
    """One frame to the gateway. Welcome and Reject travel with seq 0."""

    epoch: bytes
    session: Unsigned
    seq: Unsigned
    body: AnyEvent
