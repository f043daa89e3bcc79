"""The sampler: each parameter does what it says, a row never depends on its neighbours, and draws are fair."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from protocol.sampling import SamplingParams
from worker.last_tokens import LastTokens
from worker.launched_step import LaunchedStep
from worker.sampler import NUM_TOP_P_CANDIDATES, Draws, Sampler, sample_tokens, uniform
from worker.sequence import Sample, Sequence

EOS = 3
SAMPLER = Sampler((EOS,))


def sequence(prompt: list[int] | None = None, answer: list[int] | None = None, seed: int = 0, **keys: Any) -> Sequence:
    prompt, answer = prompt or [0], answer or []
    sampling = SamplingParams(**{"max_tokens": 8, "temperature": 0.0} | keys)
    return Sequence(0, prompt + answer, len(prompt), sampling, seed)


def sample(logits: torch.Tensor, sequences: list[Sequence], sampler: Sampler = SAMPLER) -> list[Sample]:
    """logits may be changed."""
    shares = [asked.share(asked.num_uncomputed_tokens) for asked in sequences]
    last_tokens = LastTokens(logits.shape[-1], len(logits), logits.device)
    return LaunchedStep(sampler, last_tokens, shares, list(range(len(logits))), logits).collect()


def draw(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """Of one row, with the given random number."""
    return int(sample_tokens(logits, Draws.of([params], [number], logits.shape[-1], logits.device)))


def one(logits: list[float], asked: Sequence) -> Sample:
    return sample(torch.tensor([logits]), [asked])[0]


def support(logits: list[float], **keys: Any) -> set[int]:
    """The tokens that are ever drawn."""
    sequences = [sequence(seed=seed, **{"temperature": 1.0} | keys) for seed in range(400)]
    samples = sample(torch.tensor([logits] * len(sequences)), sequences)
    return {sample.token_id for sample in samples}


def test_greedy_takes_the_best() -> None:
    assert one([0.0, 2.0, 1.0], sequence()) == Sample(1)


def test_logit_bias_and_ids_beyond_the_vocabulary() -> None:
    assert one([0.0, 2.0, 1.0], sequence(logit_bias={2: 5.0, 9000: 100.0})).token_id == 2
    assert one([0.0, 2.0, 1.0], sequence(logit_bias={1: -100.0})).token_id == 2


def test_penalties() -> None:
    logits = [0.0, 2.0, 1.5, -1.0]
    assert one(logits, sequence([1], repetition_penalty=1.5)).token_id == 2
    assert one([-1.0, -1.2], sequence([0], repetition_penalty=1.5)).token_id == 1
    assert one(logits, sequence([1], presence_penalty=1.0)).token_id == 1  # the prompt does not count
    assert one(logits, sequence([0], [1], presence_penalty=1.0)).token_id == 2
    assert one(logits, sequence([0], [1, 2, 2, 1, 1], frequency_penalty=0.3)).token_id == 1
    assert one(logits, sequence([0], [1, 2, 1, 1], frequency_penalty=0.3)).token_id == 2


def test_min_tokens_masks_end_of_text_and_stop_tokens() -> None:
    logits = [0.0, 1.0, 2.0, 3.0]
    assert one(logits, sequence(min_tokens=1)).token_id == 2
    assert one(logits, sequence(min_tokens=1, stop_token_ids=[2, 7000])).token_id == 1
    assert one(logits, sequence([0], [1], min_tokens=1)).token_id == EOS


def test_top_k_top_p_and_min_p_keep_what_they_should() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert support(logits) == {0, 1, 2, 3}
    assert support(logits, top_k=2) == {1, 3}
    assert support(logits, top_k=1) == {1}
    assert support(logits, top_k=1000) == {0, 1, 2, 3}
    assert support(logits, top_p=0.39) == {1}
    assert support(logits, top_p=0.41) == {1, 3}
    assert support(logits, top_p=0.71) == {1, 2, 3}
    # Of the renormalised two best, 0.571 and 0.429.
    assert support(logits, top_k=2, top_p=0.56) == {1}
    assert support(logits, top_k=2, top_p=0.58) == {1, 3}
    assert support(logits, min_p=0.6) == {1, 3}
    assert support(logits, min_p=1.0) == {1}
    assert support(logits, temperature=1e-30) == {1}


def test_top_p_looks_beyond_its_first_candidates() -> None:
    vocab_size = 4 * NUM_TOP_P_CANDIDATES
    probs = torch.full((1, vocab_size), 1.0).log()
    params = SamplingParams(max_tokens=1, top_p=0.75)
    # Equal probabilities are kept together, so nothing may be cut.
    assert draw(probs, params, 0.999) == int(0.999 * vocab_size)
    slope = torch.linspace(0, -1, vocab_size)[None]
    mass = slope.softmax(-1)[0].cumsum(0)
    last_kept = int((mass < 0.75).sum())
    assert draw(slope, params, 1 - 2**-40) == last_kept
    assert last_kept > NUM_TOP_P_CANDIDATES


def test_draws_follow_the_distribution() -> None:
    probs = [0.1, 0.4, 0.2, 0.3]
    sequences = [sequence(seed=seed, temperature=1.0) for seed in range(4000)]
    samples = sample(torch.tensor([[math.log(p) for p in probs]] * len(sequences)), sequences)
    counts = Counter(sample.token_id for sample in samples)
    for token, probability in enumerate(probs):
        assert counts[token] / len(sequences) == pytest.approx(probability, abs=0.03)


def test_uniform_is_fixed_by_seed_and_position_and_spread() -> None:
    assert uniform(0, 0) == uniform(0, 0)
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500
    values = [uniform(7, position) for position in range(4000)]
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.02)
    assert 0.0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1.0
    assert 0.0 <= uniform(2**63 - 1, 2**31) < 1.0


def test_a_row_never_depends_on_its_neighbours() -> None:
    torch.manual_seed(1)
    asked = [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "top_p": 0.999},
        {"temperature": 1.0, "top_k": 700, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 1.0, "logit_bias": {5: 3.0}, "logprobs": 3},
    ]
    sequences = [sequence([1, 2], [5, 6], seed=seed, **keys) for seed, keys in enumerate(asked)]
    for _ in range(20):
        logits = torch.randn(len(asked), 1000) * 3
        together = sample(logits.clone(), sequences)
        alone = [sample(logits[row : row + 1].clone(), [sequences[row]])[0] for row in range(len(asked))]
        assert together == alone


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = [0.0, 2.0, 1.0, -4.0]
    raw = torch.tensor(logits).log_softmax(0).tolist()
    sample = one(logits, sequence(logit_bias={1: -100.0}, logprobs=2))
    assert sample.token_id == 2
    assert sample.logprob == pytest.approx(raw[2])
    assert [token for token, _ in sample.top] == [1, 2]
    assert [value for _, value in sample.top] == pytest.approx(raw[1:3])
    assert one(logits, sequence(logprobs=0)).top == ()
    assert one(logits, sequence()).logprob is None
    assert len(one(logits, sequence(logprobs=20)).top) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("keys", [{}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}])
def test_a_bad_row_fails_alone(bad: float, keys: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, bad, 1.0], [9.0, 0.0, 0.0]])
    samples = sample(logits, [sequence(top_k=1, **keys) for _ in range(3)])
    assert [sample.failed for sample in samples] == [False, True, False]
    assert [samples[0].token_id, samples[2].token_id] == [1, 0]
    assert samples[1].logprob is None


def test_edits_that_touch_no_token() -> None:
    assert one([0.0, 2.0], sequence(logit_bias={9000: 100.0})).token_id == 1
    nothing_ends = Sampler(())
    assert sample(torch.tensor([[0.0, 2.0]]), [sequence(min_tokens=5)], nothing_ends)[0].token_id == 1
    assert one([0.0, 2.0], sequence([0], frequency_penalty=1.0)).token_id == 1
