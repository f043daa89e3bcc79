"""The Triton runner against the torch twins: every family, mixed adapters of any rank, prompts in chunks.

Needs a GPU, where it runs in float32 with and without CUDA graphs, or Triton's interpreter.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.sampling import Grammar, SamplingParams
from tests import tiny_model
from tests.tiny_models import FAMILIES, write_tiny_model
from tests.worker.driver import CPU, Driver, outputs
from tests.worker.triton_driver import DEVICE, triton_driver, wait_for_adapters
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import LoraWeight, module_shape, pack_adapter
from worker.chunk_layout import MODULES
from worker.grammar import load_tokenizer, new_matcher
from worker.sequence import Sequence

# In the interpreter these take minutes: TRITON_INTERPRET=1 pytest tests/worker/test_on_gpu.py
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's: rows of padding hold any numbers
]
GREEDY = SamplingParams(max_tokens=64, temperature=0.0)
WITH_LOGPROBS = SamplingParams(max_tokens=64, temperature=0.0, logprobs=5)
PENALISED = SamplingParams(max_tokens=64, temperature=0.0, presence_penalty=1.0, repetition_penalty=1.3, min_tokens=3)
# Generation -> rank and modules.
ADAPTERS: dict[int, tuple[int, tuple[str, ...]]] = {
    1: (1, ("q_proj", "v_proj")),
    2: (4, ("k_proj",)),
    3: (16, MODULES),
    4: (40, ("o_proj", "gate_proj", "down_proj")),
    5: (64, MODULES),
}
PROMPTS = {0: [9, 8, 7], 1: [1, 17, 200, 33, 5], 2: [9], 3: [301, 44, 7], 4: [250, 123, 19, 88, 12, 61, 2], 5: [4, 5]}
NUM_CHUNKS = 12
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # bfloat16 dots are wrong in the interpreter
NUM_OUTPUTS = 8 if DEVICE.type == "cuda" else 3
GRAPH_ROWS = [0, 12] if DEVICE.type == "cuda" else [0]


def load_adapters(pool: AdapterPool) -> None:
    """The same random adapters for whoever asks, in shuffled chunks."""
    free = torch.randperm(NUM_CHUNKS, generator=torch.Generator().manual_seed(3)).tolist()
    for generation, (rank, modules) in ADAPTERS.items():
        draw = torch.Generator().manual_seed(generation)
        weights = {}
        for layer in range(pool.layout.num_layers):
            for module in modules:
                num_in, num_out = module_shape(pool.layout, module)
                a = torch.randn(rank, num_in, generator=draw) * num_in**-0.5
                weights[layer, module] = LoraWeight(a, torch.randn(num_out, rank, generator=draw) / rank**0.5, 0.5)
        packed = pack_adapter(pool.layout, weights, pool.chunks.dtype, "")
        pool.upload(generation, packed, [free.pop() for _ in range(len(packed.chunks))])
    wait_for_adapters(pool)


def expected(model_dir: Path, sampling: SamplingParams = WITH_LOGPROBS) -> dict[int, Driver]:
    """Each generation's answer alone, from the torch twins on the CPU, as a driver of one sequence."""
    drivers = {}
    for generation, prompt in PROMPTS.items():
        driver = Driver.of(model_dir, num_chunks=NUM_CHUNKS)
        assert driver.runner.pool is not None
        load_adapters(driver.runner.pool)
        driver.finish([driver.add(prompt, generation, sampling)], NUM_OUTPUTS)
        drivers[generation] = driver
    return drivers


def run_mix(driver: Driver, sampling: SamplingParams, rng: random.Random) -> list[Sequence]:
    assert driver.runner.pool is not None
    load_adapters(driver.runner.pool)
    sequences = [driver.add(PROMPTS[generation], generation, sampling) for generation in [*PROMPTS] * 2]
    finish_in_any_mix(driver, sequences, rng)
    return sequences


def finish_in_any_mix(
    driver: Driver, sequences: list[Sequence], rng: random.Random, sync_mode: str = "default"
) -> None:
    """One step ahead; sync_mode: what happens where the host waits for the GPU on its way to a launch."""
    while unfinished := [s for s in sequences if s.num_tokens - s.num_prompt_tokens < NUM_OUTPUTS]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        set_sync_mode(sync_mode)
        try:
            driver.step_ahead([(s, rng.randint(1, s.num_uncomputed_tokens)) for s in chosen])
        finally:
            set_sync_mode("default")
    driver.collect()


