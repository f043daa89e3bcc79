"""Mixes of adapters through the Triton runner, with and without CUDA graphs, against the torch twins.

Needs a GPU, or Triton's interpreter: TRITON_INTERPRET=1 pytest tests/worker/test_mixes_on_gpu.py
"""

import random
from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_model
from tests.worker.driver import Driver, outputs
from tests.worker.test_on_gpu import GRAPH_ROWS, NUM_CHUNKS, NUM_OUTPUTS, WITH_LOGPROBS, load_adapters, pytestmark
from tests.worker.triton_driver import triton_driver

__all__ = ["pytestmark"]

MIXES = {-1: ((1, 0.5), (3, 2.0)), -2: ((3, 1.0), (2, -1.5)), -3: ((4, 0.25),), -4: ((1, 1.5), (4, 0.5))}
PROMPTS = {0: [9, 8, 7], 3: [301, 44, 7], -1: [1, 17, 200, 33, 5], -2: [9], -3: [250, 123, 19, 88], -4: [4, 5]}


def prepare(driver: Driver) -> Driver:
    assert driver.runner.pool is not None
    load_adapters(driver.runner.pool)
    driver.runner.pool.mixes |= MIXES
    return driver


@pytest.mark.parametrize("graph_rows", GRAPH_ROWS)
def test_mixes_beside_adapters_and_base(graph_rows: int, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama3")
    rng = random.Random(1)
    driver = prepare(triton_driver(tmp_path, num_chunks=NUM_CHUNKS, graph_rows=graph_rows))
    sequences = [driver.add(prompt, generation, WITH_LOGPROBS) for generation, prompt in PROMPTS.items()]
    while unfinished := [s for s in sequences if s.num_tokens - s.num_prompt_tokens < NUM_OUTPUTS]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        driver.step_ahead([(s, rng.randint(1, s.num_uncomputed_tokens)) for s in chosen])
    driver.collect()
    for sequence in sequences:
        twin = prepare(Driver.of(tmp_path, num_chunks=NUM_CHUNKS))
        alone = twin.add(PROMPTS[sequence.generation], sequence.generation, WITH_LOGPROBS)
        twin.finish([alone], NUM_OUTPUTS)
        assert outputs(sequence) == outputs(alone)
        logprobs = [sample.logprob for sample in driver.samples[sequence.sequence_id]]
        expected = [sample.logprob for sample in twin.samples[alone.sequence_id]]
        assert logprobs == pytest.approx(expected, abs=2e-3)
