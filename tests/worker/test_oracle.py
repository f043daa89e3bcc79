"""The model against transformers in float32 on the CPU, for every family."""

from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.sampling import SamplingParams
from tests.tiny_models import FAMILIES, write_tiny_model
from tests.worker.driver import Driver, outputs

PROMPTS = [[1, 17, 200, 33, 5], [9], [301, 44, 44, 7, 250, 123, 19, 88, 12, 61, 2, 300]]
NUM_OUTPUTS = 20


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp(request.param), request.param, num_shards=2)


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def expected(oracle: Any, prompt: list[int], num_outputs: int) -> tuple[list[int], torch.Tensor]:
    """The oracle's greedy tokens and the logprobs [num_outputs, vocab_size] that they came from."""
    token_ids, logprobs = list(prompt), []
    for _ in range(num_outputs):
        logits = oracle(input_ids=torch.tensor([token_ids])).logits[0, -1]
        logprobs.append(logits.log_softmax(-1))
        token_ids.append(int(logits.argmax()))
    return token_ids[len(prompt) :], torch.stack(logprobs)


@pytest.mark.parametrize(("block_size", "chunk"), [(4, 1 << 30), (1, 1), (16, 3)])
def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    model_dir: Path, oracle: Any, block_size: int, chunk: int
) -> None:
    driver = Driver.of(model_dir, block_size=block_size)
    sequences = [driver.add(prompt) for prompt in PROMPTS]
    driver.finish(sequences, NUM_OUTPUTS, chunk)
    for sequence, prompt in zip(sequences, PROMPTS, strict=True):
        token_ids, logprobs = expected(oracle, prompt, NUM_OUTPUTS)
        assert outputs(sequence) == token_ids
        for sample, row in zip(driver.samples[sequence.sequence_id], logprobs, strict=True):
            assert sample.logprob == pytest.approx(float(row[sample.token_id]), abs=1e-4)
            assert [value for _, value in sample.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
    different = {token for sequence in sequences for token in outputs(sequence)}
    assert len(different) > 8, "the model is too dull to tell anything"


@pytest.mark.parametrize(("block_size", "chunk"), [(4, 1 << 30), (1, 1), (16, 3)])
def test_logprobs_of_prompts_are_those_of_transformers(
    model_dir: Path, oracle: Any, block_size: int, chunk: int
) -> None:
    driver = Driver.of(model_dir, block_size=block_size)
    asked = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=3)
    prompts = [*PROMPTS, list(range(3, 153))]  # the last one's logits come in several pieces
    scored, other = [driver.add(prompt, sampling=asked) for prompt in prompts], driver.add(PROMPTS[0])
    driver.finish([scored[0], other, *scored[1:]], 2, chunk)
    assert other.prompt_logprobs == []
    for sequence, prompt in zip(scored, prompts, strict=True):
        with torch.inference_mode():
            logprobs = oracle(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert len(sequence.prompt_logprobs) == len(prompt) - 1
        for found, token, row in zip(sequence.prompt_logprobs, prompt[1:], logprobs, strict=False):
            assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [value for _, value in found.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
