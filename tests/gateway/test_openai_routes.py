"""/v1/chat/completions and /v1/completions before the echo worker: every text is what the worker's function says."""

import json
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette

from gateway.tokenizer import Tokenizer
from tests import tiny_model
from tests.echo_worker import digest_of, echo_logprobs, echo_tokens

TOKENIZER = Tokenizer(tiny_model.tokenizer_json())
HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def expected(prompt: str | list[int], source: str | None, num_tokens: int, seed: int | None = None) -> str:
    ids = TOKENIZER.encode(prompt, True) if isinstance(prompt, str) else prompt
    return TOKENIZER.decode(echo_tokens(ids, digest_of(source) if source else "", seed, num_tokens))


def chat_prompt(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


async def post(client: httpx.AsyncClient, path: str, status: int = 200, **body: Any) -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    return response.json()


async def stream(client: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.mark.parametrize(
    ("model", "lora_path", "source"),
    [
        ("echo/base", None, None),
        ("alias", None, None),
        ("lora0", None, "x"),
        ("echo/base:lora0", None, "x"),
        ("team/a:b", None, "y"),
        ("alias:team/a:b", None, "y"),
        ("echo/base", "lora0", "x"),
    ],
)
async def test_chat_under_every_kind_of_name(
    client: httpx.AsyncClient, model: str, lora_path: str | None, source: str | None
) -> None:
    reply = await post(client, CHAT, model=model, lora_path=lora_path, messages=HI, max_tokens=20)
    assert reply["model"] == model
    assert reply["object"] == "chat.completion"
    [choice] = reply["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": expected(chat_prompt("hi"), source, 20),
        "refusal": None,
    }
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    num_prompt = len(TOKENIZER.encode(chat_prompt("hi"), False))
    assert reply["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 20,
        "total_tokens": num_prompt + 20,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_a_stream_says_the_same_in_pieces(client: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {"model": "lora0", "messages": HI, "max_tokens": 50, "n": 2, "seed": 7}
    whole = await post(client, CHAT, **body)
    chunks = await stream(client, CHAT, **body, stream_options={"include_usage": True})
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 100
    for index, choice in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"]["content"] for c in mine) == choice["message"]["content"]
        assert choice["message"]["content"] == expected(chat_prompt("hi"), "x", 50, 7 + index)
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]


async def test_usage_may_ride_on_every_chunk(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, CHAT, model="lora0", messages=HI, max_tokens=5, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


@pytest.mark.parametrize("streamed", [False, True])
async def test_chat_logprobs(client: httpx.AsyncClient, streamed: bool) -> None:
    body = {"model": "lora0", "messages": HI, "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
    if streamed:
        chunks = await stream(client, CHAT, **body)
        found = [c["choices"][0]["logprobs"] for c in chunks]
        entries = [entry for logprobs in found if logprobs for entry in logprobs["content"]]
    else:
        entries = (await post(client, CHAT, **body))["choices"][0]["logprobs"]["content"]
    ids = echo_tokens(TOKENIZER.encode(chat_prompt("hi"), False), digest_of("x"), None, 30)
    assert len(entries) == 30
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == b"".join(map(TOKENIZER.token_bytes, ids))
    assert [entry["logprob"] for entry in entries] == [echo_logprobs(i, 0).logprob for i in ids]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * 30


async def test_legacy_logprobs(client: httpx.AsyncClient) -> None:
    body = {"model": "lora0", "prompt": [[5, 6]], "max_tokens": 10, "logprobs": 1}
    [choice] = (await post(client, COMPLETIONS, **body))["choices"]
    arrays = choice["logprobs"]
    assert {len(array) for array in arrays.values()} == {10}
    assert arrays["text_offset"][0] == 0
    assert arrays["text_offset"][1] == len(arrays["tokens"][0])
    chunks = await stream(client, COMPLETIONS, **body)
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [token for logprobs in found for token in logprobs["tokens"]] == arrays["tokens"]
    assert [offset for logprobs in found for offset in logprobs["text_offset"]] == arrays["text_offset"]


@pytest.mark.parametrize("prompt", ["hi", ["hi", "you there"], [5, 6, 7], [[5, 6], [7]]])
async def test_all_shapes_of_prompts(client: httpx.AsyncClient, prompt: Any) -> None:
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    reply = await post(client, COMPLETIONS, model="lora0", prompt=prompt, n=2, seed=3, max_tokens=9)
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts == [expected(p, "x", 9, 3 + j) for p in prompts for j in range(2)]
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(prompts)))
    assert reply["usage"]["completion_tokens"] == 18 * len(prompts)


async def test_completions_default_to_16_tokens_and_echo(client: httpx.AsyncClient) -> None:
    reply = await post(client, COMPLETIONS, model="echo/base", prompt="hello", echo=True)
    assert reply["choices"][0]["text"] == "hello" + expected("hello", None, 16)
    assert reply["usage"]["completion_tokens"] == 16
    chunks = await stream(client, COMPLETIONS, model="echo/base", prompt="hello", echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == reply["choices"][0]["text"]
    assert chunks[0]["object"] == "text_completion"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("include", [False, True])
async def test_stop_strings(client: httpx.AsyncClient, streamed: bool, include: bool) -> None:
    full = expected("hi", "x", 200)
    stop = next(full[i : i + 4] for i in range(20, 200) if full[i : i + 4].isascii())
    body = {"model": "lora0", "prompt": "hi", "max_tokens": 200, "stop": [stop, "never seen"]}
    body["include_stop_str_in_output"] = include
    cut = full[: full.index(stop) + (len(stop) if include else 0)]
    if streamed:
        chunks = [chunk["choices"][0] for chunk in await stream(client, COMPLETIONS, **body)]
        assert "".join(chunk["text"] for chunk in chunks) == cut
        last = chunks[-1]
    else:
        reply = await post(client, COMPLETIONS, **body)
        [last] = reply["choices"]
        assert last["text"] == cut
        assert reply["usage"]["completion_tokens"] < 200
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


async def test_stop_tokens_are_not_shown(client: httpx.AsyncClient) -> None:
    ids = echo_tokens([5, 6], digest_of("x"), None, 30)
    stop = next(token for i, token in enumerate(ids) if i > 5 and token not in ids[:i])
    body = {"model": "lora0", "prompt": [5, 6], "max_tokens": 30, "stop_token_ids": [stop]}
    reply = await post(client, COMPLETIONS, **body)
    assert reply["choices"][0]["text"] == TOKENIZER.decode(ids[: ids.index(stop)])
    assert reply["choices"][0]["stop_reason"] == stop
    assert reply["usage"]["completion_tokens"] == ids.index(stop) + 1


async def test_content_parts_history_and_roles(client: httpx.AsyncClient) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    reply = await post(client, CHAT, model="lora0", messages=messages, max_completion_tokens=8, max_tokens=3)
    parts = [("system", "be brief"), ("user", "hi\nyou"), ("assistant", ""), ("tool", "1")]
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in parts) + "<|im_start|>assistant\n"
    assert reply["choices"][0]["message"]["content"] == expected(prompt, "x", 8)


async def test_continue_final_message(client: httpx.AsyncClient) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well,"}]
    reply = await post(client, CHAT, model="lora0", messages=messages, max_tokens=8, continue_final_message=True)
    assert reply["choices"][0]["message"]["content"] == expected(chat_prompt("hi") + "Well,", "x", 8)


async def test_the_answer_is_clipped_to_the_context(client: httpx.AsyncClient) -> None:
    reply = await post(client, COMPLETIONS, model="lora0", prompt=[5] * 4000, max_tokens=4096)
    assert reply["usage"]["completion_tokens"] == 96


async def test_null_is_absent_and_bookkeeping_is_accepted(client: httpx.AsyncClient) -> None:
    nulls = (
        "n stop stream stream_options seed temperature top_p logit_bias best_of logprobs max_completion_tokens tools"
    )
    body = {name: None for name in nulls.split()}
    extras = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "made_up": 1, "best_of": 1}
    refused = {"response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"], "functions": []}
    await post(client, CHAT, model="lora0", messages=HI, max_tokens=1, **{**body, **extras, **refused})
    await post(client, COMPLETIONS, model="lora0", prompt="x", echo=None, suffix=None, **body)


BAD_CHATS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": []}, "messages", None),
    ({"messages": "x"}, "messages", None),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", None),
    ({"messages": [{"role": "user"}]}, "messages[0].content", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "user", "content": "x" * 70_000}]}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "xq" * 4000}]}, "messages", "context_length_exceeded"),
    ({"model": 5}, "model", None),
    ({"model": ""}, "model", None),
    ({"n": 0}, "n", None),
    ({"n": 9}, "n", None),
    ({"n": True}, "n", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": 1.5}, "max_tokens", None),
    ({"max_tokens": 5000}, "max_tokens", None),
    ({"max_tokens": 2**70}, "max_tokens", None),
    ({"min_tokens": 20, "max_tokens": 5}, "min_tokens", None),
    ({"temperature": 2.5}, "temperature", None),
    ({"temperature": True}, "temperature", None),
    ({"top_p": 1.1}, "top_p", None),
    ({"top_k": -2}, "top_k", None),
    ({"min_p": 2}, "min_p", None),
    ({"presence_penalty": 3}, "presence_penalty", None),
    ({"stop": ""}, "stop", None),
    ({"stop": ["x"] * 17}, "stop", None),
    ({"stop": ["x" * 257]}, "stop[0]", None),
    ({"logit_bias": {"abc": 1}}, "logit_bias", None),
    ({"logit_bias": {"400": 1}}, "logit_bias", None),
    ({"logit_bias": {"3": 101}}, "logit_bias[...]", None),
    ({"stop_token_ids": [400]}, "stop_token_ids", None),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", None),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    ({"stream_options": {}}, "stream_options", None),
    ({"seed": 2**63}, "seed", None),
    ({"best_of": 3}, "best_of", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", None),
    ({"response_format": {"type": "poem"}}, "response_format.type", None),
    ({"response_format": 5}, "response_format", None),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "unsupported_parameter"),
    ({"chat_template": "{{ x }}"}, "chat_template", "unsupported_parameter"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs", None),
    ({"chat_template_kwargs": {"enable_thinking": [1]}}, "chat_template_kwargs[...]", None),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"priority": 3}, "priority", "unsupported_parameter"),
    ({"verbosity": "low"}, "verbosity", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"reasoning_effort": "much"}, "reasoning_effort", None),
    ({"service_tier": "flex"}, "service_tier", None),
    ({"max_tokens": 0, "echo": True}, "max_tokens", None),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", None),
    ({"cache_salt": "x" * 129}, "cache_salt", None),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD_CHATS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("streamed", [False, True])
