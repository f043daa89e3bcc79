"""The served default model and demo adapters against transformers and PEFT in float32."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.servers import ADAPTERS, QUESTION, serve
from worker.model_source import DEFAULT_MODEL, default_cache_dir, resolve_model

NAMES = [None, "lora0", "lora1", "lora2"]
PROMPTS = [QUESTION, "def fibonacci(n):\n", "The three primary colours are"]
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def oracle() -> Iterator[tuple[Any, Any]]:
    """(tokenizer, PEFT model with all demo adapters)."""
    directory = resolve_model(DEFAULT_MODEL, default_cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(ADAPTERS / "lora0"), adapter_name="lora0")
    for name in NAMES[2:]:
        model.load_adapter(str(ADAPTERS / str(name)), adapter_name=name)
    yield tokenizer, model.float().eval()


def logprobs_of(model: Any, adapter: str | None, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab] log-probabilities of what follows each token."""
    with torch.inference_mode():
        if adapter is None:
            with model.disable_adapter():
                logits = model(torch.tensor([token_ids])).logits[0]
        else:
            model.set_adapter(adapter)
            logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def complete(
    url: str, prompt_ids: list[int], adapter: str | list[dict[str, Any]] | None, scale: float | None = None
) -> dict[str, Any]:
    body = {
        "input_ids": prompt_ids,
        "sampling_params": {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True},
        "lora_path": adapter,
        "lora_scale": scale,
    }
    response = httpx.post(url + "/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def test_greedy_tokens_equal_the_oracle_alone_and_mixed(oracle: tuple[Any, Any]) -> None:
    """Every slot filled, base rows beside them: each request equals itself alone, and PEFT."""
    tokenizer, model = oracle
    paths = ["--lora-paths", *(f"{name}={ADAPTERS / str(name)}" for name in NAMES[1:])]
    cases = [(tokenizer.encode(prompt), name) for prompt in PROMPTS for name in NAMES]
    with serve(*paths, "--max-loras-per-batch", "3") as url:
        alone = [complete(url, ids, name)["output_ids"] for ids, name in cases]
        with ThreadPoolExecutor(len(cases)) as pool:
            mixed = list(pool.map(lambda case: complete(url, *case)["output_ids"], cases))
    assert mixed == alone
    for (prompt_ids, name), answer in zip(cases, alone, strict=True):
        expected = logprobs_of(model, name, prompt_ids + answer)[len(prompt_ids) - 1 : -1].argmax(dim=-1).tolist()
        assert answer == expected, (name, prompt_ids)


def test_logprobs_are_within_a_thousandth_of_the_oracle(oracle: tuple[Any, Any], demo_server: str) -> None:
    tokenizer, model = oracle
    base = httpx.get(demo_server + "/v1/models").json()["data"][0]["id"]
    prompt_ids = tokenizer.encode(QUESTION)
    for name in NAMES:
        body = {"model": name or base, "prompt": prompt_ids, "max_tokens": 16, "temperature": 0, "logprobs": 5}
        choice = httpx.post(demo_server + "/v1/completions", json=body, timeout=120).json()["choices"][0]
        served = choice["logprobs"]
        answer = complete(demo_server, prompt_ids, name)["output_ids"][: len(served["tokens"])]
        expected = logprobs_of(model, name, prompt_ids + answer)[len(prompt_ids) - 1 : -1]
        for place, token_id in enumerate(answer):
            assert abs(served["token_logprobs"][place] - expected[place, token_id].item()) < 1e-3
            best = sorted(served["top_logprobs"][place].values(), reverse=True)[:5]
            wanted = expected[place].topk(5).values.tolist()
            assert max(abs(a - b) for a, b in zip(best, wanted, strict=True)) < 1e-3


@pytest.mark.parametrize("weights", [{"lora0": 0.6, "lora2": 0.6}, {"lora0": 0.5, "lora1": 0.75, "lora2": -0.25}])
def test_a_mix_is_what_peft_merges(oracle: tuple[Any, Any], demo_server: str, weights: dict[str, float]) -> None:
    """Whole, and all of it scaled."""
    tokenizer, model = oracle
    prompt_ids = tokenizer.encode(QUESTION)
    mix = [{"name": name, "weight": weight} for name, weight in weights.items()]
    for scale in (1.0, 0.5):
        model.add_weighted_adapter(list(weights), [scale * w for w in weights.values()], "mix", combination_type="cat")
        answer = complete(demo_server, prompt_ids, mix, scale)["output_ids"]
        expected = logprobs_of(model, "mix", prompt_ids + answer)[len(prompt_ids) - 1 : -1]
        model.set_adapter("lora0")
        model.delete_adapter("mix")
        assert answer == expected.argmax(dim=-1).tolist()
