"""The terminal client against a server of a few lines: streams, switches, and says errors in one line."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from gateway import chat

Handler = Callable[[dict[str, Any]], httpx.Response]


def events(*chunks: Any) -> httpx.Response:
    lines = [f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks]
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text="".join(lines))


def content(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def usage(num_tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": num_tokens, "total_tokens": 9}}


def echo(body: dict[str, Any]) -> httpx.Response:
    question = body["messages"][-1]["content"]
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    return events(role, content(f"{body['model']} says "), content(question.upper()), usage(7), "[DONE]")


class Server:
    """Answers /v1/models and hands chat bodies to a handler."""

    def __init__(self, handler: Handler) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["base", "lora0", "lora1"]
        self._handler = handler

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.keys.append(request.headers.get("authorization"))
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": [{"id": model} for model in self.models]})
        assert request.url.path == "/v1/chat/completions"
        self.bodies.append(json.loads(request.content))
        return self._handler(self.bodies[-1])


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs the client on lines of input against a server; gives its exit code and what it wrote."""
    plain = httpx.Client

    def run(server: Callable[[httpx.Request], httpx.Response], lines: str, *argv: str) -> tuple[int, str]:
        monkeypatch.setattr(httpx, "Client", lambda **options: plain(transport=httpx.MockTransport(server), **options))
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = chat.main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    yield run


def test_answers_stream_and_show_their_speed(run: Callable[..., tuple[int, str]]) -> None:
    server = Server(echo)
    code, output = run(server, "hello\n\n", "--api-key", "secret", "--url", "http://host:1/v1/")
    assert code == 0
    assert "Models: base, lora0, lora1. Talking to base." in output
    assert "base says HELLO\n[7 tokens, " in output and "tokens/s, first after 0." in output
    assert server.bodies == [
        {
            "model": "base",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 256,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert set(server.keys) == {"Bearer secret"}


def test_the_adapter_can_change_in_the_middle_of_a_conversation(run: Callable[..., tuple[int, str]]) -> None:
    server = Server(echo)
    script = "one\n/model lora0\ntwo\n/lora1\nthree\n/base:lora0\nfour\n/clear\nfive\n/quit\nsix\n"
    code, output = run(server, script, "--system", "be brief", "--temperature", "0", "--max-tokens", "9")
    assert code == 0 and "lora0 says TWO" in output and "lora1 says THREE" in output and "SIX" not in output
    assert [body["model"] for body in server.bodies] == ["base", "lora0", "lora1", "base:lora0", "base:lora0"]
    assert [message["content"] for message in server.bodies[2]["messages"]] == [
        "be brief",
        "one",
        "base says ONE",
        "two",
        "lora0 says TWO",
        "three",
    ]
    assert [message["role"] for message in server.bodies[4]["messages"]] == ["system", "user"]
    assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["max_tokens"] == 9


def test_models_are_listed_and_new_ones_found(run: Callable[..., tuple[int, str]]) -> None:
    server = Server(echo)

    def later(request: httpx.Request) -> httpx.Response:
        response = server(request)
        server.models = ["base", "lora0", "lora1", "fresh"]
        return response

    code, output = run(later, "/models\n/fresh\n/help\n", "--model", "lora0")
    assert code == 0 and "* lora0\n" in output and "  fresh\n" in output and "Talking to fresh." in output
    assert "/clear" in output


@pytest.mark.parametrize("line", ["/nothing", "/model nothing", "/clear everything", "/model"])
def test_a_wrong_command_is_said_and_nothing_is_lost(line: str, run: Callable[..., tuple[int, str]]) -> None:
    server = Server(echo)
    code, output = run(server, f"one\n{line}\ntwo\n")
    assert code == 1 and output.count("error: ") == 1 and "TWO" in output
    assert len(server.bodies[1]["messages"]) == 3


FAILURES: dict[str, tuple[Handler, str]] = {
    "refused": (
        lambda body: httpx.Response(404, json={"error": {"message": "The model `x`\ndoes not exist", "code": "y"}}),
        "error: 404: The model `x` does not exist\n",
    ),
    "no JSON": (lambda body: httpx.Response(502, text="<html>"), "error: 502: Bad Gateway\n"),
    "in the middle": (
        lambda body: events(content("half"), {"error": {"message": "the worker was lost"}}),
        "half\nerror: the worker was lost\n",
    ),
    "cut": (lambda body: events(content("half")), "half\nerror: the server ended the answer early\n"),
    "garbage": (lambda body: events("{"), "error: the server sent what is not JSON\n"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_answer_is_one_line_and_is_forgotten(failure: str, run: Callable[..., tuple[int, str]]) -> None:
    handler, line = FAILURES[failure]
    answers = iter([handler, echo])
    server = Server(lambda body: next(answers)(body))
    code, output = run(server, "one\ntwo\n")
    assert code == 1 and line in output and "base says TWO" in output
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "two"}]


def test_a_server_that_is_not_there_is_one_line(run: Callable[..., tuple[int, str]]) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    code, output = run(refuse, "one\n", "--url", "http://127.0.0.1:9")
    assert code == 1 and output == "polylora chat: http://127.0.0.1:9: Connection refused\n"


def test_an_answer_cannot_steer_the_terminal(run: Callable[..., tuple[int, str]]) -> None:
    code, output = run(Server(lambda body: events(content("a\x1b[2Jb\tc\n"), usage(1), "[DONE]")), "one\n")
    assert code == 0 and "a[2Jb\tc\n\n[1 tokens, first after" in output


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(SystemExit):
        chat.main(["--nonsense"])
