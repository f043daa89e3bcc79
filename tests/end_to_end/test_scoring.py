"""Scored prompts: what a model says it would have said is what it said, as evaluations rely on."""

from typing import Any

import openai
import pytest


@pytest.fixture(scope="module")
def client(demo_server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=demo_server + "/v1", api_key="none", max_retries=0)


def tokens(client: openai.OpenAI, text: str) -> list[int]:
    reply = client.post("/../tokenize", body={"prompt": text}, cast_to=dict[str, Any])
    found: list[int] = reply["tokens"]
    return found


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M-Instruct", "lora0"])
def test_an_answer_scores_what_it_was_given(client: openai.OpenAI, model: str) -> None:
    prompt = tokens(client, "The capital of France is")
    options: Any = {"model": model, "temperature": 0, "logprobs": 1}
    said = client.completions.create(prompt=prompt, max_tokens=8, **options).choices[0]
    assert said.logprobs is not None
    answer = tokens(client, said.text)
    for max_tokens in (0, 1):  # as lm-eval asks, in its two ways
        [scored] = client.completions.create(
            prompt=[prompt + answer], max_tokens=max_tokens, echo=True, seed=1234, **options
        ).choices
        assert scored.logprobs is not None and scored.logprobs.token_logprobs is not None
        assert scored.logprobs.token_logprobs[0] is None
        of_answer = scored.logprobs.token_logprobs[len(prompt) : len(prompt) + len(answer)]
        assert of_answer == pytest.approx(said.logprobs.token_logprobs, abs=1e-3)
        assert len(scored.logprobs.token_logprobs) == len(prompt) + len(answer) + max_tokens
