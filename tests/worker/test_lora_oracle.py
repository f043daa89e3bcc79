"""Batches that mix adapters of any rank, base rows, prefill and decode, against transformers + PEFT in float32."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import write_tiny_model
from tests.worker.driver import Driver, outputs
from worker.adapter_weights import LoraWeight, pack_adapter
from worker.chunk_layout import MODULES
from worker.sequence import Sequence

# PEFT asks transformers for a property that is about to go.

# Generation -> rank and target modules.
ADAPTERS: dict[int, tuple[int, list[str]]] = {
    1: (1, ["q_proj", "v_proj"]),
    2: (4, ["k_proj"]),
    3: (16, list(MODULES)),
    4: (40, ["o_proj", "gate_proj", "down_proj"]),
    5: (64, list(MODULES)),
}
PROMPTS = {0: [9, 8, 7], 1: [1, 17, 200, 33, 5], 2: [9], 3: [301, 44, 7], 4: [250, 123, 19, 88, 12, 61, 2], 5: [4, 5]}
NUM_OUTPUTS = 16
NUM_CHUNKS = 16


def save_adapter(model_dir: Path, adapter_dir: Path, rank: int, modules: list[str]) -> None:
    """A random adapter of the model, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=rank + 3, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM")
    torch.manual_seed(rank)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.4 / rank**0.5)
    model.save_pretrained(adapter_dir)


def load_adapter(driver: Driver, adapter_dir: Path, generation: int, chunk_ids: list[int]) -> list[int]:
    """Packs an adapter into the first free chunks; the chunks that are left."""
    assert driver.runner.pool is not None
    rank = ADAPTERS[generation][0]
    halves: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter_dir / "adapter_model.safetensors").items():
        parts = name.split(".")
        halves.setdefault((int(parts[parts.index("layers") + 1]), parts[-3]), {})[parts[-2]] = tensor
    weights = {key: LoraWeight(half["lora_A"], half["lora_B"], (rank + 3) / rank) for key, half in halves.items()}
    packed = pack_adapter(driver.runner.pool.layout, weights, torch.float32, "")
    driver.runner.pool.upload(generation, packed, chunk_ids[: len(packed.chunks)])
    return chunk_ids[len(packed.chunks) :]


@pytest.fixture(scope="module", params=["smollm", "qwen3", "llama_biased"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model and every adapter."""
    root = tmp_path_factory.mktemp(request.param)
    write_tiny_model(root / "model", request.param)
    for generation, (rank, modules) in ADAPTERS.items():
        save_adapter(root / "model", root / str(generation), rank, modules)
    return root


@pytest.fixture(scope="module")
def expected(files: Path) -> dict[int, tuple[list[int], list[float]]]:
    """Each generation's greedy tokens and their logprobs, as PEFT computes them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answers = {}
    for generation, prompt in PROMPTS.items():
        oracle: Any = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
        if generation:
            oracle = PeftModel.from_pretrained(oracle, files / str(generation))
        answers[generation] = greedy(oracle.eval(), prompt)
    return answers


@torch.inference_mode()
def greedy(oracle: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    token_ids, logprobs = list(prompt), []
    for _ in range(NUM_OUTPUTS):
        row = oracle(input_ids=torch.tensor([token_ids])).logits[0, -1].log_softmax(-1)
        token_ids.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return token_ids[len(prompt) :], logprobs


def driver_of(files: Path, generations: list[int], **keys: Any) -> Driver:
    """A driver with adapters in shuffled chunks of a pool whose other chunks are NaN."""
    driver = Driver.of(files / "model", num_chunks=NUM_CHUNKS, **keys)
    assert driver.runner.pool is not None
    driver.runner.pool.chunks.fill_(torch.nan)
    chunk_ids = torch.randperm(NUM_CHUNKS, generator=torch.Generator().manual_seed(3)).tolist()
    for generation in generations:
        chunk_ids = load_adapter(driver, files / str(generation), generation, chunk_ids)
    return driver


def check(driver: Driver, sequences: list[Sequence], expected: dict[int, tuple[list[int], list[float]]]) -> None:
    for sequence in sequences:
        token_ids, logprobs = expected[sequence.generation]
        assert outputs(sequence) == token_ids
        assert [s.logprob for s in driver.samples[sequence.sequence_id]] == pytest.approx(logprobs, abs=1e-3)


def test_the_adapters_change_the_answers(expected: dict[int, tuple[list[int], list[float]]]) -> None:
    assert len({tuple(token_ids) for token_ids, _ in expected.values()}) == len(expected)


@pytest.mark.parametrize("generation", ADAPTERS)
def test_one_adapter_alone(files: Path, expected: dict[int, tuple[list[int], list[float]]], generation: int) -> None:
    driver = driver_of(files, [generation])
    sequences = [driver.add(PROMPTS[generation], generation)]
    driver.finish(sequences, NUM_OUTPUTS)
    check(driver, sequences, expected)


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_adapters_base_rows_chunks_and_orders(
    files: Path, expected: dict[int, tuple[list[int], list[float]]], seed: int
) -> None:
    rng = random.Random(seed)
    driver = driver_of(files, list(ADAPTERS), block_size=rng.choice([1, 3, 16]), num_blocks=600)
    sequences = [driver.add(PROMPTS[generation], generation) for generation in [*PROMPTS] * 2]
    while unfinished := [s for s in sequences if s.num_output_tokens < NUM_OUTPUTS]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        driver.step([(s, rng.randint(1, s.num_uncomputed_tokens)) for s in chosen])
    check(driver, sequences, expected)


def test_base_rows_are_bit_identical_with_and_without_adapters_beside_them(files: Path) -> None:
    """Same batch, same rows: whether other rows have adapters does not change a bit of a base row."""
    answers = []
    for others in ([0, 0, 0], [1, 3, 5]):
        driver = driver_of(files, list(ADAPTERS))
        base = [driver.add(PROMPTS[0]), driver.add(PROMPTS[4])]
        mates = [driver.add(PROMPTS[5], generation) for generation in others]
        batch = [mates[0], base[0], mates[1], base[1], mates[2]]
        driver.step([(s, s.num_uncomputed_tokens) for s in batch])
        for _ in range(6):
            driver.step([(s, 1) for s in batch])
        answers.append([driver.samples[s.sequence_id] for s in base])
    assert answers[0] == answers[1]
