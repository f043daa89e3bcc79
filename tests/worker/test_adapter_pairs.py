"""Pairs of adapters that must give equal answers and pairs that must not, each against PEFT, through the CPU runner."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_tiny_model
from tests.worker.driver import Driver, outputs
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits
from worker.chunk_layout import MODULES

PROMPT = [1, 17, 200, 33, 5]
NUM_OUTPUTS = 8
NUM_CHUNKS = 4
R, ALPHA = 8, 64
Answer = tuple[list[int], list[float]]

# Saved by PEFT, all from one seed.
SAVED: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": list(MODULES)},
    "rank pattern": {"target_modules": list(MODULES), "rank_pattern": {"q_proj": 20, "layers.1.mlp.up_proj": 2}},
    "k_proj only": {"target_modules": ["k_proj"]},
    "one layer": {"target_modules": list(MODULES), "layers_to_transform": [1], "layers_pattern": "layers"},
    "without gate": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
}
# The same tensors as another adapter's, under a config changed in these keys.
EDITED: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("plain", {"use_rslora": True}),
    "rslora by hand": ("plain", {"lora_alpha": ALPHA * math.sqrt(R)}),
    "alpha pattern": ("plain", {"alpha_pattern": {"q_proj": 1, "layers.0.mlp.down_proj": 900}}),
    "alpha pattern that says nothing new": ("plain", {"alpha_pattern": {".*_proj": ALPHA}}),
    "regex": ("plain", {"target_modules": r".*\.layers\.\d+\.(mlp|self_attn)\.\w+_proj"}),
    "all-linear": ("plain", {"target_modules": "all-linear"}),
    "fan_in_fan_out": ("plain", {"fan_in_fan_out": True}),
    "rank pattern, rslora": ("rank pattern", {"use_rslora": True}),
    "pattern for layers alone": ("one layer", {"layers_pattern": None}),
    "layer by regex": (
        "one layer",
        {"target_modules": r".*\.1\..*_proj", "layers_to_transform": None, "layers_pattern": None},
    ),
}
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}
EQUAL = [
    ("rslora", "rslora by hand"),
    ("plain", "alpha pattern that says nothing new"),
    ("plain", "regex"),
    ("plain", "all-linear"),
    ("plain", "fan_in_fan_out"),
    ("one layer", "pattern for layers alone"),
    ("one layer", "layer by regex"),
    ("base", "zeros"),
]
DIFFERENT = [
    ("base", "plain"),
    ("base", "k_proj only"),
    ("plain", "rslora"),
    ("plain", "alpha pattern"),
    ("plain", "without gate"),
    ("plain", "one layer"),
    ("rank pattern", "rank pattern, rslora"),
]


def save_all(root: Path) -> None:
    """The model, what PEFT saves, the edited copies, stored dtypes, and an adapter whose B is zero."""
    write_tiny_model(root / "model", "llama3")
    for name, lora in SAVED.items():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
        config = LoraConfig(
            **{"r": R, "lora_alpha": ALPHA, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | lora
        )
        get_peft_model(model, config).save_pretrained(root / name)
    for name, (source, changes) in EDITED.items():
        edit(root / source, root / name, changes)
    for name, dtype in STORED.items():
        edit(root / "plain", root / name, {}, dtype)
    edit(root / "plain", root / "zeros", {})
    weights = load_file(root / "zeros" / "adapter_model.safetensors")
    zeroed = {key: torch.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in weights.items()}
    save_file(zeroed, root / "zeros" / "adapter_model.safetensors")


def edit(source: Path, target: Path, changes: dict[str, Any], dtype: torch.dtype | None = None) -> None:
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text()) | changes
    (target / "adapter_config.json").write_text(json.dumps(config))
    if dtype is not None:
        weights = load_file(target / "adapter_model.safetensors")
        save_file({key: tensor.to(dtype) for key, tensor in weights.items()}, target / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pairs")
    save_all(directory)
    return directory


@pytest.fixture(scope="module")
def served(root: Path) -> dict[str, Answer]:
    """Each adapter's greedy tokens and logprobs as the worker's loader and CPU runner compute them, alone."""
    driver = Driver.of(root / "model", num_chunks=NUM_CHUNKS)
    pool = driver.runner.pool
    assert pool is not None
    model = SimpleNamespace(chunk_layout=lambda: pool.layout)
    loader = AdapterLoader(model, torch.float32, AdapterLimits(max_chunks=NUM_CHUNKS), root / "store")
    answers = {}
    for generation, name in enumerate(["base", *SAVED, *EDITED, *STORED, "zeros"]):
        if generation:
            packed = loader.load(str(root / name), trusted=True)
            pool.upload(generation, packed, range(len(packed.chunks)))
        sequence = driver.add(PROMPT, generation)
        driver.finish([sequence], NUM_OUTPUTS)
        logprobs = [sample.logprob for sample in driver.samples[sequence.sequence_id]]
        answers[name] = (outputs(sequence), [float(logprob) for logprob in logprobs if logprob is not None])
        if generation:
            pool.remove(generation)
    return answers


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")  # PEFT says that it ignores it
@pytest.mark.parametrize("name", ["base", *SAVED, *EDITED, *STORED, "zeros"])
def test_each_is_what_peft_makes_of_it(name: str, root: Path, served: dict[str, Answer]) -> None:
    oracle: Any = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    if name != "base":
        oracle = PeftModel.from_pretrained(oracle, root / name)
    token_ids, logprobs = served[name]
    with torch.inference_mode():
        logits = oracle.eval()(input_ids=torch.tensor([PROMPT + token_ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert token_ids == expected.argmax(-1).tolist()
    assert logprobs == pytest.approx(expected.max(-1).values.tolist(), abs=1e-3)


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_these_are_equal(one: str, other: str, served: dict[str, Answer]) -> None:
    assert served[one][0] == served[other][0]
    if "rslora" in one:  # two ways to compute a scale may differ in its last bit
        assert served[one][1] == pytest.approx(served[other][1], abs=1e-4)
    else:
        assert served[one][1] == served[other][1]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_these_are_not(one: str, other: str, served: dict[str, Answer]) -> None:
    assert max(abs(a - b) for a, b in zip(served[one][1], served[other][1], strict=True)) > 0.01
