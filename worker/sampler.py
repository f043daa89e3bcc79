"""Sampler: chooses a token from each row of logits, as the row's sequence asks, on the logits' device.

What a row gets depends on its logits and its sequence alone, not on the other rows: each filter looks at one row, and
the random number is a function of the sequence's seed and the output's position. On a GPU everything is enqueued and
nothing waits; the host reads the choices when it needs them.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protocol.sampling import MAX_LOGPROBS, SamplingParams
from worker.grammar import GrammarError
from worker.sequence import ScheduledSequence, SequenceStatus
from worker.transfer import upload

# Candidates that top-p looks at first: sorting a whole vocabulary of 49152 costs 10 times as much as finding these.
NUM_TOP_P_CANDIDATES = 256
_MASK64 = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), fixed by a sequence's seed and an output position (splitmix64 of both, 52 bits)."""
    value = _splitmix64(_splitmix64(seed & _MASK64) ^ position)
    return (value >> 12) * 2.0**-52  # at most 1 - 2^-52: its product with a sum stays below the sum


def _splitmix64(value: int) -> int:
    """Steele, Lea and Flood, 2014: neighbouring inputs give unrelated outputs."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def is_plain_greedy(scheduled: ScheduledSequence) -> bool:
    """Whether the share's token is simply the best, and nothing else is asked for."""
    params = scheduled.sequence.sampling
    return (
        params.temperature == 0
        and params.logprobs is None
        and not params.logit_bias
        and not needs_known_tokens(params)
        and scheduled.output_position >= params.min_tokens
    )


def needs_known_tokens(params: SamplingParams) -> bool:
    """Whether the choice depends on the tokens so far, all of which must be known then."""
    has_penalties = (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )
    return has_penalties or params.grammar is not None


@dataclass(frozen=True, slots=True)
class Choices:
    """One token a row, and logprobs of the raw distribution for the rows that ask. Tensors on the logits' device."""

    tokens: Tensor  # int64 [num_rows]; -1: the row's logits are not numbers
    wanting: list[int]  # rows that asked for logprobs
    logprobs: Tensor | None = None  # float32 [num_wanting, 1 + k]: the chosen token's, and those of the k likeliest
    likeliest: Tensor | None = None  # int64 [num_wanting, k], best first


@dataclass(frozen=True, slots=True)
class Draws:
    """What rows that are drawn at random ask for: one entry a row, tensors [num_rows] on the logits' device."""

    params: list[SamplingParams]  # on the host, to tell what work there is
    temperatures: Tensor  # float32, above 0
    top_k: Tensor  # int64, 1 to vocab_size
    top_p: Tensor  # float64, up to 1
    min_p: Tensor  # float32, from 0
    uniforms: Tensor  # float64 in [0, 1)

    @classmethod
    def of(cls, params: list[SamplingParams], uniforms: list[float], vocab_size: int, device: torch.device) -> "Draws":
        """One copy to the device."""
        top_k = [min(p.top_k or vocab_size, vocab_size) for p in params]
        rows = [[p.temperature for p in params], top_k, [p.top_p for p in params], [p.min_p for p in params], uniforms]
        data = upload(torch.tensor(rows, dtype=torch.float64), device)
        return cls(params, data[0].float(), data[1].long(), data[2], data[3].float(), data[4])


# logits float32 [num_rows, vocab_size], not to be changed -> int64 [num_rows] in 0 to vocab_size; what a row with
# values that are not numbers gets does not matter.
Draw = Callable[[Tensor, Draws], Tensor]


