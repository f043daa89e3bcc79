"""Adapters loaded, replaced and unloaded while requests run: every answer is exactly one adapter's, or an error."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.end_to_end.servers import ADAPTERS, DEMO, QUESTION, serve


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(*DEMO) as server:
        yield server


def ask(url: str, model: str) -> httpx.Response:
    body = {"model": model, "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    return httpx.post(url + "/v1/completions", json=body, timeout=60)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def load(url: str, name: str, source: str, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(ADAPTERS / source), **more}
    return httpx.post(url + "/v1/load_lora_adapter", json=body, timeout=60)


def unload(url: str, name: str) -> httpx.Response:
    return httpx.post(url + "/v1/unload_lora_adapter", json={"lora_name": name}, timeout=60)


def test_replacing_under_load_moves_the_name_at_once(url: str) -> None:
    """After a replace has answered, no request sees the old content; before it, none sees the new."""
    expected = {source: text_of(ask(url, source)) for source in ("lora0", "lora1")}
    base = httpx.get(url + "/v1/models").json()["data"][0]["id"]
    base_text = text_of(ask(url, base))
    assert load(url, "swap", "lora0").status_code == 200
    assert load(url, "swap", "lora1").status_code == 400  # without load_inplace a taken name is refused
    stop = threading.Event()
    seen: list[tuple[str, str]] = []

    def keep_asking(model: str) -> None:
        while not stop.is_set():
            seen.append((model, text_of(ask(url, model))))

    threads = [threading.Thread(target=keep_asking, args=(model,)) for model in ("swap", "lora2", base)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(4):
            source = "lora1" if turn % 2 == 0 else "lora0"
            assert load(url, "swap", source, load_inplace=True).status_code == 200
            assert text_of(ask(url, "swap")) == expected[source]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {text for model, text in seen if model == "swap"} <= set(expected.values())
    assert {text for model, text in seen if model == base} == {base_text}
    assert len({text for model, text in seen if model == "lora2"}) == 1
    assert unload(url, "swap").status_code == 200


def test_unloaded_is_gone_and_the_name_is_free(url: str) -> None:
    assert load(url, "brief", "lora1").text == "Success: LoRA adapter 'brief' added successfully."
    assert "brief" in [card["id"] for card in httpx.get(url + "/v1/models").json()["data"]]
    assert text_of(ask(url, "brief")) == text_of(ask(url, "lora1"))
    assert unload(url, "brief").text == "Success: LoRA adapter 'brief' removed successfully."
    assert ask(url, "brief").status_code == 404
    assert unload(url, "brief").status_code == 404
    assert "brief" not in [card["id"] for card in httpx.get(url + "/v1/models").json()["data"]]


def test_unload_lets_the_running_stream_finish(url: str) -> None:
    assert load(url, "leaving", "lora0").status_code == 200
    body = {"model": "leaving", "prompt": QUESTION, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    whole = httpx.post(url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    with httpx.stream("POST", url + "/v1/completions", json={**body, "stream": True}, timeout=60) as stream:
        lines = stream.iter_lines()
        first = next(line for line in lines if line)
        replies: list[httpx.Response] = []
        unloading = threading.Thread(target=lambda: replies.append(unload(url, "leaving")))
        unloading.start()
        rest = [line for line in lines if line]
        unloading.join()
    assert rest[-1] == "data: [DONE]"
    pieces = [httpx.Response(200, text=line.removeprefix("data: ")).json() for line in [first, *rest[:-1]]]
    assert "".join(choice["text"] for piece in pieces for choice in piece["choices"]) == whole
    assert replies[0].status_code == 200
    assert ask(url, "leaving").status_code == 404


def test_bad_adapters_are_refused_and_disturb_nobody(url: str) -> None:
    before = text_of(ask(url, "lora0"))
    missing = load(url, "bad", "no-such-adapter")
    assert missing.status_code == 404
    assert load(url, "bad", "lora0/adapter_config.json").status_code == 404  # a file is no adapter
    outside = httpx.post(url + "/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": "/etc"}, timeout=60)
    assert outside.status_code in (400, 403)
    assert "--adapter-root" in outside.text
    base = httpx.get(url + "/v1/models").json()["data"][0]["id"]
    assert load(url, base, "lora0").status_code == 400
    assert ask(url, "bad").status_code == 404
    assert text_of(ask(url, "lora0")) == before
