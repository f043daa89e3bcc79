"""Simon Willison's `llm` command, with our models in its extra-openai-models.yaml."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.test_openai_python import CALL, ROME, City, Say
from tests.gateway.test_openai_routes import chat_prompt, expected

MODELS = """
- model_id: chat
  model_name: lora0
  api_base: {url}
  supports_schema: true
  supports_tools: true
- model_id: text
  model_name: lora0
  api_base: {url}
  completion: true
"""
Llm = Callable[..., str]


@pytest.fixture
def llm(url: str, tmp_path: Path, run_tool: Callable[..., str]) -> Llm:
    """Runs it; what it answered."""
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=url))
    return lambda *arguments: run_tool("llm", *arguments, LLM_USER_PATH=str(tmp_path)).removesuffix("\n")


def test_answers(llm: Llm) -> None:
    wanted = expected(chat_prompt("hi"), "x", 9)
    assert llm("-m", "chat", "hi", "-o", "max_tokens", "9") == wanted
    assert llm("-m", "chat", "hi", "-o", "max_tokens", "9", "--no-stream") == wanted


def test_talks_on(llm: Llm, say: Say) -> None:
    say("hello")
    assert llm("-m", "chat", "hi", "-s", "Be kind.") == "hello"
    say("")
    talk = [("system", "Be kind."), ("user", "hi"), ("assistant", "hello"), ("user", "and now?")]
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in talk) + "<|im_start|>assistant\n"
    assert llm("-c", "and now?", "-o", "max_tokens", "9") == expected(prompt, "x", 9)


def test_completions(llm: Llm) -> None:
    assert llm("-m", "text", "hi", "-o", "max_tokens", "5") == expected("hi", "x", 5)


def test_schemas(llm: Llm, say: Say) -> None:
    say(ROME)
    assert City.model_validate_json(llm("-m", "chat", "hi", "--schema", "name, population int")).population == 3


def test_tools(llm: Llm, say: Say, tmp_path: Path) -> None:
    say(CALL, then="It is big.")
    function = 'def City(name: str, population: int) -> str:\n    open("called", "w").write(name)\n    return "big"'
    assert llm("-m", "chat", "hi", "--functions", function).endswith("It is big.")
    assert (tmp_path / "called").read_text() == "Rome"


def test_an_endpoint_without_configuration(llm: Llm, url: str) -> None:
    assert llm("openai", "endpoint", url, "--models").split() == ["echo/base", "lora0"]
    assert llm("openai", "endpoint", url, "hi", "-m", "lora0", "-o", "max_tokens", "9") == expected(
        chat_prompt("hi"), "x", 9
    )
