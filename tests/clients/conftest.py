"""A gateway over HTTP before an echo worker, for the clients that applications use. `make test-clients` installs them.

Where they are not installed, nothing here is collected.
"""

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from gateway.tokenizer import Tokenizer
from tests import tiny_model
from tests.processes import EchoProcess, GatewayProcess, running

CLIENTS = ("instructor", "langchain_openai", "litellm", "openai", "schemathesis")
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
def say(echo: EchoProcess) -> Iterator[Callable[[str], None]]:
    """Has the model answer everything with a text."""
    tokenizer = Tokenizer(tiny_model.tokenizer_json())
    yield lambda text: echo.do("say", tokens=tokenizer.encode(text, False)) and None
    echo.do("say", tokens=[])
