"""Steps with prompts in graphs against the same steps launched kernel by kernel: the same bits.

On a GPU, or in Triton's interpreter with a stand-in for CUDA graphs: see tests/kernels/test_in_interpreter.py.
"""

import os
import random
from pathlib import Path

import pytest

from kernels.gpu import launch
from protocol.sampling import SamplingParams
from tests.tiny_models import write_tiny_model
from tests.worker import stand_in_graphs
from tests.worker.driver import Driver
from tests.worker.test_on_gpu import ADAPTERS, NUM_CHUNKS, load_adapters
from tests.worker.triton_driver import DEVICE, triton_driver
from worker import mixed_graphs
from worker.mixed_graphs import MixedGraphs
from worker.sequence import Sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's: rows of padding hold any numbers
]
SIZES = (8, 24)  # rows of graphs
FITS = MixedGraphs.fits
ASKED = SamplingParams(max_tokens=64, temperature=0.0, logprobs=2, prompt_logprobs=1)
PLAIN = SamplingParams(max_tokens=64, temperature=0.0, logprobs=2)
NUM_OUTPUTS, VOCAB_SIZE = 2, 300


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_graphs, "SIZES", SIZES)
    if DEVICE.type != "cuda":
        stand_in_graphs.use(monkeypatch)


def run(driver: Driver, prompts: list[tuple[int, int]], seed: int | None) -> list[list[Sample]]:
    """Answers to prompts, each a generation and a number of tokens, in steps of any of them and any of their tokens.

    seed: None: all whole in the first step.
    """
    rng = random.Random(seed)
    assert driver.runner.pool is not None
    load_adapters(driver.runner.pool)
    sequences = [
        driver.add([(7 * i + j) % VOCAB_SIZE for j in range(tokens)], generation, ASKED if i == 1 else PLAIN)
        for i, (generation, tokens) in enumerate(prompts)
    ]
    while unfinished := [s for s in sequences if s.num_tokens - s.num_prompt_tokens < NUM_OUTPUTS]:
        room, batch = SIZES[-1] + 4, []  # now and then a step is too large for a graph
        for sequence in unfinished if seed is None else rng.sample(unfinished, rng.randint(1, len(unfinished))):
            left = sequence.num_uncomputed_tokens
            num_tokens = min(room, left if seed is None else rng.randint(-(-left // 2), left))
            if num_tokens:
                batch.append((sequence, num_tokens))
                room -= num_tokens
        driver.step_ahead(batch)
    driver.collect()
    assert sequences[1].prompt_logprobs
    return [driver.samples[sequence.sequence_id] for sequence in sequences]


def both(
    model_dir: Path, prompts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> list[bool]:
    """Runs them with graphs and without; returns which steps with prompts had a graph."""
    had_graph: list[bool] = []

    def note(self: MixedGraphs, rows: mixed_graphs.StepRows) -> bool:
        fit = FITS(self, rows)
        if rows.prefills:
            had_graph.append(fit)
        return fit

    answers = []
    for instead in (note, lambda self, rows: False):
        monkeypatch.setattr(MixedGraphs, "fits", instead)
        driver = triton_driver(model_dir, num_chunks=NUM_CHUNKS, graph_rows=1, prompt_rows=SIZES[-1], num_blocks=160)
        answers.append(run(driver, prompts, seed))
    assert answers[0] == answers[1]
    return had_graph


def long_beyond(num_rows: int, has_answers: bool = False) -> int:
    """launch.long_rows, where many rows are so few."""
    return 8 if num_rows > SIZES[0] and not has_answers else 0


@pytest.mark.parametrize("has_long", [False, True] if DEVICE.type == "cuda" else [True])
@pytest.mark.parametrize("family", ["llama_biased", "qwen3", "mistral_window"] if DEVICE.type == "cuda" else ["qwen3"])
def test_a_step_from_a_graph_is_the_eager_one_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, has_long: bool
) -> None:
    """Base and adapters, prompts cut anywhere beside answers, prompts that are scored, a step too large for a graph."""
    if has_long:
        monkeypatch.setattr(launch, "long_rows", long_beyond)
    model_dir = write_tiny_model(tmp_path / "model", family)
    prompts = [(generation, 3 + 2 * i) for i, generation in enumerate((0, *ADAPTERS))]
    assert True in both(model_dir, prompts, monkeypatch, seed=3)


def test_more_short_prompts_than_a_graph_has_tiles_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are launched kernel by kernel."""
    monkeypatch.setattr(mixed_graphs, "_MAX_SHORT_PROMPTS", 1)
    model_dir = write_tiny_model(tmp_path / "model", "smollm")
    for num_prompts in (4, 3):  # in 8 rows, for which there are two full tiles, of 5 tokens each
        prompts = [(i % 3, 2) for i in range(num_prompts)]
        assert both(model_dir, prompts, monkeypatch, seed=None) == [num_prompts == 3]
