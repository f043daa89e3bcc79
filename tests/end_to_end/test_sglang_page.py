"""Every request of SGLang's LoRA serving page, with local adapters, against our server.

https://docs.sglang.io/advanced_features/lora.html: single, several, dynamic, replaced, pinned, OpenAI's names.
"""

from typing import Any

import httpx

from tests.end_to_end.servers import ADAPTERS, QUESTION, serve

LORA0, LORA1, LORA2 = (str(ADAPTERS / f"lora{i}") for i in range(3))


def generate(url: str, *adapters: str | None) -> list[str]:
    """The page's request: the same question once for each adapter, None for the base model."""
    body = {
        "text": [QUESTION] * len(adapters),
        "sampling_params": {"max_new_tokens": 32, "temperature": 0},
        "lora_path": list(adapters),
    }
    response = httpx.post(url + "/generate", json=body, timeout=60)
    assert response.status_code == 200, response.text
    replies = response.json()
    assert [len(reply["output_ids"]) for reply in replies] == [r["meta_info"]["completion_tokens"] for r in replies]
    return [reply["text"] for reply in replies]


def post(url: str, route: str, **body: Any) -> httpx.Response:
    return httpx.post(url + route, json=body, timeout=60)


def test_single_adapter() -> None:
    with serve("--enable-lora", "--lora-paths", f"lora0={LORA0}", "--max-loras-per-batch", "1") as url:
        adapted, base = generate(url, "lora0", None)
        assert adapted != base
        assert [adapted, base] == [generate(url, "lora0")[0], generate(url, None)[0]]


def test_multiple_adapters() -> None:
    paths = ["--lora-paths", f"lora0={LORA0}", f"lora1={LORA1}"]
    with serve("--enable-lora", *paths, "--max-loras-per-batch", "2") as url:
        answers = generate(url, "lora0", "lora1")
        assert answers[0] != answers[1]
        assert answers == [generate(url, "lora0")[0], generate(url, "lora1")[0]]


def test_dynamic_loading_and_replacement() -> None:
    limits = ["--max-loras-per-batch", "2", "--max-lora-rank", "256", "--lora-target-modules", "all"]
    with serve("--enable-lora", "--cuda-graph-max-bs", "2", *limits, "--adapter-root", str(ADAPTERS)) as url:
        response = post(url, "/load_lora_adapter", lora_name="lora0", lora_path=LORA0)
        assert response.status_code == 200
        assert response.json()["success"] is True
        assert list(response.json()["loaded_adapters"]) == ["lora0"]
        assert post(url, "/load_lora_adapter", lora_name="lora1", lora_path=LORA1).json()["success"] is True
        before = generate(url, "lora0", "lora1")

        duplicate = post(url, "/load_lora_adapter", lora_name="lora0", lora_path=LORA1)
        assert duplicate.status_code == 400
        assert duplicate.json()["success"] is False
        assert "already loaded" in duplicate.json()["error_message"]

        response = post(url, "/unload_lora_adapter", lora_name="lora0")
        assert response.status_code == 200
        assert list(response.json()["loaded_adapters"]) == ["lora1"]
        refused = post(url, "/generate", text=QUESTION, lora_path="lora0")
        assert refused.status_code == 404
        assert post(url, "/load_lora_adapter", lora_name="lora0", lora_path=LORA2).json()["success"] is True
        after = generate(url, "lora0", "lora1")
        assert after[0] != before[0]
        assert after[1] == before[1]


def test_pinned_adapters() -> None:
    pinned = f'{{"lora_name": "lora0", "lora_path": "{LORA0}", "pinned": true}}'
    plain = f'{{"lora_name": "lora1", "lora_path": "{LORA1}"}}'
    paths = ["--lora-paths", pinned, plain, f"lora2={LORA2}"]
    limits = ["--max-loras-per-batch", "3", "--max-lora-rank", "256", "--lora-target-modules", "all"]
    with serve("--enable-lora", "--cuda-graph-max-bs", "8", *limits, *paths, "--adapter-root", str(ADAPTERS)) as url:
        before = generate(url, "lora0", "lora1", "lora2")
        assert post(url, "/unload_lora_adapter", lora_name="lora1").json()["success"] is True
        reload = post(url, "/load_lora_adapter", lora_name="lora1", lora_path=LORA1, pinned=True)
        assert reload.json()["success"] is True
        assert generate(url, "lora0", "lora1", "lora2") == before

        assert post(url, "/unload_lora_adapter", lora_name="lora2").json()["success"] is True
        third = post(url, "/load_lora_adapter", lora_name="lora2", lora_path=LORA2, pinned=True)
        assert third.status_code == 400
        assert "--max-loras-per-batch" in third.json()["error_message"]


def test_openai_names(demo_server: str) -> None:
    base = httpx.get(demo_server + "/v1/models").json()["data"][0]["id"]
    body = {"prompt": QUESTION, "max_tokens": 16, "temperature": 0}
    texts = {}
    for model in (base, "lora0", f"{base}:lora0", f"{base}:lora1"):
        response = post(demo_server, "/v1/completions", model=model, **body)
        assert response.json()["model"] == model
        texts[model] = response.json()["choices"][0]["text"]
    assert texts["lora0"] == texts[f"{base}:lora0"]
    assert len(set(texts.values())) == 3
