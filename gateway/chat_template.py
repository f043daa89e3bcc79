"""ChatTemplate: messages to prompt text by the model's own Jinja template, in a sandbox.

The template comes with the base model, never from a request or an adapter. Render off the event loop.
"""

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.reasoning import END
from gateway.tool_parsers import format_of

logger = logging.getLogger(__name__)

_MAX_REASON = 200  # characters of a template's own complaint that a client sees


class ChatTemplateError(Exception):
    """The messages cannot be rendered; the text is for the user."""


class _Refusal(TemplateError):
    """Raised by a template's raise_exception."""


class _GenerationTag(Extension):
    """Templates mark the assistant's text with {% generation %} for training; to us it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """The tojson that templates are written for: without HTML escapes."""
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)


class ChatTemplate:
    """One template with the model's special tokens. Raises ChatTemplateError if it cannot be parsed."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._source = source
        self.tool_format = format_of(
            source
        )  # None: the template has no place for tools, or calls in a format unknown here
        self.thinks = END in source
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template cannot be read: {error}") from None
        self._special_tokens = dict(special_tokens)

    def mentions(self, word: str) -> bool:
        """True if the template's text has this word: what it does not name, it cannot use."""
        return word in self._source

    @property
    def knows_developer(self) -> bool:
        """True if the template has a place for the developer role."""
        return self.mentions("developer")

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        max_chars: int,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt. With continue_final_message it ends with the last message's content, for the model to go on.

        Raises ChatTemplateError if the template refuses the messages or the prompt is over max_chars.
        """
        context = {
            **self._special_tokens,
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(context):
                num_chars += len(piece)
                if num_chars > max_chars:
                    raise ChatTemplateError(f"the rendered prompt is over {max_chars} characters")
                pieces.append(piece)
        except _Refusal as error:
            raise ChatTemplateError(f"the model's chat template says: {str(error)[:_MAX_REASON]}") from None
        except ChatTemplateError:
            raise
        except Exception:  # a template is a program: whatever it does, only this request fails
            logger.info("the chat template failed", exc_info=True)
            raise ChatTemplateError("the model's chat template cannot render these messages") from None
        prompt = "".join(pieces)
        return _cut_after_final(prompt, messages[-1]) if continue_final_message else prompt


def _cut_after_final(prompt: str, message: dict[str, Any]) -> str:
    """The prompt up to the end of the last message's content."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ChatTemplateError("continue_final_message needs a last message with text")
    start = prompt.rfind(content)
    if start >= 0:
        return prompt[: start + len(content)]
    start = prompt.rfind(content.strip())  # templates commonly strip what they render
    if start < 0:
        raise ChatTemplateError("the model's chat template does not show the last message: it cannot be continued")
    return prompt[: start + len(content.strip())]
