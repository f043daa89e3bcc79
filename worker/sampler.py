"""Sampler: chooses a token from each row of logits, as the row's sequence asks.

What a row gets depends on its logits and its sequence alone, not on the other rows: each filter looks at one row, and
the random number is a function of the sequence's seed and the output's position.
"""

from collections import Counter

import torch
from torch import Tensor

from protocol.sampling import SamplingParams
from worker.sequence import Sample, Sequence

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


def is_plain_greedy(sequence: Sequence) -> bool:
    """Whether the sequence's next token is simply the best, and nothing else is asked for."""
    params = sequence.sampling
    return (
        params.temperature == 0
        and params.logprobs is None
        and not params.logit_bias
        and params.repetition_penalty == 1.0
        and not (params.presence_penalty or params.frequency_penalty)
        and sequence.num_output_tokens >= params.min_tokens
    )


class Sampler:
    """Chooses tokens. Work that no row of a batch asks for is not done."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[Sample]:
        """logits float32 [num_rows, vocab_size], which may be changed; one sequence a row -> one Sample a row."""
        params = [sequence.sampling for sequence in sequences]
        finite: list[bool] = logits.sum(dim=-1).isfinite().tolist()  # one NaN or infinity is in the sum as well
        if not all(finite):
            bad = torch.tensor([not ok for ok in finite], device=logits.device)
            logits = logits.masked_fill(bad[:, None], 0.0)
        wants_logprobs = [row for row, p in enumerate(params) if p.logprobs is not None]
        raw = logits[wants_logprobs].log_softmax(dim=-1) if wants_logprobs else None
        for row, sequence in enumerate(sequences):
            self._edit(logits[row], sequence)
        token_ids = self._choose(logits, sequences)
        samples = [Sample(token, failed=not ok) for token, ok in zip(token_ids, finite, strict=True)]
        if raw is not None:
            for row, logprobs in zip(wants_logprobs, raw, strict=True):
                if finite[row]:
                    samples[row] = _with_logprobs(token_ids[row], logprobs, params[row].logprobs or 0)
        return samples

    def _edit(self, logits: Tensor, sequence: Sequence) -> None:
        """Applies bias, penalties and the min_tokens mask to one row [vocab_size], in place."""
        sampling = sequence.sampling
        if sampling.logit_bias:
            ids = [token for token in sampling.logit_bias if token < len(logits)]
            logits[ids] += torch.tensor([sampling.logit_bias[token] for token in ids], device=logits.device)
        if sampling.repetition_penalty != 1.0:
            ids = list(set(sequence.token_ids))
            seen = logits[ids]
            penalty = sampling.repetition_penalty
            logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
            numbers = torch.tensor(list(counts.values()), device=logits.device)
            logits[list(counts)] -= sampling.presence_penalty + sampling.frequency_penalty * numbers
        if sequence.num_output_tokens < sampling.min_tokens:
            stops = {*self._eos_token_ids, *sampling.stop_token_ids}
            logits[[token for token in stops if token < len(logits)]] = -torch.inf

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> list[int]:
        rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
        token_ids: list[int] = logits.argmax(dim=-1).tolist() if len(rows) < len(sequences) else [0] * len(sequences)
        if rows:
            chosen = sample_tokens(
                logits if len(rows) == len(sequences) else logits[rows],
                [sequences[row].sampling for row in rows],
                [uniform(sequences[row].seed, sequences[row].num_output_tokens) for row in rows],
            )
            for row, token in zip(rows, chosen, strict=True):
                token_ids[row] = token
        return token_ids


def sample_tokens(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    """One token a row: temperature, top_k, top_p, min_p, then one draw by the inverse of the distribution function.

    logits float32 [num_rows, vocab_size]; temperatures above 0; uniforms in [0, 1).
    """
    device = logits.device
    temperatures = torch.tensor([p.temperature for p in params], device=device)[:, None]
    # The best logit is moved to 0 first: then no temperature, however small, overflows.
    probs = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures).softmax(dim=-1)
    filtered = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1.0]
    if filtered:
        keep_at_least = torch.zeros(len(params), 1, device=device)
        keep_at_least[filtered] = _cutoffs(probs[filtered], [params[row] for row in filtered])[:, None]
        probs.masked_fill_(probs < keep_at_least, 0.0)
    if any(p.min_p for p in params):
        min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
        probs.masked_fill_(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target: never one of probability 0.
    token_ids: list[int] = torch.searchsorted(cumulative, targets, right=True)[:, 0].tolist()
    return token_ids


def _cutoffs(probs: Tensor, params: list[SamplingParams]) -> Tensor:
    """The smallest probability that top_k and then top_p keep, each row's own. Equals of it are kept as well.

    probs [num_rows, vocab_size] -> [num_rows].
    """
    vocab_size = probs.shape[-1]
    most = max(p.top_k for p in params)
    if any(p.top_p < 1.0 and not p.top_k for p in params):
        most = max(most, NUM_TOP_P_CANDIDATES)
    best = probs.topk(min(most, vocab_size), dim=-1).values
    # A row without top_k has every token in it, and its mass is 1 by definition, whatever the sum rounds to.
    top_k = torch.tensor([min(p.top_k or vocab_size, vocab_size) for p in params], device=probs.device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=probs.device)[:, None]
    cutoffs, is_found = _cut_sorted(best, top_k, top_p, vocab_size)
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
    has_top_k = top_k < vocab_size
    mass = torch.where(has_top_k, cumulative[:, -1:], 1.0) * top_p
    # A token is kept when the mass before it falls short of top_p, so that the kept mass just reaches it.
    num_kept = (in_top_k & (cumulative - kept < mass)).sum(dim=-1, keepdim=True).clamp_(min=1)
    is_found = has_top_k | (cumulative[:, -1:] >= mass)
    if num_candidates == vocab_size:
        is_found.fill_(True)
    return ordered.gather(-1, num_kept - 1)[:, 0], is_found[:, 0]


def _with_logprobs(token_id: int, logprobs: Tensor, num_top: int) -> Sample:
    """logprobs [vocab_size] of one row."""
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = logprobs.topk(min(num_top, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sample(token_id, float(logprobs[token_id]), top)
