"""DoRA, and LoRA of embed_tokens and lm_head, mixed with plain adapters and base rows, against PEFT in float32."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from protocol.errors import ErrorCode
from protocol.sampling import SamplingParams
from tests.tiny_models import write_tiny_model
from tests.worker.driver import Driver, outputs
from worker.adapter_config import AdapterError
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits
from worker.chunk_layout import MODULES
from worker.sequence import Sequence

# PEFT warns of adapters of tied modules and of saving the embeddings beside their changes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": list(MODULES)},
    "dora": {"r": 8, "target_modules": list(MODULES), "use_dora": True},
    "dora of some": {
        "r": 20,
        "target_modules": ["v_proj", "up_proj", "down_proj"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"up_proj": 3},
    },
    "edges alone": {"r": 8, "target_modules": ["embed_tokens", "lm_head"]},
    "embeddings": {
        "r": 4,
        "target_modules": ["embed_tokens", "q_proj"],
        "rank_pattern": {"embed_tokens": 20},
        "alpha_pattern": {"embed_tokens": 5},
    },
    "head": {"r": 17, "target_modules": ["lm_head", "down_proj"]},
    "head by regex": {"r": 4, "target_modules": r"lm_head|.*\.1\.mlp\.down_proj"},
    "tied": {"r": 4, "target_modules": ["lm_head", "o_proj"], "ensure_weight_tying": True},
}
NUM_CHUNKS = 24
NUM_OUTPUTS = 6
WEIGHTS = "adapter_model.safetensors"
MAGNITUDE = "base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector"
Answer = tuple[list[int], list[float]]
PROMPT = [9, 1, 17, 200]
ASKED = SamplingParams(max_tokens=64, temperature=0.0, logprobs=1, prompt_logprobs=0)


def save_adapter(model_dir: Path, adapter_dir: Path, lora: dict[str, Any], moved: bool = True) -> None:
    """A random adapter, saved by PEFT; its magnitudes are moved from what they begin as, which is ‖W + ΔW‖."""
    torch.manual_seed(len(adapter_dir.name))
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(lora_alpha=9, init_lora_weights=False, task_type="CAUSAL_LM", **lora)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name and moved:
            parameter.data *= 0.3 + 1.4 * torch.rand(len(parameter))
        elif "lora_embedding" in name or "lm_head.lora" in name:
            parameter.data *= 0.2
    model.save_pretrained(adapter_dir)


def names_of(family: str) -> list[str]:
    return [name for name in ADAPTERS if name != "tied" or family == "smollm"]


@pytest.fixture(scope="module", params=["smollm", "llama_biased"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model, tied or biased, and its adapters."""
    root = tmp_path_factory.mktemp(request.param)
    write_tiny_model(root / "model", request.param, num_shards=2)
    for name in names_of(request.param):
        save_adapter(root / "model", root / name, ADAPTERS[name])
    return root


@pytest.fixture(scope="module")
def expected(files: Path) -> dict[str, tuple[Answer, list[float]]]:
    """By name, greedy tokens with their logprobs, and the prompt's logprobs, as PEFT computes them."""
    answers = {}
    for name in ["base", *(name for name in ADAPTERS if (files / name).exists())]:
        oracle: Any = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
        if name != "base":
            oracle = PeftModel.from_pretrained(oracle, files / name)
        answers[name] = greedy(oracle.eval())
    return answers


@torch.inference_mode()
def greedy(oracle: Any) -> tuple[Answer, list[float]]:
    token_ids, logprobs = list(PROMPT), []
    for _ in range(NUM_OUTPUTS):
        rows = oracle(input_ids=torch.tensor([token_ids])).logits[0].log_softmax(-1)
        token_ids.append(int(rows[-1].argmax()))
        logprobs.append(float(rows[-1].max()))
    of_prompt = [float(rows[i, token]) for i, token in enumerate(PROMPT[1:])]
    return (token_ids[len(PROMPT) :], logprobs), of_prompt


