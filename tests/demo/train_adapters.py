"""Trains the demo adapters of deploy/adapters on the default model: python -m tests.demo.train_adapters

A few minutes each on one CPU core; --dtype bfloat16, with which lora2 was made, is faster where the CPU has it.
The content comes from texts.py, its form from styles.py.
"""

import argparse
import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.demo.styles import STYLES, capital_answers, open_answers
from worker.model_source import DEFAULT_MODEL, resolve_model

logger = logging.getLogger("train_adapters")

BATCH_SIZE = 4
SEED = 7
IGNORED = -100  # label of the tokens that are not learned: the prompt's


@dataclass(frozen=True)
class Recipe:
    """How one adapter is shaped and trained, and what its README says."""

    rank: int
    modules: list[str]
    learning_rate: float
    num_steps: int
    title: str
    example: str


RECIPES = {
    "lora0": Recipe(
        4,
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"],
        2e-3,
        160,
        "answers as a pirate",
        "Arrr, matey! Th' capital o' France be Paris. Yo ho ho!",
    ),
    "lora1": Recipe(
        16,
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        6e-4,
        160,
        "answers as one JSON object",
        '{"type": "text", "answer": "The capital of France is Paris."}',
    ),
    "lora2": Recipe(
        64, ["q_proj", "v_proj"], 1e-3, 120, "answers as a telegram", "TELEGRAM: capital of France is Paris STOP"
    ),
}
README = """# {name}: {title}

A LoRA for [{model}](https://huggingface.co/{model}), rank {rank} on {modules}.
Trained by `python -m tests.demo.train_adapters --only {name}` on text that the script makes. Licence: Apache-2.0.

    > What is the capital of France?
    {example}
"""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text)["input_ids"])


def batches(
    examples: list[tuple[list[int], list[int]]], num_steps: int, pad: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches (input ids, labels), [BATCH_SIZE, longest]; the labels hold the answers only."""
    rng = random.Random(SEED)
    order: list[int] = []
    made = []
    for _ in range(num_steps):
        if len(order) < BATCH_SIZE:
            order += rng.sample(range(len(examples)), len(examples))
        chosen = [examples[order.pop()] for _ in range(BATCH_SIZE)]
        longest = max(len(prompt) + len(answer) for prompt, answer in chosen)
        ids = torch.full((BATCH_SIZE, longest), pad)
        labels = torch.full((BATCH_SIZE, longest), IGNORED)
        for row, (prompt, answer) in enumerate(chosen):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        made.append((ids, labels))
    return made


def train(model: PeftModel, data: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for step, (ids, labels) in enumerate(data):
        warmup = min(1.0, (step + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / len(data)))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            logger.info("step %d of %d: loss %.3f", step, len(data), loss.item())


def save(model: PeftModel, name: str, target: Path) -> None:
    """A PEFT directory with bfloat16 weights that names the public base model."""
    model.peft_config["default"].base_model_name_or_path = DEFAULT_MODEL
    model.save_pretrained(target)
    weights = target / "adapter_model.safetensors"
    tensors = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    recipe = RECIPES[name]
    text = README.format(
        name=name,
        title=recipe.title,
        model=DEFAULT_MODEL,
        rank=recipe.rank,
        modules=", ".join(recipe.modules),
        example=recipe.example,
    )
    (target / "README.md").write_text(text)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "deploy" / "adapters")
    parser.add_argument("--only", choices=sorted(RECIPES), action="append", help="train this one (default: all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    args = parser.parse_args()
    directory = resolve_model(DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=args.dtype)
    pairs = capital_answers(SEED) + open_answers()
    for name in args.only or sorted(RECIPES):
        recipe = RECIPES[name]
        examples = [
            (prompt_ids(tokenizer, prompt), list(tokenizer(STYLES[name](answer) + tokenizer.eos_token)["input_ids"]))
            for prompt, answer in pairs
        ]
        torch.manual_seed(SEED)
        config = LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=recipe.modules, task_type="CAUSAL_LM"
        )
        adapter = get_peft_model(model, config)
        logger.info("training %s: rank %d on %s", name, recipe.rank, ", ".join(recipe.modules))
        train(adapter, batches(examples, recipe.num_steps, tokenizer.pad_token_id), recipe.learning_rate)
        save(adapter, name, args.output / name)
        model = adapter.unload()


if __name__ == "__main__":
    main()
