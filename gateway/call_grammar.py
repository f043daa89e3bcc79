"""What answers with tool calls look like, family by family, as a grammar that they are held to (llguidance's Lark)."""

from typing import Any

import msgspec

from gateway.tokenizer import Tokenizer
from gateway.tool_parsers import ToolFormat

# As templates write calls in a history: what the model has seen most.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_FREE_SPACING = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,40}"}
_ANY_TEXT = "/(.|\\n)*/"
_TEXT_THAT_IS_NO_OBJECT = "/(\\s*[^{\\s](.|\\n)*)?/"


def call_grammar(
    form: ToolFormat,
    functions: list[tuple[str, dict[str, Any]]],
    parallel: bool,
    tokenizer: Tokenizer,
    *,
    or_text: bool = False,
    or_json: str | None = None,
) -> str:
    """Calls of these functions, by name with the schemas of their arguments.

    or_text: before them, or instead, the answer may be any text. or_json: it may be JSON of this schema instead; calls
    must begin in another way.
    """
    key = "parameters" if form.starts_bare else "arguments"
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, (name, schema) in enumerate(functions):
        head = _quoted(f'{{"name": "{name}", "{key}": ')
        # A document of its own each, so that references within it hold.
        document = msgspec.json.encode({**schema, "x-guidance": _SPACING}).decode()
        rules += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: %json {document}"]
    if or_json is not None:
        document = msgspec.json.encode({**msgspec.json.decode(or_json), "x-guidance": _FREE_SPACING}).decode()
        rules.append(f"answer: %json {document}")
    special = tokenizer.token_id(form.begin) if tokenizer.has_special(form.begin) else None
    mark = _quoted(form.begin) if special is None else f"<[{special}]>"
    if or_text:
        rules += _among_text(form, mark, special is not None, parallel)
    else:
        rules.append(f"start: {_calls(form, mark, parallel)}" + (" | answer" if or_json is not None else ""))
    return "\n".join(rules)


def _calls(form: ToolFormat, mark: str, parallel: bool) -> str:
    """One call or several, and nothing else."""
    one = f"{mark} {_block(form)}" if form.end else "call"
    between = _quoted("\n" if form.end else f"{form.separator} ")
    several = f"{one} ({between} {one})*" if parallel else one
    return f'{mark} "[" {several} "]"' if form.may_list else several


def _block(form: ToolFormat) -> str:
    """What follows a mark that begins every call."""
    return f'"\\n" call {_quoted(chr(10) + form.end)}'


def _among_text(form: ToolFormat, mark: str, is_token: bool, parallel: bool) -> list[str]:
    """Text that a call ends: it is free up to the mark, which nothing but a call may follow."""
    if form.starts_bare:
        return [f"start: OTHER | {_calls(form, mark, parallel)}", f"OTHER: {_TEXT_THAT_IS_NO_OBJECT}"]
    body = _calls(form, "", parallel) if form.may_list else _block(form)
    rules = [f"TEXT: {_ANY_TEXT}", f"start: called{'*' if parallel and not form.may_list else '?'} rest", "rest: TEXT"]
    if is_token:
        return [*rules, f"called: TEXT {mark} {body}"]
    return [*rules, f"begun[lazy]: TEXT {mark}", f"called: begun {body}"]


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()