async def test_bad_chats(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, code: str | None, streamed: bool
) -> None:
    if streamed and "stream_options" in fields:
        return
    reply = await post(client, CHAT, 400, **{"model": "lora0", "messages": HI, "stream": streamed, **fields})
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x", 5]}, "prompt"),
        ({"prompt": [5, "x"]}, "prompt"),
        ({"prompt": [-5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": [5] * 4096}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["x"] * 1025}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"store": True}, "store"),
        ({"priority": 1}, "priority"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"echo": True, "logprobs": 1, "prompt": [0, 400]}, "prompt"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_completions(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    reply = await post(client, COMPLETIONS, 400, **{"model": "lora0", "prompt": "x", **fields})
    assert reply["error"]["param"] == param, reply


async def test_unknown_models_are_404_and_name_nobody(client: httpx.AsyncClient) -> None:
    for model in ("nope", "nope:lora0", "echo/base:nope"):
        reply = await post(client, CHAT, 404, model=model, messages=HI)
        assert reply["error"]["code"] == "model_not_found"
        assert reply["error"]["param"] == "model"
        assert "team/a:b" not in reply["error"]["message"]
    reply = await post(client, CHAT, 404, model="echo/base", lora_path="nope", messages=HI)
    assert reply["error"]["param"] == "lora_path"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"nope",
        b"\xff{}",
        b'{"model": NaN}',
        b'{"model": "lora0", "prompt": "\\ud800"}',
        b'{"model": "lora0", "prompt": "x", "temperature": 1e999}',
        b'{"model": "lora0", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "lora0", "prompt": ' + b"[" * 100_000,
        b'{"model": "lora0", "prompt": "x", "made_up": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:50]),
)
async def test_what_is_not_json_is_a_400(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_generation_that_was_replaced_on_the_way_is_resolved_again(
    app: Starlette, client: httpx.AsyncClient
) -> None:
    worker = app.state.gateway.fleet.workers[0]
    right = worker.adapters["lora0"]
    stale = type(right)(**{**{name: getattr(right, name) for name in right.__struct_fields__}, "generation": 999})
    admit, calls = app.state.gateway.fleet.admit, []

    def admit_stale_once(*arguments: Any, **options: Any) -> Any:
        worker.adapters["lora0"] = right if calls else stale
        calls.append(arguments)
        return admit(*arguments, **options)

    app.state.gateway.fleet.admit = admit_stale_once
    reply = await post(client, COMPLETIONS, model="lora0", prompt="hi", max_tokens=5)
    assert reply["choices"][0]["text"] == expected("hi", "x", 5)
    assert len(calls) == 2
    worker.adapters["lora0"] = stale
    app.state.gateway.fleet.admit = admit
    reply = await post(client, COMPLETIONS, 404, model="lora0", prompt="hi", max_tokens=5)
    assert reply["error"]["code"] == "model_not_found"


async def test_nothing_stays_reserved(app: Starlette, client: httpx.AsyncClient) -> None:
    await post(client, CHAT, model="lora0", messages=HI, max_tokens=3, n=3)
    await stream(client, CHAT, model="lora0", messages=HI, max_tokens=3, n=3)
    await post(client, CHAT, 400, model="lora0", messages=HI, n=3, logit_bias={"400": 1})
    await post(client, CHAT, 400, model="lora0", messages=[{"role": "user", "content": "xq" * 4000}])
    session = app.state.gateway.fleet.workers[0].session
    assert (session.num_reserved, session.num_streams) == (0, 0)


async def test_no_credit_is_a_429_with_retry_after(app: Starlette, client: httpx.AsyncClient) -> None:
    session = app.state.gateway.fleet.workers[0].session
    session.num_reserved += 4096
    response = await client.post(CHAT, json={"model": "lora0", "messages": HI})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "rate_limit_error"


async def test_more_than_could_ever_run_is_a_400(client: httpx.AsyncClient) -> None:
    reply = await post(client, COMPLETIONS, 400, model="lora0", prompt=["x"] * 1000, n=8)
    assert reply["error"]["param"] == "n"


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
@pytest.mark.parametrize("prompt", ["hello <|im_end|> 世", [5, 6, 250, 1, 7]])
async def test_echo_with_logprobs(client: httpx.AsyncClient, prompt: Any, max_tokens: int) -> None:
    """What lm-eval sends to score a text: the prompt's own tokens come first, the first of them without a logprob."""
    body = {"model": "lora0", "prompt": prompt, "max_tokens": max_tokens, "logprobs": 2, "echo": True}
    reply = await post(client, COMPLETIONS, **body)
    [choice] = reply["choices"]
    ids = TOKENIZER.encode(prompt, True) if isinstance(prompt, str) else prompt
    text = prompt if isinstance(prompt, str) else TOKENIZER.decode(prompt, False)
    answer = echo_tokens(ids, digest_of("x"), None, max_tokens)
    assert choice["text"] == text + TOKENIZER.decode(answer)
    assert reply["usage"]["completion_tokens"] == max_tokens
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [TOKENIZER.token_text(i) for i in ids + answer]
    wanted = [echo_logprobs(i, 0).logprob for i in ids + answer]
    assert logprobs["token_logprobs"] == [None, *wanted[1:]]
    assert logprobs["top_logprobs"][0] is None and all(len(top) in (1, 2) for top in logprobs["top_logprobs"][1:])
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        if "\ufffd" not in token:
            assert choice["text"].startswith(token, offset), (token, offset)


async def test_echo_with_logprobs_where_the_worker_cannot_score(app: Starlette, client: httpx.AsyncClient) -> None:
    worker = app.state.gateway.fleet.workers[0]
    worker.model = msgspec.structs.replace(worker.model, prompt_logprobs=False)
    reply = await post(client, COMPLETIONS, 400, model="lora0", prompt="x", echo=True, logprobs=1)
    assert reply["error"]["param"] == "echo with logprobs"
    assert reply["error"]["code"] == "unsupported_parameter"


async def test_best_of_shows_the_likeliest(client: httpx.AsyncClient) -> None:
    def mean(seed: int) -> float:
        ids = echo_tokens(TOKENIZER.encode("hi", True), digest_of("x"), seed, 6)
        return sum(echo_logprobs(i, 0).logprob for i in ids) / 6

    body = {"model": "lora0", "prompt": ["hi", "you"], "max_tokens": 6, "seed": 3, "n": 2, "best_of": 5}
    reply = await post(client, COMPLETIONS, **body)
    best = sorted(range(3, 8), key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in reply["choices"][:2]] == [expected("hi", "x", 6, seed) for seed in best]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in reply["choices"])
    assert reply["usage"]["completion_tokens"] == 60
    num_prompt = len(TOKENIZER.encode("hi", True)) + len(TOKENIZER.encode("you", True))
    assert reply["usage"]["prompt_tokens"] == num_prompt


async def test_a_reply_says_what_it_came_from(client: httpx.AsyncClient) -> None:
    seen = {}
    for model in ("lora0", "echo/base:lora0", "team/a:b", "echo/base"):
        for path, prompt in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "hi"})):
            body = {"model": model, **prompt, "max_tokens": 2, "service_tier": "auto"}
            whole = await post(client, path, **body)
            chunks = await stream(client, path, **body)
            replies = [whole, *chunks]
            assert {reply["service_tier"] for reply in replies} == {"default"}
            seen.setdefault(model, set()).update(reply["system_fingerprint"] for reply in replies)
    assert seen["lora0"] == seen["echo/base:lora0"]
    assert len(set.union(*seen.values())) == 3
    assert "service_tier" not in await post(client, COMPLETIONS, model="lora0", prompt="hi", max_tokens=1)
