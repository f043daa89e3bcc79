"""`polylora chat`: a terminal client that streams answers, switches adapters and shows how fast they come."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = httpx.Timeout(10.0, read=600.0)
HELP = """\
/model NAME   talk to this model or adapter; /NAME does the same
/models       list the models and adapters
/clear        forget the conversation
/help         show this
/quit         leave (or Ctrl-D); Ctrl-C stops an answer
"""


class ChatError(Exception):
    """What went wrong, in one line for the user."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer; num_tokens comes once, at the end, if the server says it."""

    text: str = ""
    num_tokens: int | None = None


class ChatClient:
    """The two routes that the client needs."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def models(self) -> list[str]:
        """The ids of the base model and of all adapters, the base first."""
        try:
            response = self._http.get("/v1/models")
            _raise_for_error(response)
            return [str(card["id"]) for card in response.json()["data"]]
        except httpx.HTTPError as error:
            raise ChatError(_one_line(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError("the server's list of models cannot be read") from error

    def answer(self, body: dict[str, Any]) -> Iterator[Delta]:
        """Stream one answer. Raises ChatError, also in its middle."""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                _raise_for_error(response)
                yield from _deltas(response.iter_lines())
        except httpx.HTTPError as error:
            raise ChatError(_one_line(error)) from error


def _deltas(lines: Iterator[str]) -> Iterator[Delta]:
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:"):
            continue
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise ChatError("the server sent what is not JSON") from None
        if "error" in chunk:
            raise ChatError(_error_message(chunk))
        text = "".join(choice.get("delta", {}).get("content") or "" for choice in chunk.get("choices", []))
        usage = chunk.get("usage") or {}
        yield Delta(text, usage.get("completion_tokens"))
    raise ChatError("the server ended the answer early")


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_error:
        try:
            message = _error_message(response.json())
        except ValueError:
            message = response.reason_phrase
        raise ChatError(f"{response.status_code}: {message}")


def _error_message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return _printable(str(message or "the server gave no reason")).replace("\n", " ")


def _one_line(error: httpx.HTTPError) -> str:
    return _printable(f"{error}".strip() or type(error).__name__).splitlines()[0]


def _printable(text: str) -> str:
    """Without control characters: an answer must not steer the terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


class Chat:
    """One conversation in the terminal."""

    def __init__(self, client: ChatClient, options: argparse.Namespace, out: TextIO) -> None:
        self._client = client
        self._options = options
        self._out = out
        self._models = client.models()
        self.model: str = options.model or (self._models[0] if self._models else "")
        self.failed = False
        self._messages: list[dict[str, str]] = []
        self._clear()

    def run(self, lines: Iterator[str]) -> None:
        """Take line after line until /quit or the end."""
        self._say(f"Models: {', '.join(self._models)}. Talking to {self.model}. /help shows the commands.\n")
        for line in lines:
            line = line.strip()
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._ask(line)

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        try:
            match name, argument.strip():
                case "help", "":
                    self._say(HELP)
                case "clear", "":
                    self._clear()
                case "models", "":
                    self._models = self._client.models()
                    self._say("".join(f"{'*' if model == self.model else ' '} {model}\n" for model in self._models))
                case "model", model if model:
                    self._switch(model)
                case model, "":
                    self._switch(model)
                case _:
                    raise ChatError(f"no command /{name} {argument.strip()}; /help shows the commands")
        except ChatError as error:
            self._fail(error)

    def _switch(self, model: str) -> None:
        if model not in self._models:
            self._models = self._client.models()  # it may have been loaded meanwhile
        base = model.rpartition(":")[2]
        if model not in self._models and base not in self._models:
            raise ChatError(f"no model or command {_printable(model)}; there are {', '.join(self._models)}")
        self.model = model
        self._say(f"Talking to {model}.\n")

    def _clear(self) -> None:
        system = self._options.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def _ask(self, question: str) -> None:
        messages = [*self._messages, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "max_tokens": self._options.max_tokens}
        if self._options.temperature is not None:
            body["temperature"] = self._options.temperature
        text, num_tokens, started, first, last = "", None, time.monotonic(), 0.0, 0.0
        try:
            with suppress(KeyboardInterrupt):
                for delta in self._client.answer(body):
                    if delta.text:
                        last = time.monotonic()
                        first = first or last
                        self._say(_printable(delta.text))
                        text += delta.text
                    num_tokens = delta.num_tokens or num_tokens
            if text:
                self._messages = [*messages, {"role": "assistant", "content": text}]
            self._say(f"\n{_speed(num_tokens, first - started, last - first)}\n")
        except ChatError as error:
            if text:
                self._say("\n")
            self._fail(error)

    def _fail(self, error: ChatError) -> None:
        self.failed = True
        self._say(f"error: {error}\n")

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _speed(num_tokens: int | None, first_s: float, rest_s: float) -> str:
    """[41 tokens, 37.2 tokens/s, first after 0.11 s]: the speed is that of the tokens after the first."""
    if first_s <= 0:
        return "[no text]"
    parts = [f"first after {first_s:.2f} s"]
    if num_tokens is not None:
        speed = [f"{(num_tokens - 1) / rest_s:.1f} tokens/s"] if num_tokens > 1 and rest_s > 0 else []
        parts = [f"{num_tokens} tokens", *speed, *parts]
    return f"[{', '.join(parts)}]"


def _typed_lines(chat: Chat) -> Iterator[str]:
    """Lines typed at a prompt that shows the model; Ctrl-C at the prompt leaves."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines and keeps a history when it is loaded
    while True:
        try:
            yield input(f"{chat.model}> ")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="polylora chat", description="Talk to a server in the terminal.")
    parser.add_argument("--url", default=DEFAULT_URL, help="the server (default: %(default)s)")
    parser.add_argument("--model", help="model or adapter to talk to first (default: the base model)")
    parser.add_argument(
        "--api-key", default=os.environ.get("POLYLORA_API_KEY"), help="the server's key (default: $POLYLORA_API_KEY)"
    )
    parser.add_argument("--system", default="", help="system message (default: the model's own)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the server's)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer, tokens (default: %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    """Run the client; lines come from the terminal or, without one, from standard input."""
    options = _parser().parse_args(argv)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    url = options.url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT) as http:
            chat = Chat(ChatClient(http), options, sys.stdout)
            chat.run(_typed_lines(chat) if sys.stdin.isatty() else iter(sys.stdin))
    except (ChatError, httpx.InvalidURL) as error:
        sys.stderr.write(f"polylora chat: {url}: {error}\n")
        return 1
    return 1 if chat.failed and not sys.stdin.isatty() else 0