class Sampler:
    """Chooses tokens. Work that no row of a batch asks for is not done."""

    def __init__(self, eos_token_ids: tuple[int, ...], draw: Draw | None = None) -> None:
        """draw: what chooses at random; sample_tokens if left out."""
        self._eos_token_ids = eos_token_ids
        self._draw = draw or sample_tokens

    def choose(self, logits: Tensor, batch: list[ScheduledSequence]) -> Choices:
        """logits float32 [num_rows, vocab_size], which may be changed; one share a row, that samples."""
        params = [scheduled.sequence.sampling for scheduled in batch]
        finite = logits.sum(dim=-1).isfinite()  # one NaN or infinity is in the sum as well
        wanting = [row for row, p in enumerate(params) if p.logprobs is not None]
        raw = _rows(logits, wanting).log_softmax(dim=-1) if wanting else None
        self._edit(logits, batch)
        tokens = self._choose(logits, batch).masked_fill_(~finite, -1)
        if raw is None:
            return Choices(tokens, [])
        of_wanting = _rows(tokens, wanting).clamp(min=0)
        # Always as many as anyone may ask for: among equals, topk's choice may depend on the number.
        num_top = min(MAX_LOGPROBS, raw.shape[-1]) if any(params[row].logprobs for row in wanting) else 0
        best = raw.topk(num_top, dim=-1)
        logprobs = torch.cat((raw.gather(-1, of_wanting[:, None]), best.values), dim=-1)
        return Choices(tokens, wanting, logprobs, best.indices)

    def _edit(self, logits: Tensor, batch: list[ScheduledSequence]) -> None:
        """Applies bias, penalties and the min_tokens mask to the rows that ask, in place."""
        vocab_size = logits.shape[-1]
        biases, repetitions, counted, masked = _Edits(), _Edits(), _Edits(), _Edits()
        for row, scheduled in enumerate(batch):
            sequence, first = scheduled.sequence, row * vocab_size
            sampling = sequence.sampling
            if sampling.logit_bias:
                ids = [token for token in sampling.logit_bias if token < vocab_size]
                biases.add(first, ids, torch.tensor([sampling.logit_bias[token] for token in ids]))
            if sampling.repetition_penalty != 1.0:
                ids = list(set(sequence.token_ids))
                repetitions.add(first, ids, torch.full((len(ids),), sampling.repetition_penalty))
            if sampling.presence_penalty or sampling.frequency_penalty:
                counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
                numbers = torch.tensor(list(counts.values()))
                counted.add(first, list(counts), -(sampling.presence_penalty + sampling.frequency_penalty * numbers))
            is_over = sequence.matcher is not None and sequence.matcher.is_over  # then nothing else is allowed
            if scheduled.output_position < sampling.min_tokens and not is_over:
                stops = {*self._eos_token_ids, *sampling.stop_token_ids}
                masked.add(first, [token for token in stops if token < vocab_size], torch.empty(0))
        flat = logits.view(-1)
        if biases.places:
            flat.index_add_(0, *biases.upload(flat.device))
        if repetitions.places:
            places, penalties = repetitions.upload(flat.device)
            seen = flat.index_select(0, places)
            flat.index_copy_(0, places, torch.where(seen > 0, seen / penalties, seen * penalties))
        if counted.places:
            flat.index_add_(0, *counted.upload(flat.device))
        if masked.places:
            flat.index_fill_(0, masked.upload(flat.device)[0], -torch.inf)
        _hold_to_grammars(logits, batch)

    def _choose(self, logits: Tensor, batch: list[ScheduledSequence]) -> Tensor:
        drawn = [row for row, scheduled in enumerate(batch) if scheduled.sequence.sampling.temperature > 0]
        if not drawn:
            return logits.argmax(dim=-1)
        draws = Draws.of(
            [batch[row].sequence.sampling for row in drawn],
            [uniform(batch[row].sequence.seed, batch[row].output_position) for row in drawn],
            logits.shape[-1],
            logits.device,
        )
        tokens = self._draw(_rows(logits, drawn), draws)
        if len(drawn) == len(batch):
            return tokens
        return logits.argmax(dim=-1).index_copy_(0, upload(torch.tensor(drawn), logits.device), tokens)