def set_sync_mode(mode: str) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("graph_rows", GRAPH_ROWS)
@pytest.mark.parametrize("family", FAMILIES if DEVICE.type == "cuda" else ["smollm", "qwen3_biased", "mistral_window"])
def test_any_mix_gives_what_the_twins_give(tmp_path: Path, family: str, graph_rows: int) -> None:
    model_dir = write_tiny_model(tmp_path / "model", family)
    for sampling in (GREEDY, WITH_LOGPROBS, PENALISED):
        twins = expected(model_dir, sampling)
        driver = triton_driver(model_dir, num_chunks=NUM_CHUNKS, graph_rows=graph_rows)
        for sequence in run_mix(driver, sampling, random.Random(family)):
            twin = twins[sequence.generation]
            samples = driver.samples[sequence.sequence_id]
            assert [s.token_id for s in samples] == [s.token_id for s in twin.samples[0]]
            if sampling is WITH_LOGPROBS:
                logprobs = [s.logprob for s in twin.samples[0]]
                assert [s.logprob for s in samples] == pytest.approx(logprobs, abs=2e-3)


# Every way to choose a token; a regex answers with letters.
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 7, "logprobs": 2},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 0.2, "logit_bias": {5: 6.0, 9: -100.0, 399: 5.0}},
    {"temperature": 0.0, "logit_bias": {17: 2.0}, "logprobs": 0},
    {"temperature": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 5},
    {"temperature": 0.0, "presence_penalty": -1.5, "frequency_penalty": -0.5, "repetition_penalty": 0.8},
    {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": [3, 77, 301]},
    {"temperature": 0.0, "grammar": Grammar("regex", "[a-z ]{99,}")},
    {"temperature": 1.0, "grammar": Grammar("regex", "([0-9]{1,3}, ){30,}"), "top_p": 0.9, "logprobs": 3},
    {"temperature": 0.8, "grammar": Grammar("regex", "[A-Z]{99,}"), "repetition_penalty": 1.5, "min_tokens": 9},
]


def add_asked(driver: Driver, model_dir: Path, **more: Any) -> list[Sequence]:
    """A sequence for each of ASKED; under every adapter in turn where the driver has any."""
    tokenizer = load_tokenizer(model_dir / "tokenizer.json", tiny_model.VOCAB_SIZE, (2,))
    sequences = []
    for i, keys in enumerate(ASKED):
        sampling = SamplingParams(max_tokens=64, **keys, **more)
        sequences.append(driver.add(PROMPTS[i % 6], i % 6 if driver.runner.pool else 0, sampling, seed=i))
        sequences[-1].matcher = new_matcher(tokenizer, keys["grammar"]) if "grammar" in keys else None
    return sequences


def write_model_with_tokenizer(model_dir: Path) -> Path:
    write_tiny_model(model_dir, "llama3", vocab_size=tiny_model.VOCAB_SIZE)
    (model_dir / "tokenizer.json").write_bytes(tiny_model.tokenizer_json())
    return model_dir


@pytest.mark.parametrize("kind", ["torch", "eager", "graphs"] if DEVICE.type == "cuda" else ["eager"])
def test_every_way_to_choose_a_token_gives_what_the_cpu_gives(tmp_path: Path, kind: str) -> None:
    model_dir = write_model_with_tokenizer(tmp_path / "model")
    if kind == "torch":
        driver = Driver.of(model_dir, device=DEVICE)
    else:
        driver = triton_driver(model_dir, graph_rows=16 if kind == "graphs" else 0)
    finish_in_any_mix(driver, add_asked(driver, model_dir), random.Random(4))
    twin = Driver.of(model_dir)
    for sequence in add_asked(twin, model_dir):
        twin.finish([sequence], NUM_OUTPUTS)
    for i, keys in enumerate(ASKED):
        found, expected = driver.samples[i], twin.samples[i]
        assert [s.token_id for s in found] == [s.token_id for s in expected], keys
        for sample, other in zip(found, expected, strict=True):
            assert sample.logprob == pytest.approx(other.logprob, abs=2e-3), keys
            assert [p for _, p in sample.top] == pytest.approx([p for _, p in other.top], abs=2e-3), keys


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU can be waited for")
@pytest.mark.parametrize("graph_rows", GRAPH_ROWS)
@pytest.mark.parametrize("scored", [None, 2])
def test_nothing_on_the_way_to_a_launch_waits_for_the_gpu(tmp_path: Path, scored: int | None, graph_rows: int) -> None:
    """Prompts, mixed steps and graphs, tokens chosen in every way, with adapters; with prompts scored, and without.

    The answers are those of a host that may wait.
    """
    model_dir = write_model_with_tokenizer(tmp_path / "model")
    answers = []
    for mode in ("default", "error"):
        driver = triton_driver(model_dir, num_chunks=NUM_CHUNKS, graph_rows=graph_rows)
        assert driver.runner.pool is not None
        load_adapters(driver.runner.pool)
        sequences = add_asked(driver, model_dir, prompt_logprobs=scored)
        finish_in_any_mix(driver, sequences, random.Random(5), mode)
        answers.append([(outputs(sequence), sequence.prompt_logprobs) for sequence in sequences])
    assert answers[0] == answers[1]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="takes minutes in the interpreter")
