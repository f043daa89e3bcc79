"""Mixes of adapters against PEFT's merge of them, through the CPU runner."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_tiny_model
from tests.worker.driver import Driver, outputs
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits
from worker.chunk_layout import MODULES

PROMPT = [1, 17, 200, 33, 5]
NUM_OUTPUTS = 8
NUM_CHUNKS = 6
# Of equal and of different ranks, alphas, scalings and modules.
SAVED: dict[str, dict[str, Any]] = {
    "a": {"r": 8, "lora_alpha": 64, "target_modules": list(MODULES)},
    "b": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "c": {"r": 20, "lora_alpha": 90, "target_modules": ["k_proj", "v_proj", "up_proj"]},
}
MIXES: dict[str, dict[str, float]] = {
    "half and half": {"a": 0.5, "b": 0.5},
    "three": {"a": 0.3, "b": 1.2, "c": 0.9},
    "one taken from another": {"a": 1.0, "c": -0.7},
    "one scaled": {"c": 0.4},
    "one turned round": {"a": -1.0},
}
Answer = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixes")
    write_tiny_model(directory / "model", "llama3")
    for seed, (name, lora) in enumerate(SAVED.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
        config = LoraConfig(**{"init_lora_weights": False, "task_type": "CAUSAL_LM"} | lora)
        get_peft_model(model, config).save_pretrained(directory / name)
    return directory


@pytest.fixture(scope="module")
def driver(root: Path) -> Driver:
    """With a, b and c as generations 1, 2 and 3; the mixes have the numbers below 0, in their order."""
    driver = Driver.of(root / "model", num_chunks=NUM_CHUNKS)
    pool = driver.runner.pool
    assert pool is not None
    pool.chunks.fill_(torch.nan)
    model = SimpleNamespace(chunk_layout=lambda: pool.layout)
    loader = AdapterLoader(model, torch.float32, AdapterLimits(max_chunks=NUM_CHUNKS), root / "store")
    free = list(range(NUM_CHUNKS))
    for generation, name in enumerate(SAVED, start=1):
        packed = loader.load(str(root / name), trusted=True)
        pool.upload(generation, packed, [free.pop() for _ in packed.chunks])
    for number, mix in enumerate(MIXES.values(), start=1):
        pool.mixes[-number] = weighted(mix)
    return driver


def weighted(mix: dict[str, float]) -> tuple[tuple[int, float], ...]:
    return tuple((list(SAVED).index(name) + 1, weight) for name, weight in mix.items())


def answer_of(driver: Driver, sequence: Any) -> Answer:
    logprobs = [sample.logprob for sample in driver.samples[sequence.sequence_id]]
    return outputs(sequence), [float(logprob) for logprob in logprobs if logprob is not None]


def merged(root: Path, mix: dict[str, float]) -> Any:
    """PEFT's model with the adapters merged into one."""
    oracle: Any = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    oracle = PeftModel.from_pretrained(oracle, root / "a", adapter_name="a")
    for name in ("b", "c"):
        oracle.load_adapter(root / name, adapter_name=name)
    oracle.add_weighted_adapter(list(mix), list(mix.values()), "mix", combination_type="cat")
    oracle.set_adapter("mix")
    return oracle.eval()


def check(root: Path, mix: dict[str, float], answer: Answer) -> None:
    token_ids, logprobs = answer
    with torch.inference_mode():
        logits = merged(root, mix)(input_ids=torch.tensor([PROMPT + token_ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert token_ids == expected.argmax(-1).tolist()
    assert logprobs == pytest.approx(expected.max(-1).values.tolist(), abs=1e-3)


@pytest.fixture(scope="module")
def served(driver: Driver) -> dict[str, Answer]:
    """All mixes in one batch, beside each adapter alone and the base model."""
    sequences = {name: driver.add(PROMPT, -number) for number, name in enumerate(MIXES, start=1)}
    sequences |= {name: driver.add(PROMPT, generation) for generation, name in enumerate(["base", *SAVED])}
    driver.finish(list(sequences.values()), NUM_OUTPUTS, chunk=3)
    return {name: answer_of(driver, sequence) for name, sequence in sequences.items()}


@pytest.mark.parametrize("name", MIXES)
def test_a_mix_is_what_peft_merges(name: str, root: Path, served: dict[str, Answer]) -> None:
    check(root, MIXES[name], served[name])


def test_all_of_them_differ(served: dict[str, Answer]) -> None:
    assert len({tuple(logprobs) for _, logprobs in served.values()}) == len(MIXES) + len(SAVED) + 1


def test_a_mix_alone_is_what_it_is_in_a_batch(driver: Driver, served: dict[str, Answer]) -> None:
    for number, name in enumerate(MIXES, start=1):
        sequence = driver.add(PROMPT, -number)
        driver.finish([sequence], NUM_OUTPUTS)
        tokens, logprobs = answer_of(driver, sequence)
        assert tokens == served[name][0] and logprobs == pytest.approx(served[name][1], abs=1e-4)


def test_weight_one_is_the_adapter_and_weight_zero_the_base_to_the_bit(driver: Driver) -> None:
    """Alone, so that nothing but the mix differs."""
    assert driver.runner.pool is not None
    driver.runner.pool.mixes |= {-101: ((1, 1.0),), -102: ((1, 0.0),), -103: ((1, 1.0), (3, 0.0))}
    answers = {}
    for generation in (0, 1, -101, -102, -103):
        sequence = driver.add(PROMPT, generation)
        driver.finish([sequence], NUM_OUTPUTS)
        answers[generation] = answer_of(driver, sequence)
    assert answers[1] == answers[-101] == answers[-103]
    assert answers[0] == answers[-102] != answers[1]


def test_a_number_that_stands_for_nothing_is_an_error_and_never_the_base(driver: Driver) -> None:
    with pytest.raises(KeyError):
        driver.step([(driver.add(PROMPT, -999), len(PROMPT))])
