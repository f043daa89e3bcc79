"""The sampling twin against the worker's sampler, pick by pick, and against the distribution it should draw from."""

import math

import pytest
import torch
from torch import Tensor

from kernels.reference_sampling import sample
from protocol.sampling import SamplingParams
from worker.sampler import sample_tokens

PARAMS = [
    SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in [
        (1.0, 0, 1.0, 0.0), (0.7, 40, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (0.8, 20, 0.8, 0.0), (1.0, 0, 1.0, 0.05),
        (2.0, 5, 0.99, 0.1), (1.0, 1, 1.0, 0.0), (1e-6, 0, 1.0, 0.0), (5.0, 300, 0.95, 0.0), (1.0, 0, 0.01, 0.0),
    ]
]  # fmt: skip


def twin(logits: Tensor, params: list[SamplingParams], uniforms: Tensor) -> list[int]:
    tokens: list[int] = sample(
        logits,
        torch.tensor([p.temperature for p in params]),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params]),
        torch.tensor([p.min_p for p in params]),
        uniforms,
    ).tolist()
    return tokens


@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_picks_as_the_worker_does(spread: float) -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        logits = torch.randn(len(PARAMS), 700, generator=draw) * spread
        uniforms = torch.rand(len(PARAMS), dtype=torch.float64, generator=draw)
        assert twin(logits, PARAMS, uniforms) == sample_tokens(logits, PARAMS, uniforms.tolist())


def test_picks_as_the_worker_does_among_equals() -> None:
    logits = torch.randn(len(PARAMS), 400, generator=torch.Generator().manual_seed(2)).round_()
    for i in range(20):
        uniforms = torch.full((len(PARAMS),), i / 20, dtype=torch.float64)
        assert twin(logits, PARAMS, uniforms) == sample_tokens(logits, PARAMS, uniforms.tolist())


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_grid_of_numbers_gives_the_distribution(params: SamplingParams) -> None:
    """Each token's share of 4096 evenly spaced numbers is its probability after the cuts, made by plain loops."""
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3))
    num_draws = 4096
    uniforms = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    tokens = twin(logits.expand(num_draws, -1), [params] * num_draws, uniforms)
    values = logits[0].tolist()
    weights = [math.exp((value - max(values)) / params.temperature) for value in values]
    kept: list[int] = []
    order = sorted(range(60), key=lambda token: -values[token])[: params.top_k or 60]
    mass = sum(weights[token] for token in order)
    for token in order:
        if kept and sum(weights[t] for t in kept) >= params.top_p * mass:
            break
        kept.append(token)
    kept = [token for token in kept if weights[token] >= params.min_p]
    total = sum(weights[token] for token in kept)
    for token in range(60):
        expected = weights[token] / total if token in kept else 0.0
        assert abs(tokens.count(token) / num_draws - expected) <= 1.01 / num_draws


def test_greedy_rows_and_rows_that_are_not_finite() -> None:
    logits = torch.zeros(4, 9)
    logits[0, 3] = logits[0, 5] = 1.0
    logits[1, 2] = float("nan")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    params = [SamplingParams(max_tokens=1, temperature=0.0)] * 4
    assert twin(logits, params, torch.zeros(4, dtype=torch.float64)) == [3, -1, -1, 0]
    warm = [SamplingParams(max_tokens=1, temperature=1.0)] * 4
    assert twin(logits, warm, torch.full((4,), 1 - 2**-52, dtype=torch.float64))[1:] == [-1, -1, 0]