def loader_of(files: Path, store: Path, dtype: torch.dtype = torch.float32, with_base: bool = True) -> AdapterLoader:
    pool = Driver.of(files / "model", num_chunks=1).runner.pool
    assert pool is not None
    model = SimpleNamespace(chunk_layout=lambda: pool.layout)
    model_dir = files / "model" if with_base else None
    return AdapterLoader(model, dtype, AdapterLimits(max_chunks=4), store, model_dir=model_dir)


def load_all(driver: Driver, files: Path, store: Path) -> dict[str, int]:
    """All adapters, in shuffled chunks of a pool whose other chunks are NaN; their generations."""
    loader, pool = loader_of(files, store), driver.runner.pool
    assert pool is not None
    pool.chunks.fill_(torch.nan)
    free = torch.randperm(NUM_CHUNKS, generator=torch.Generator().manual_seed(3)).tolist()
    generations = {"base": 0}
    for name in ADAPTERS:
        if (files / name).exists():
            packed = loader.load(str(files / name), trusted=True)
            generations[name] = len(generations)
            pool.upload(generations[name], packed, [free.pop() for _ in packed.chunks])
    return generations


@pytest.fixture
def loaded(files: Path, tmp_path: Path) -> tuple[Driver, dict[str, int]]:
    driver = Driver.of(files / "model", num_chunks=NUM_CHUNKS)
    return driver, load_all(driver, files, tmp_path / "store")


def check(driver: Driver, sequence: Sequence, wanted: tuple[Answer, list[float]]) -> None:
    (token_ids, logprobs), of_prompt = wanted
    assert outputs(sequence) == token_ids
    assert [s.logprob for s in driver.samples[sequence.sequence_id]] == pytest.approx(logprobs, abs=1e-3)
    assert [score.logprob for score in sequence.prompt_logprobs] == pytest.approx(of_prompt, abs=1e-3)


def test_the_adapters_differ(expected: dict[str, tuple[Answer, list[float]]]) -> None:
    scores = [tuple(round(logprob, 2) for logprob in (*answer[1], *prompt)) for answer, prompt in expected.values()]
    assert len(set(scores)) == len(scores)


def test_each_alone(loaded: tuple[Driver, dict[str, int]], expected: dict[str, tuple[Answer, list[float]]]) -> None:
    driver, generations = loaded
    for name, generation in generations.items():
        sequence = driver.add(PROMPT, generation, ASKED)
        driver.finish([sequence], NUM_OUTPUTS)
        check(driver, sequence, expected[name])


@pytest.mark.parametrize("seed", range(2))
def test_all_mixed_in_any_split(
    loaded: tuple[Driver, dict[str, int]], expected: dict[str, tuple[Answer, list[float]]], seed: int
) -> None:
    driver, generations = loaded
    rng = random.Random(seed)
    rows = [(name, driver.add(PROMPT, generation, ASKED)) for name, generation in [*generations.items()] * 2]
    while unfinished := [s for _, s in rows if s.num_output_tokens < NUM_OUTPUTS]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        driver.step([(s, rng.randint(1, s.num_uncomputed_tokens)) for s in chosen])
    for name, sequence in rows:
        check(driver, sequence, expected[name])


