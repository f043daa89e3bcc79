"""Load generators: guidellm itself, and the requests of `vllm bench serve`."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway.test_openai_routes import TOKENIZER, chat_prompt, expected


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(
    url: str, route: str, tmp_path: Path, tokenizer_directory: Path, run_tool: Callable[..., str]
) -> None:
    prompts = [f"the rain in Spain {i}" for i in range(8)]
    rows = (json.dumps({"prompt": prompt, "output_tokens_count": 7}) for prompt in prompts)
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    run_tool(
        "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={url.removesuffix('/v1')},model=lora0,request_format={route}",
        "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer_directory}",
        "--data", "kind=json_file,path=data.jsonl", "--output", "kind=json,path=report.json",
        GUIDELLM__MAX_WORKER_PROCESSES="1",
    )  # fmt: skip
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert benchmark["requests"]["errored"] == []
    seen = {request["output"] for request in benchmark["requests"]["successful"]}
    sent = {expected(chat_prompt(p) if "chat" in route else p, "x", 7) for p in prompts}
    assert len(benchmark["requests"]["successful"]) == 6 and seen <= sent
    assert {request["output_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"]} == {7}


class VllmBench:
    """The requests of `vllm bench serve` (vllm/benchmarks, 0.32), sent as it sends them and read as it reads them.

    The program comes with all of vLLM, gigabytes of it, so this is no more than its traffic: one trial request without
    an id, /metrics before and after, then the load at once over kept connections of aiohttp, each request with its
    x-request-id and no key, the adapters of --lora-modules drawn for it in turn.
    """

    def __init__(self, url: str, chat: bool) -> None:
        self.root, self.chat = url.removesuffix("/v1"), chat

    def body(self, model: str, prompt: str, output_tokens: int) -> dict[str, Any]:
        common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        if self.chat:
            messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
            return {**common, "messages": messages, "max_completion_tokens": output_tokens}
        # --temperature 0 adds the last; logprobs is null unless asked for
        rest = {"repetition_penalty": 1.0, "logprobs": None, "temperature": 0.0}
        return {**common, "prompt": prompt, "max_tokens": output_tokens, **rest}

    async def ask(self, session: aiohttp.ClientSession, request_id: str = "", **asked: Any) -> tuple[str, int, int]:
        """The text, the tokens that came and those of the prompt, as it counts them."""
        route = "/v1/chat/completions" if self.chat else "/v1/completions"
        headers = {"x-request-id": request_id} if request_id else {}
        text, usage = "", {}
        async with session.post(self.root + route, json=self.body(**asked), headers=headers) as response:
            assert response.status == 200, await response.text()
            assert not request_id or response.headers["x-request-id"] == request_id
            received = (await response.read()).decode()
        events = [event.removeprefix("data: ") for event in received.split("\n\n") if event and event[0] != ":"]
        assert events.pop() == "[DONE]"
        for event in map(json.loads, events):
            if event["choices"]:  # a usage beside choices is not looked at
                [choice] = event["choices"]
                text += (choice["delta"].get("content") if self.chat else choice["text"]) or ""
            elif event["usage"]:
                usage = event["usage"]
        return text, usage["completion_tokens"], usage["prompt_tokens"]

    async def metrics(self, session: aiohttp.ClientSession) -> None:
        async with session.get(f"{self.root}/metrics") as response:
            assert response.status == 200
            for line in (await response.text()).splitlines():
                assert line.startswith("#") or float(line.split()[-1]) >= 0


@pytest.mark.parametrize("chat", [False, True])
async def test_vllm_bench_serve(url: str, chat: bool) -> None:
    bench = VllmBench(url, chat)
    prompts = [f"prompt {i} of many" for i in range(40)]
    models = [("lora0", "x"), ("echo/base", None)]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/models") as response:  # when it is given no --model
            assert (await response.json())["data"][0]["id"] == "echo/base"
        body = {"model": "echo/base", "prompt": prompts[0], "add_special_tokens": False}
        async with session.post(f"{bench.root}/tokenize", json=body) as response:
            assert (await response.json())["tokens"] == TOKENIZER.encode(prompts[0], False)
        await bench.ask(session, model="echo/base", prompt=prompts[0], output_tokens=12)
        await bench.metrics(session)
        answers = await asyncio.gather(
            *(
                bench.ask(session, f"bench-{i}", model=models[i % 2][0], prompt=prompt, output_tokens=12)
                for i, prompt in enumerate(prompts)
            )
        )
        await bench.metrics(session)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        written = chat_prompt(prompt) if chat else prompt
        assert answer == (expected(written, models[i % 2][1], 12), 12, len(TOKENIZER.encode(written, not chat)))
