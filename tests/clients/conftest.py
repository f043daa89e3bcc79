"""A gateway over HTTP before an echo worker, for the clients that applications use. `make test-clients` installs them.

Where they are not installed, nothing here is collected.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.tokenizer import Tokenizer
from tests import tiny_model
from tests.processes import EchoProcess, GatewayProcess, running

CLIENTS = ("instructor", "langchain_openai", "litellm", "llama_index", "openai")
TOOLS = Path(sys.prefix) / "tools" / "bin"  # clients that are commands, in an environment of their own
collect_ignore_glob = [] if all(importlib.util.find_spec(name) for name in CLIENTS) else ["test_*.py"]


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoProcess]:
    directory = tmp_path_factory.mktemp("echo")
    with running(EchoProcess(directory, "--tools", "--lora-paths", "lora0=x")) as process:
        yield process


@pytest.fixture(scope="session")
def url(echo: EchoProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("gateway") / "log"
    with running(GatewayProcess(log, "--worker-endpoint", echo.endpoint)) as process:
        yield f"http://127.0.0.1:{process.port}/v1"


@pytest.fixture
def say(echo: EchoProcess) -> Iterator[Callable[..., None]]:
    """Has the model answer everything with a text; or the next request with it, and then everything with another."""
    tokenizer = Tokenizer(tiny_model.tokenizer_json())

    def say(text: str, then: str = "") -> None:
        echo.do("say", tokens=tokenizer.encode(text, False), then=tokenizer.encode(then, False))

    yield say
    echo.do("say", tokens=[])


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's tokenizer as files, for the clients that count tokens themselves."""
    directory = tmp_path_factory.mktemp("tokenizer")
    for name, data in tiny_model.files(tiny_model.TOOL_TEMPLATE).items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def run_tool(tmp_path: Path) -> Callable[..., str]:
    """Runs one of the commands to its end in an empty directory, with no key and no hub; what it printed."""

    def run_tool(name: str, *arguments: str, **environment: str) -> str:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "HF_", "PYTHON"))}
        env |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), **environment}
        command = [str(TOOLS / name), *arguments]
        run = subprocess.run(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
        assert run.returncode == 0, f"{run.stdout.decode()}\n{run.stderr.decode()}"
        return run.stdout.decode()

    return run_tool