def test_warming_up_changes_no_answer(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "model", "llama3")
    answers = []
    for is_warm in (False, True):
        driver = triton_driver(model_dir, DTYPE, num_chunks=NUM_CHUNKS, graph_rows=4)
        if is_warm:
            driver.runner.warm_up(300)  # type: ignore[union-attr]
        run_mix(driver, WITH_LOGPROBS, random.Random(3))
        answers.append(driver.samples)
    assert answers[0] == answers[1]


def test_numbers_that_are_none_fail_their_row_alone(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "model", "llama3")
    for graph_rows in GRAPH_ROWS:
        driver = triton_driver(model_dir, graph_rows=graph_rows)
        driver.runner.model.embed_tokens[319] = torch.nan
        bad, good = driver.add([319], sampling=GREEDY), driver.add([5], sampling=GREEDY)
        driver.step([(bad, 1), (good, 1)])
        assert [driver.samples[s.sequence_id][0].failed for s in (bad, good)] == [True, False]
        alone = driver.add([5], sampling=GREEDY)
        driver.step([(alone, 1)])
        assert outputs(alone) == outputs(good)


def test_two_runs_are_bit_identical_in_bfloat16(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path / "model", "qwen3")
    for graph_rows in GRAPH_ROWS:
        runs = []
        for _ in range(2):
            driver = triton_driver(model_dir, DTYPE, num_chunks=NUM_CHUNKS, graph_rows=graph_rows)
            run_mix(driver, WITH_LOGPROBS, random.Random(7))
            runs.append(driver.samples)
        assert runs[0] == runs[1]


@pytest.mark.parametrize("family", ["qwen3", "mistral"])  # with head norms; in a window
def test_base_rows_are_bit_identical_whatever_adapters_are_beside_them(tmp_path: Path, family: str) -> None:
    """In prompts, in eager decodes and in graphs: one adapter, many, fewer again, none."""
    model_dir = write_tiny_model(tmp_path / "model", family)
    mixes = [[0] * 6, [3] * 6, [1, 2, 3, 4, 5, 3], [5, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 2]]
    for graph_rows in GRAPH_ROWS:
        driver = triton_driver(model_dir, DTYPE, num_chunks=NUM_CHUNKS, graph_rows=graph_rows, num_blocks=128)
        assert driver.runner.pool is not None
        load_adapters(driver.runner.pool)
        answers = []
        for mix in [*mixes, mixes[0]]:
            base = [driver.add(PROMPTS[0], 0, WITH_LOGPROBS), driver.add(PROMPTS[4], 0, WITH_LOGPROBS)]
            mates = [driver.add(PROMPTS[5], generation, WITH_LOGPROBS) for generation in mix]
            driver.finish([base[0], *mates, base[1]], NUM_OUTPUTS)
            answers.append([driver.samples[s.sequence_id] for s in base])
        assert all(answer == answers[0] for answer in answers)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="takes minutes in the interpreter")
def test_the_shape_of_smollm2_in_bfloat16(tmp_path: Path) -> None:
    """Logprobs near those of the twins in float32; the same with graphs and without."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model_dir = write_tiny_model(tmp_path / "model", "smollm", num_hidden_layers=30, head_dim=64, **shape)
    twins = expected(model_dir)
    for graph_rows in GRAPH_ROWS:
        driver = triton_driver(model_dir, DTYPE, block_size=64, num_chunks=NUM_CHUNKS, graph_rows=graph_rows)
        assert driver.runner.pool is not None
        load_adapters(driver.runner.pool)
        for generation, prompt in PROMPTS.items():
            twin = twins[generation]
            answer = [sample.token_id for sample in twin.samples[0]]
            sequence = driver.add([*prompt, *answer[:-1]], generation, WITH_LOGPROBS)
            driver.step([(sequence, len(prompt))])
            for _ in answer[1:]:  # as decodes, but along the twin's answer
                driver.step([(sequence, 1)])
            (sample,) = driver.samples[sequence.sequence_id]
            values = dict([(sample.token_id, sample.logprob), *sample.top])
            assert values[answer[-1]] == pytest.approx(twin.samples[0][-1].logprob, abs=0.1)


@pytest.mark.parametrize("graph_rows", GRAPH_ROWS)
def test_prompts_are_scored_as_the_twins_score_them(tmp_path: Path, graph_rows: int) -> None:
    model_dir = write_tiny_model(tmp_path / "model", "llama3")
    asked = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=3)
    for chunk in (1 << 30, 1, 3):
        found = []
        twins = [Driver.of(model_dir, device=device) for device in (DEVICE, CPU)]
        for driver in (triton_driver(model_dir, graph_rows=graph_rows), *twins):
            sequences = [driver.add(prompt, sampling=asked) for prompt in PROMPTS.values()]
            driver.finish(sequences, 2, chunk)
            found.append([[score.logprob for score in sequence.prompt_logprobs] for sequence in sequences])
        for scores, of_torch, of_twin, prompt in zip(*found, PROMPTS.values(), strict=True):
            assert len(scores) == len(prompt) - 1
            assert scores == pytest.approx(of_twin, abs=2e-3) and of_torch == pytest.approx(of_twin, abs=2e-3)
