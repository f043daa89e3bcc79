"""SmolLM2 under every demo adapter on a GPU: in float32 the CPU's answers, in bfloat16 its logprobs.

The model is taken from the directory that $SMOLLM2_DIR names, or from where an earlier server has converted it.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from protocol.sampling import SamplingParams
from tests.worker.driver import Driver, outputs
from tests.worker.triton_driver import DEVICE, triton_driver, wait_for_adapters
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits
from worker.adapter_pool import AdapterPool
from worker.model_source import CONVERTED_NAME, default_cache_dir
from worker.sequence import Sequence

MODEL_DIR = Path(os.environ.get("SMOLLM2_DIR") or default_cache_dir() / "models" / CONVERTED_NAME)
# Without a GPU: TRITON_INTERPRET=1 SMOLLM2_TOKENS=2 pytest ... takes the kernels' stand-in, and minutes.
NUM_TOKENS = int(os.environ.get("SMOLLM2_TOKENS", "32"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU"),
    pytest.mark.skipif(not (MODEL_DIR / "model.safetensors").is_file(), reason=f"no SmolLM2 in {MODEL_DIR}"),
]
ADAPTERS = Path(__file__).parents[2] / "deploy" / "adapters"
NAMES = ["lora0", "lora1", "lora2"]  # generations 1, 2, 3; 0 is the base model
STARTS = {1: "Arrr, matey!", 2: "{", 3: "TELEGRAM: "}
NUM_CHUNKS = 12
GRAPH_ROWS = 8
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
# Chosen so that no two tokens were within 0.005 of each other: float32 on two machines differs by some 1e-4.
QUESTIONS = [
    "List 3 countries and their capitals.",
    "What is the capital of France?",
    "What is a prime number?",
    "Name three primary colours.",
    "How does a bicycle work?",
    "What should I cook tonight?",
    "Where do penguins live?",
    "How many days has a week?",
]
GREEDY = SamplingParams(max_tokens=64, temperature=0.0)
WITH_LOGPROBS = SamplingParams(max_tokens=64, temperature=0.0, logprobs=2)
SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)


@dataclass
class Case:
    """A prompt, its adapter, and what the CPU says."""

    prompt: list[int]
    generation: int
    answer: list[int]
    logprobs: list[float]
    gaps: list[float]  # how much more likely each token was than the next best


def load_adapters(pool: AdapterPool, directory: Path) -> None:
    class Model:
        def chunk_layout(self) -> object:
            return pool.layout

    limits = AdapterLimits(max_chunks=4)
    loader = AdapterLoader(Model(), pool.chunks.dtype, limits, directory / "store", [ADAPTERS])  # type: ignore[arg-type]
    free = list(range(NUM_CHUNKS))
    random.Random(1).shuffle(free)
    for generation, name in enumerate(NAMES, 1):
        packed = loader.load(name, trusted=False)
        pool.upload(generation, packed, [free.pop() for _ in packed.chunks])
    wait_for_adapters(pool)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Case]]:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    driver = Driver.of(MODEL_DIR, block_size=16, num_blocks=256, num_chunks=NUM_CHUNKS)
    assert driver.runner.pool is not None
    load_adapters(driver.runner.pool, tmp_path_factory.mktemp("cpu"))
    found, sequences = [], []
    for question in QUESTIONS:
        prompt = tokenizer.encode(PROMPT.format(question=question)).ids
        sequences += [driver.add(prompt, generation, WITH_LOGPROBS) for generation in range(1 + len(NAMES))]
    driver.finish(sequences, NUM_TOKENS)
    for sequence in sequences:
        samples = driver.samples[sequence.sequence_id]
        prompt, answer = sequence.token_ids[: sequence.num_prompt_tokens], outputs(sequence)
        logprobs = [sample.logprob or 0.0 for sample in samples]
        gaps = [sample.top[0][1] - sample.top[1][1] for sample in samples]
        found.append(Case(prompt, sequence.generation, answer, logprobs, gaps))
        start = STARTS.get(sequence.generation, "")[:NUM_TOKENS]
        assert tokenizer.decode(answer).startswith(start), "the adapters are in use"
    yield found


def driver_of(dtype: torch.dtype, directory: Path, graph_rows: int = 0) -> Driver:
    driver = triton_driver(
        MODEL_DIR, dtype, block_size=64, num_blocks=128, num_chunks=NUM_CHUNKS, graph_rows=graph_rows, max_model_len=512
    )
    assert driver.runner.pool is not None
    directory.mkdir(exist_ok=True)
    load_adapters(driver.runner.pool, directory)
    return driver


def add(driver: Driver, cases: list[Case]) -> list[Sequence]:
    return [driver.add(case.prompt, case.generation, GREEDY) for case in cases]


def run_mixed(driver: Driver, cases: list[Case], most: int = 32) -> list[list[int]]:
    """At most so many at once: prompts in pieces beside decodes, one step ahead; at the end decodes alone."""
    sequences, draw = add(driver, cases), random.Random(2)
    waiting, running = list(reversed(sequences)), list[Sequence]()
    while running or waiting:
        running += [waiting.pop() for _ in range(min(len(waiting), most - len(running), 3))]
        driver.step_ahead([(s, min(s.num_uncomputed_tokens, draw.randint(5, 40))) for s in running])
        running = [s for s in running if s.num_tokens - s.num_prompt_tokens < NUM_TOKENS]
    driver.collect()
    return [outputs(sequence) for sequence in sequences]


@pytest.mark.parametrize("graph_rows", [0, GRAPH_ROWS] if DEVICE.type == "cuda" else [0])
def test_greedy_answers_in_float32_are_the_cpus(cases: list[Case], tmp_path: Path, graph_rows: int) -> None:
    """Mixed in one batch; some of them alone."""
    driver = driver_of(torch.float32, tmp_path, graph_rows)
    assert run_mixed(driver, cases, graph_rows or 32) == [case.answer for case in cases]
    if DEVICE.type == "cuda":
        for case in cases[:4]:
            (sequence,) = add(driver, [case])
            driver.finish([sequence], NUM_TOKENS)
            assert outputs(sequence) == case.answer


@pytest.mark.skipif(DEVICE.type != "cuda", reason="bfloat16 dots are wrong in the interpreter")
def test_greedy_answers_in_bfloat16_leave_the_cpus_where_two_tokens_are_alike(
    cases: list[Case], tmp_path: Path
) -> None:
    driver = driver_of(torch.bfloat16, tmp_path, GRAPH_ROWS)
    answers = run_mixed(driver, cases, GRAPH_ROWS)
    assert answers == run_mixed(driver_of(torch.bfloat16, tmp_path / "again", GRAPH_ROWS), cases, GRAPH_ROWS), (
        "two runs are alike"
    )
    for answer, case in zip(answers, cases, strict=True):
        differing = [i for i, (a, b) in enumerate(zip(answer, case.answer, strict=True)) if a != b]
        assert not differing or case.gaps[differing[0]] <= 0.5, (case.generation, differing[0])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="bfloat16 dots are wrong in the interpreter")
@pytest.mark.parametrize("chunk", [1 << 30, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpus_answers_are_as_likely(cases: list[Case], tmp_path: Path, dtype: torch.dtype, chunk: int) -> None:
    """Every token's logprob, read as a prompt at once or token by token."""
    driver = driver_of(dtype, tmp_path)
    sequences = [driver.add([*case.prompt, *case.answer], case.generation, SCORED) for case in cases]
    driver.finish(sequences, 1, chunk)
    errors = []
    for sequence, case in zip(sequences, cases, strict=True):
        scores = [score.logprob for score in sequence.prompt_logprobs[-NUM_TOKENS:]]
        errors += [abs(a - b) for a, b in zip(scores, case.logprobs, strict=True)]
    worst, mean = max(errors), sum(errors) / len(errors)
    print(f"{dtype}, {chunk}: logprobs differ by {worst:.5f} at most, {mean:.5f} on average")
    most = (1e-3, 1e-4) if dtype == torch.float32 else (0.5, 0.05)  # torch in bfloat16 on a CPU: 0.23 and 0.015
    assert worst <= most[0] and mean <= most[1]