@dataclass(slots=True)
class _Edits:
    """Places in all rows' logits, each at most once, and an amount for each."""

    places: list[int] = field(default_factory=list)
    amounts: list[Tensor] = field(default_factory=list)

    def add(self, first: int, token_ids: list[int], amounts: Tensor) -> None:
        self.places.extend(first + token for token in token_ids)
        self.amounts.append(amounts)

    def upload(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 places, float32 amounts."""
        return upload(torch.tensor(self.places), device), upload(torch.cat(self.amounts).float(), device)


def _hold_to_grammars(logits: Tensor, batch: list[ScheduledSequence]) -> None:
    """Takes every token away that a row's grammar does not allow, in place. Whatever it costs is theirs alone."""
    rows, masks = [], []
    for row, scheduled in enumerate(batch):
        sequence = scheduled.sequence
        if sequence.matcher is not None and sequence.status is not SequenceStatus.FINISHED:
            # A grammar past its limits allows everything here and fails its sequence when it is told the token.
            with contextlib.suppress(GrammarError):
                masks.append(sequence.matcher.mask())
                rows.append(row)
    if not rows:
        return
    packed = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8).view(len(rows), -1)
    bits = upload(packed, logits.device)[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    allowed = bits.view(len(rows), -1)[:, : logits.shape[-1]].bool()
    places = upload(torch.tensor(rows), logits.device)
    logits.index_copy_(0, places, logits.index_select(0, places).masked_fill_(~allowed, -torch.inf))


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    """Some rows, in ascending order; all of them are the tensor itself."""
    if len(rows) == len(values):
        return values
    return values.index_select(0, upload(torch.tensor(rows), values.device))


def sample_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """One token a row: temperature, top_k, top_p, min_p, then one draw by the inverse of the distribution function.

    logits float32 [num_rows, vocab_size] -> int64 [num_rows].
    """
    # The best logit is moved to 0 first: then no temperature, however small, overflows.
    probs = (logits - logits.amax(dim=-1, keepdim=True)).div_(draws.temperatures[:, None]).softmax(dim=-1)
    filtered = [row for row, p in enumerate(draws.params) if p.top_k or p.top_p < 1.0]
    if filtered:
        params = [draws.params[row] for row in filtered]
        top_k, top_p = _rows(draws.top_k, filtered), _rows(draws.top_p, filtered)
        cutoffs = _cutoffs(_rows(probs, filtered), params, top_k[:, None], top_p[:, None])
        if len(filtered) < len(probs):
            places = upload(torch.tensor(filtered), probs.device)
            cutoffs = torch.zeros(len(probs), device=probs.device).index_copy_(0, places, cutoffs)
        probs.masked_fill_(probs < cutoffs[:, None], 0.0)
    if any(p.min_p for p in draws.params):
        probs.masked_fill_(probs < draws.min_p[:, None] * probs.amax(dim=-1, keepdim=True), 0.0)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    targets = draws.uniforms[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target: never one of probability 0.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _cutoffs(probs: Tensor, params: list[SamplingParams], top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability that top_k and then top_p keep, each row's own. Equals of it are kept as well.

    probs [num_rows, vocab_size]; top_k, top_p [num_rows, 1], params the same on the host -> [num_rows].
    """
    vocab_size = probs.shape[-1]
    most = max(p.top_k for p in params)
    if any(p.top_p < 1.0 and not p.top_k for p in params):
        # Whether the first candidates are enough is known on the device: a GPU sorts all rather than be asked.
        most = vocab_size if probs.is_cuda else max(most, NUM_TOP_P_CANDIDATES)
    best = probs.topk(min(most, vocab_size), dim=-1).values
    cutoffs, is_found = _cut_sorted(best, top_k, top_p, vocab_size)
    if not probs.is_cuda:
        for row in [row for row, found in enumerate(is_found.tolist()) if not found]:
            ordered = probs[row : row + 1].sort(dim=-1, descending=True).values
            cutoffs[row] = _cut_sorted(ordered, top_k[row : row + 1], top_p[row : row + 1], vocab_size)[0][0]
    return cutoffs


def _cut_sorted(ordered: Tensor, top_k: Tensor, top_p: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Cutoffs from a row's best probabilities, and whether these were enough to tell.

    ordered [num_rows, num_candidates], descending; top_k, top_p [num_rows, 1] -> [num_rows], bool [num_rows].
    """
    num_candidates = ordered.shape[-1]
    in_top_k = torch.arange(num_candidates, device=ordered.device) < top_k
    kept = ordered * in_top_k
    cumulative = kept.cumsum(dim=-1, dtype=torch.float64)
    # A row without top_k has every token in it, and its mass is 1 by definition, whatever the sum rounds to.
    has_top_k = top_k < vocab_size
    mass = cumulative[:, -1:].masked_fill(~has_top_k, 1.0) * top_p
    # A token is kept when the mass before it falls short of top_p, so that the kept mass just reaches it.
    num_kept = (in_top_k & (cumulative - kept < mass)).sum(dim=-1, keepdim=True).clamp_(min=1)
    is_found = has_top_k | (cumulative[:, -1:] >= mass)
    if num_candidates == vocab_size:
        is_found.fill_(True)
    return ordered.gather(-1, num_kept - 1)[:, 0], is_found[:, 0]
