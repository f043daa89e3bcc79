"""Sequence: one prompt and the answer that grows behind it; and a sequence's share of one step."""

from dataclasses import dataclass, field
from enum import Enum, auto

from protocol.messages import BASE_GENERATION
from protocol.sampling import SamplingParams


class SequenceStatus(Enum):
    """Where a sequence is. A preempted sequence is WAITING again."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence in the worker.

    0 <= num_cached_tokens and 0 <= num_computed_tokens <= len(token_ids), and the KV of the first
    num_computed_tokens tokens stands in block_table.
    """

    sequence_id: int  # unique in the worker's life, increasing with arrival
    token_ids: list[int]  # the prompt, then the answer
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int  # sampling.seed, or one that the worker drew
    generation: int = BASE_GENERATION  # the adapter's; bound for the sequence's whole life
    namespace: bytes = b""  # of its prefix-cache entries: adapter content digest and cache salt
    owner: object = None  # whom the outputs go to; the scheduler and the runner never look inside
    status: SequenceStatus = SequenceStatus.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    num_preemptions: int = 0
    arrival_s: float = 0.0  # monotonic

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(slots=True, frozen=True)
class ScheduledSequence:
    """A sequence's share of one step: its next num_tokens tokens are computed.

    `samples` is true when they reach the end of token_ids, so that the step yields the sequence's next token.
    """

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        return self.num_tokens == self.sequence.num_uncomputed_tokens


@dataclass(slots=True, frozen=True)
class Sample:
    """The token that a step chose for one sequence.

    logprob and top are of the raw distribution (before temperature, penalties and filters), when asked for.
    `failed` says that the logits held NaN or infinity: the token means nothing and the sequence must fail.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    failed: bool = False