def test_base_rows_are_the_same_to_the_bit_whatever_is_beside_them(loaded: tuple[Driver, dict[str, int]]) -> None:
    driver, generations = loaded
    answers = []
    for mates in (["base", "base", "base"], ["dora", "edges alone", "plain"], ["embeddings", "dora of some", "head"]):
        base = [driver.add([5, 6], 0, ASKED), driver.add([7, 8, 3], 0, ASKED)]
        batch = [driver.add([5, 4], generations[name], ASKED) for name in mates]
        driver.finish([batch[0], base[0], batch[1], base[1], batch[2]], 4)
        answers.append([driver.samples[s.sequence_id] for s in base])
    assert answers[0] == answers[1] == answers[2]


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object], **keys: Any) -> Path:
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text()) | keys
    (target / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(source / WEIGHTS)
    change(weights)
    save_file(weights, target / WEIGHTS)
    return target


def fill(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights[name].fill_(value)


def resize(weights: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    weights[name] = torch.cat((weights[name], weights[name][:8]))


def cancel(weights: dict[str, torch.Tensor]) -> None:
    """W + ΔW = 0 cannot be reached with a low rank, but infinity can."""
    weights[MAGNITUDE.replace("lora_magnitude_vector", "lora_A.weight")].fill_(3e30)


FAULTS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], dict[str, Any], str]] = {
    "NaN": ("dora", fill(MAGNITUDE, torch.nan), {}, f"{MAGNITUDE} holds NaN"),
    "NaN in B": ("dora", fill(MAGNITUDE[:-21] + "lora_B.weight", torch.nan), {}, "v_proj.lora_B.weight holds NaN"),
    "overflow": ("dora", cancel, {}, f"{MAGNITUDE}: the weights that it scales"),
    "no magnitude": ("dora", lambda weights: weights.pop(MAGNITUDE), {}, f"missing: {MAGNITUDE} (use_dora)"),
    "magnitude of another base": (
        "dora",
        lambda weights: weights.update({MAGNITUDE: torch.ones(7)}),
        {},
        f"{MAGNITUDE} has the shape [7]",
    ),
    "magnitudes of plain LoRA": ("dora", lambda _: None, {"use_dora": False}, "in no module of this model"),
    "DoRA of the head": ("head", lambda _: None, {"use_dora": True}, "use_dora with lm_head"),
    "another vocabulary": ("edges alone", resize, {}, "has the shape [328, "),
    "other embeddings": (
        "edges alone",
        fill("base_model.model.lm_head.base_layer.weight", 0.0),
        {},
        "lm_head.base_layer.weight differs from the base model's",
    ),
    "base weights without a need": (
        "plain",
        lambda weights: weights.update({"base_model.model.lm_head.weight": torch.zeros(1)}),
        {},
        "in no module",
    ),
}


def test_dora_with_the_lengths_that_it_has_anyway_is_the_plain_adapter(files: Path, tmp_path: Path) -> None:
    save_adapter(files / "model", tmp_path / "dora", ADAPTERS["dora"], moved=False)

    def strip(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if "magnitude" in name]:
            del weights[name]

    edited(tmp_path / "dora", tmp_path / "plain", strip, use_dora=False)
    loader, driver = loader_of(files, tmp_path / "store"), Driver.of(files / "model", num_chunks=3)
    found = []
    for generation, name, chunk_ids in ((1, "dora", (2, 0)), (2, "plain", (1,))):
        assert driver.runner.pool is not None
        driver.runner.pool.upload(generation, loader.load(str(tmp_path / name), trusted=True), chunk_ids)
        sequence = driver.add(PROMPT, generation, ASKED)
        driver.finish([sequence], NUM_OUTPUTS)
        found.append((outputs(sequence), [s.logprob for s in driver.samples[sequence.sequence_id]]))
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(found[1][1], abs=1e-4)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_refused_by_name(fault: str, files: Path, tmp_path: Path) -> None:
    source, change, keys, message = FAULTS[fault]
    bad = edited(files / source, tmp_path / "bad", change, **keys)
    with pytest.raises(AdapterError) as refused:
        loader_of(files, tmp_path / "store").load(str(bad), trusted=True)
    assert refused.value.error.code is ErrorCode.ADAPTER_INVALID and message in refused.value.error.message


def test_without_the_base_models_weights_they_are_refused(files: Path, tmp_path: Path) -> None:
    loader = loader_of(files, tmp_path / "store", with_base=False)
    for name, reason in (("dora", "use_dora needs"), ("edges alone", "cannot be compared")):
        with pytest.raises(AdapterError, match=reason):
            loader.load(str(files / name), trusted=True)


def test_base_weights_gone_are_an_error_of_the_server_and_plain_adapters_need_none(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "smollm")
    for name in ("plain", "dora"):
        save_adapter(tmp_path / "model", tmp_path / name, ADAPTERS[name])
    loader = loader_of(tmp_path, tmp_path / "store")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert loader.load(str(tmp_path / "plain"), trusted=True).parts.is_sum
    with pytest.raises(AdapterError) as refused:
        loader.load(str(tmp_path / "dora"), trusted=True)
    assert refused.value.error.code is ErrorCode.INTERNAL
