"""A property: whatever is asked, a stream's deltas join to the answer that is not streamed, logprobs and usage too."""

from collections import defaultdict
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.conftest import LoopThread
from tests.gateway.test_openai_routes import CHAT, COMPLETIONS, TOKENIZER, expected, post, stream
from tests.processes import EchoProcess

TOKENS = st.lists(st.integers(3, 399), min_size=1, max_size=6)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 3),
    "seed": st.integers(0, 5),
    "max_tokens": st.integers(1, 40),
    "min_tokens": st.just(1),
    "temperature": st.sampled_from([0, 0.7]),
    "stop_token_ids": st.lists(st.integers(3, 399), max_size=100),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "ignore_eos": st.booleans(),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.just({"7": 1}),
}
ONLY_CHAT: dict[str, st.SearchStrategy[Any]] = {"logprobs": st.just(True), "continue_final_message": st.booleans()}
ONLY_COMPLETIONS: dict[str, st.SearchStrategy[Any]] = {"logprobs": st.integers(0, 3), "echo": st.booleans()}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A request that succeeds; some of its stop strings occur in the answer."""
    body: dict[str, Any] = {"model": draw(st.sampled_from(["lora0", "echo/base", "echo/base:team/a:b"]))}
    path = draw(st.sampled_from([CHAT, COMPLETIONS]))
    body |= draw(st.fixed_dictionaries({}, optional=SHARED | (ONLY_CHAT if path == CHAT else ONLY_COMPLETIONS)))
    body.setdefault("max_tokens", 20)
    text = expected([5, 6], "x", 60, body.get("seed"))
    if path == COMPLETIONS:
        body["prompt"] = draw(st.one_of(st.just([5, 6]), TEXTS, st.lists(TEXTS, min_size=1, max_size=3), TOKENS))
    else:
        body["messages"] = [{"role": "user", "content": draw(TEXTS)}, {"role": "assistant", "content": "Well,"}]
        if body.get("logprobs"):
            body["top_logprobs"] = draw(st.integers(0, 3))
    if draw(st.booleans()):
        cut, length = draw(st.integers(0, len(text) - 4)), draw(st.integers(1, 4))
        body["stop"] = [text[cut : cut + length], *draw(st.lists(TEXTS, max_size=2))]
    return path, body


def joined(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """The choices that a stream's chunks add up to."""
    choices: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"text": "", "finish": None, "logprobs": defaultdict(list)}
    )
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices[part["index"]]
            assert choice["finish"] is None, "something came after the end"
            choice["text"] += part["delta"].get("content", "") if "delta" in part else part["text"]
            choice["finish"] = part["finish_reason"]
            choice["stop"] = part.get("stop_reason")
            for name, values in (part["logprobs"] or {}).items():
                choice["logprobs"][name] += values or []
    return choices


async def compare(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    whole = await post(client, path, **body)
    chunks = await stream(client, path, **body, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == whole["usage"]
    choices = joined(chunks)
    assert sorted(choices) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        mine = choices[choice["index"]]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert (mine["text"], mine["finish"], mine["stop"]) == (text, choice["finish_reason"], choice["stop_reason"])
        logprobs = choice["logprobs"] or {}
        assert dict(mine["logprobs"]) == {name: values or [] for name, values in logprobs.items()}
        if path == CHAT and logprobs:
            shown = b"".join(bytes(entry["bytes"]) for entry in logprobs["content"]).decode("utf-8", "replace")
            assert shown.startswith(text) or choice["finish_reason"] == "stop"
    num_prompt = whole["usage"]["prompt_tokens"]
    if path == COMPLETIONS and isinstance(body["prompt"], str):
        assert num_prompt == len(TOKENIZER.encode(body["prompt"], True))


def test_streamed_is_whole(echo: EchoProcess) -> None:
    with LoopThread() as loop, loop.serving(echo) as (_, client):

        @given(requests())
        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: tuple[str, dict[str, Any]]) -> None:
            loop.run(compare(client, *case))

        check()
