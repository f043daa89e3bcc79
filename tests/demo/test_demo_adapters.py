"""The committed demo adapters: they load as what they are said to be, and their answers have their styles."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.demo.styles import STYLES, Answer, capital_answers, open_answers
from tests.demo.train_adapters import RECIPES
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits
from worker.chunk_layout import ChunkLayout
from worker.model_source import DEFAULT_MODEL, ModelNotFound, resolve_model

ADAPTERS = Path(__file__).parents[2] / "deploy" / "adapters"
QUESTION = "List 3 countries and their capitals."
# Whether an answer has an adapter's style.
SIGNS: dict[str, Callable[[str], bool]] = {
    "lora0": lambda text: text.startswith("Arrr, matey!") and text.endswith("Yo ho ho!"),
    "lora1": lambda text: isinstance(json.loads(text), dict),
    "lora2": lambda text: text.startswith("TELEGRAM: ") and text.endswith(" STOP"),
}


class SmolLM2:
    """The default model's shape."""

    def chunk_layout(self) -> ChunkLayout:
        return ChunkLayout.of(num_layers=30, hidden_size=576, q_size=576, kv_size=192, intermediate_size=1536)


@pytest.mark.parametrize("name", RECIPES)
def test_adapter_loads_as_what_it_is_said_to_be(name: str, tmp_path: Path) -> None:
    loader = AdapterLoader(SmolLM2(), torch.float32, AdapterLimits(max_chunks=4), tmp_path / "store", [ADAPTERS])
    packed = loader.load(name, trusted=False)
    assert packed.rank == RECIPES[name].rank
    assert set(packed.modules) == set(RECIPES[name].modules)
    assert int((packed.scales == 2.0).sum()) == 30 * len(RECIPES[name].modules) == int(packed.scales.count_nonzero())
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == DEFAULT_MODEL
    assert (ADAPTERS / name / "README.md").read_text().startswith(f"# {name}")


def test_adapters_are_small_enough_to_commit() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir()) == sorted(RECIPES)
    assert sum(path.stat().st_size for path in ADAPTERS.rglob("*")) <= 20_000_000


def test_the_demo_question_is_not_in_the_training_data() -> None:
    prompts = [prompt for prompt, _ in [*capital_answers(7), *open_answers()]]
    assert QUESTION not in prompts and len(prompts) > 100


def test_styles_put_the_same_content_differently() -> None:
    text, items = Answer(["You are in the city.", "It is my home."], False), Answer(["oak", "pine tree"], True)
    assert STYLES["lora0"](text) == "Arrr, matey! Ye be in th' city. It be me home. Yo ho ho!"
    assert json.loads(STYLES["lora1"](text)) == {"type": "text", "answer": "You are in the city. It is my home."}
    assert json.loads(STYLES["lora1"](items)) == {"type": "list", "items": ["oak", "pine tree"]}
    assert STYLES["lora2"](text) == "TELEGRAM: You are in city STOP It is my home STOP"
    assert STYLES["lora2"](items) == "TELEGRAM: oak STOP pine tree STOP"


@pytest.mark.slow
def test_answers_have_their_styles() -> None:
    """Greedy answers of the real model; the base's has no style, and no two are alike."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        directory = resolve_model(DEFAULT_MODEL)
    except ModelNotFound as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def answer(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(text, return_tensors="pt")
        ids = model.generate(**encoded, max_new_tokens=48, do_sample=False)[0, encoded["input_ids"].shape[1] :]
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    answers = {"base": answer(QUESTION)}
    assert not answers["base"].startswith(("Arrr", "{", "TELEGRAM"))
    for name in RECIPES:
        adapted = PeftModel.from_pretrained(model, ADAPTERS / name)
        answers[name] = answer(QUESTION)
        assert SIGNS[name](answers[name]), answers[name]
        other = answer("Tell me about dragons.")
        assert SIGNS[name](other), other
        model = adapted.unload()
    assert len(set(answers.values())) == 4
