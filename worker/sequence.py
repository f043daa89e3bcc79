"""Sequence: one prompt and the answer that grows behind it; and a sequence's share of one step."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import msgspec

from protocol.messages import BASE_GENERATION, TokenLogprobs
from protocol.sampling import SamplingParams

if TYPE_CHECKING:
    from worker.grammar import Matcher

BASE_CONTENT = 0  # of sequences of the base model


class SequenceStatus(Enum):
    """Where a sequence is. A preempted sequence is WAITING again."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence in the worker.

    Steps are launched before the tokens of the step before are known, so a sequence has known tokens and pending
    ones. num_computed_tokens of both together, never the last, are computed by steps that are launched; their KV
    stands in block_table when those are done, which whatever is launched later on the device may take as given.
    """

    sequence_id: int  # unique in the worker's life, increasing with arrival
    token_ids: list[int]  # the prompt, then the answer
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int  # sampling.seed, or one that the worker drew
    generation: int = BASE_GENERATION  # the adapter's, or a mix's number: see AdapterMixes; bound for its whole life
    content: int = BASE_CONTENT  # the number of its adapter's content, or of its mix: what steps go by
    client: str = ""  # whose share its tokens are counted in: see worker.fair_queue
    namespace: bytes = b""  # of its prefix-cache entries: adapter content digest and cache salt
    owner: object = None  # whom the outputs go to; the scheduler and the runner never look inside
    status: SequenceStatus = SequenceStatus.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending: int = 0  # tokens behind token_ids that launched steps choose and that the host does not know yet
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    num_preemptions: int = 0
    num_charged: int = 0  # of its answer's tokens, to its client
    arrival_s: float = 0.0  # monotonic
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the second token on, as far as known
    matcher: "Matcher | None" = None  # what the answer is held to; it has taken the answer's known tokens
    mixed: tuple[int, ...] = ()  # the generations in its mix, if it has one

    @property
    def adapters(self) -> tuple[int, ...]:
        """The generations that it needs; none: the base model."""
        return self.mixed or ((self.generation,) if self.generation != BASE_GENERATION else ())

    @property
    def num_output_tokens(self) -> int:
        """Of the answer, known ones."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Known and pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending - self.num_computed_tokens

    @property
    def has_last_token(self) -> bool:
        """Whether max_tokens is reached, pending ones counted: no step is to be launched for it any more."""
        return len(self.token_ids) + self.num_pending >= self.num_prompt_tokens + self.sampling.max_tokens

    def share(self, num_tokens: int) -> "ScheduledSequence":
        """Its next num_tokens tokens as its share of the next step."""
        start = self.num_computed_tokens
        return ScheduledSequence(self, start, num_tokens, num_tokens == self.num_uncomputed_tokens)


class ScheduledSequence(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A sequence's share of one step: num_tokens tokens are computed from `start` on.

    `samples` is true when they reach the sequence's end, so that the step chooses its next token.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        """The first token that is not computed; the one that the step chooses, if it samples."""
        return self.start + self.num_tokens

    @property
    def output_position(self) -> int:
        """Which token of the answer the step chooses, if it samples."""
        return self.start + self.num_tokens - self.sequence.num_prompt_tokens

    def book(self) -> None:
        """The step is launched: the share counts as computed."""
        self.sequence.num_computed_tokens = self.start + self.num_tokens
        self.sequence.num_pending += self.samples

    def undo(self) -> None:
        """Takes book back, the last step first. A sequence that was preempted since has nothing computed already."""
        self.sequence.num_pending -= self.samples
        if self.sequence.status is SequenceStatus.RUNNING:
            self.sequence.num_computed_tokens = self.start


class Sample(msgspec.Struct, frozen=True, gc=False):
    """The token that a step chose for one sequence.

    logprob and top are of the raw distribution (before temperature, penalties and filters), when asked for.
    `failed` says that the logits held NaN or infinity: the token means nothing and the sequence must fail.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    failed: bool = False
