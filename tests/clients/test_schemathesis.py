"""schemathesis, which makes requests out of /openapi.json: no answer is a 5xx, and each is as the document says."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.gateway.test_openai_routes import HI, chat_prompt, expected
from tests.processes import EchoProcess, GatewayProcess, running

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
EXAMPLES = "30"  # of each route


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server of its own: its adapters are unloaded here."""
    with (
        running(EchoProcess(tmp_path, "--tools", "--lora-paths", "lora0=x")) as echo,
        running(GatewayProcess(tmp_path / "log", "--worker-endpoint", echo.endpoint)) as gateway,
    ):
        yield f"http://127.0.0.1:{gateway.port}/v1"


def test_requests_made_from_the_document(url: str, tmp_path: Path) -> None:
    texts, is_over = [], threading.Event()

    def stream() -> None:
        with OpenAI(base_url=url, api_key="none") as client:
            while not is_over.is_set():
                chunks = client.chat.completions.create(model="echo/base", messages=HI, max_tokens=40, stream=True)
                texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))

    beside = threading.Thread(target=stream)
    beside.start()
    try:
        command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url.removesuffix('/v1')}/openapi.json"]
        options = ["--checks", CHECKS, "--max-examples", EXAMPLES, "--phases", "fuzzing", "--seed", "1"]
        run = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    finally:
        is_over.set()
        beside.join()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert set(texts) == {expected(chat_prompt("hi"), "", 40)}
