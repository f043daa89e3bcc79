"""Tool calls and thoughts in answers' texts: what is found, and that it does not depend on how the text arrives."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.message import MessageParser, Piece
from gateway.reasoning import Reasoning, ReasoningSplitter
from gateway.tool_parsers import HERMES, LLAMA, MISTRAL, CallArguments, CallStart, Text, ToolCallParser, ToolFormat

NAMES = ["f", "get_weather", "x.y-z"]
CITY = '{"city": "Paris", "n": [1, {"}": "]\\""}]}'


def parser(
    form: ToolFormat | None, *, parallel: bool = True, thinks: bool = False, is_open: bool = False
) -> MessageParser:
    calls = ToolCallParser(form, NAMES, parallel) if form else None
    return MessageParser(ReasoningSplitter(is_open) if thinks else None, calls)


def summary(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """Thoughts, content, calls."""
    thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    content = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            calls.append((piece.name, ""))
        elif isinstance(piece, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return thoughts, content, calls


def parse(form: ToolFormat | None, pieces: list[str], **options: Any) -> tuple[str, str, list[tuple[str, str]]]:
    mine = parser(form, **options)
    found = [piece for text in pieces for piece in mine.add(text)]
    return summary(found + mine.finish())


CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "no call here", "no call here", []),
    (HERMES, 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "Let me see.", [("f", "{}")]),
    (
        HERMES,
        f'<tool_call>{{"name": "f", "arguments": {CITY}}}</tool_call>\n'
        '<tool_call>{"arguments": {"a":1}, "name": "f"}',
        "",
        [("f", CITY), ("f", '{"a":1}')],
    ),
    (HERMES, '<tool_call>{"name": "f"}</tool_call> done', "done", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (
        HERMES,
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        [],
    ),
    (HERMES, "a <tool_call> b </tool_call> c", "a <tool_call> b </tool_call> c", []),
    (HERMES, "a < b <tool <tool_call", "a < b <tool <tool_call", []),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "cut of', "", [("f", '{"a": "cut of')]),
    (HERMES, '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    (HERMES, '<tool_call>[{"name": "f", "arguments": {}}]', '<tool_call>[{"name": "f", "arguments": {}}]', []),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        LLAMA,
        ' {"name": "f", "parameters": {}}; {"name": "f", "parameters": {"b": 2}}',
        "",
        [("f", "{}"), ("f", '{"b": 2}')],
    ),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    (LLAMA, '{"answer": {"name": "f"}} and more', '{"answer": {"name": "f"}} and more', []),
    (LLAMA, 'Call {"name": "f", "parameters": {}}', 'Call {"name": "f", "parameters": {}}', []),
    (LLAMA, '<|python_tag|>brave_search.call(query="x")', '<|python_tag|>brave_search.call(query="x")', []),
    (LLAMA, '{"name": "f", "parameters": {}} then text', "then text", [("f", "{}")]),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "x.y-z", "arguments": {}}]',
        "",
        [("f", '{"a": 1}'), ("x.y-z", "{}")],
    ),
    (
        MISTRAL,
        f"Well [TOOL_CALLS]get_weather[ARGS]{CITY}[TOOL_CALLS]f{{}}",
        "Well",
        [("get_weather", CITY), ("f", "{}")],
    ),
    (MISTRAL, '[TOOL_CALLS]f[CALL_ID]abc123DEF[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
    (MISTRAL, "[TOOL_CALLS]get weather {}", "[TOOL_CALLS]get weather {}", []),
    (MISTRAL, "[TOOL_CALLS] [1, 2]", "[TOOL_CALLS] [1, 2]", []),
    (MISTRAL, "[TOOL_CALLS]", "[TOOL_CALLS]", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES, ids=[case[1][:40] for case in CASES])
def test_what_is_found(form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(form, [text]) == ("", content, calls)
    assert parse(form, list(text)) == ("", content, calls), "character by character"


def test_arguments_stream() -> None:
    mine = parser(HERMES)
    assert mine.add('<tool_call>{"name": "f", "arguments": ') == []
    assert mine.add('{"a": "lo') == [CallStart("f"), CallArguments('{"a": "lo')]
    assert mine.add('ng"') == [CallArguments('ng"')]
    assert mine.add("}}</tool_call>") == [CallArguments("}")]
    assert mine.finish() == []


@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL])
def test_only_the_first_call_unless_parallel(form: ToolFormat) -> None:
    call = '{"name": "f", "arguments": {}}'
    texts = {
        HERMES: f"<tool_call>{call}</tool_call><tool_call>{call}</tool_call>",
        LLAMA: f"{call};{call}",
        MISTRAL: f"[TOOL_CALLS][{call}, {call}]",
    }
    assert parse(form, [texts[form]], parallel=False) == ("", "", [("f", "{}")])
    assert parse(form, list(texts[form]), parallel=False) == ("", "", [("f", "{}")])
    assert len(parse(form, [texts[form]])[2]) == 2


THOUGHTS = [
    ("<think>\nhm\n</think>\n\nyes", False, "hm", "yes"),
    ("hm </think>yes", True, "hm ", "yes"),
    ("<think>never ends\n", False, "never ends\n", ""),
    ("\n<think></think>yes", False, "", "yes"),
    ("no <think>thoughts</think>", False, "", "no <think>thoughts</think>"),
    ("<thin", False, "", "<thin"),
    ("a </thi b</think> c</think>", True, "a </thi b", "c</think>"),
]


@pytest.mark.parametrize(("text", "is_open", "thoughts", "content"), THOUGHTS, ids=[case[0] for case in THOUGHTS])
def test_thoughts(text: str, is_open: bool, thoughts: str, content: str) -> None:
    for pieces in ([text], list(text)):
        assert parse(None, pieces, thinks=True, is_open=is_open) == (thoughts, content, [])


def test_a_call_behind_thoughts() -> None:
    text = '<think>f?</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse(HERMES, list(text), thinks=True) == ("f?", "", [("f", "{}")])


SNIPPETS = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<think>",
        "</think>",
        "[",
        "]",
        ";",
        ",",
    ]
    + [
        '{"name": "f", "arguments": ',
        '{"name": "f", "parameters": ',
        '{"name": "g", "arguments": {}}',
        "f",
        "f{",
        " ",
        "\n",
    ]
    + ['{"a": "b', '"}', "}", "}}", '{"arguments": {"x": []}, "name": "f"}', '{"name": "f"}', "text", "\\", '"', "{"]
)


@given(
    st.lists(SNIPPETS, max_size=12).map("".join),
    st.lists(st.integers(1, 8), min_size=40, max_size=40),
    st.sampled_from([HERMES, LLAMA, MISTRAL]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=1000, deadline=None)
def test_the_cut_does_not_matter(text: str, lengths: list[int], form: ToolFormat, parallel: bool, thinks: bool) -> None:
    pieces, at = [], 0
    for length in lengths:
        pieces.append(text[at : at + length])
        at += length
    pieces.append(text[at:])
    options: dict[str, Any] = {"parallel": parallel, "thinks": thinks, "is_open": thinks and not parallel}
    assert parse(form, pieces, **options) == parse(form, [text], **options)


@given(st.text(), st.sampled_from([HERMES, LLAMA, MISTRAL]))
def test_text_without_marks_is_untouched(text: str, form: ToolFormat) -> None:
    assert parse(form, list(text)) == ("", text, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(), JSON, max_size=3)), min_size=1, max_size=3)
)
@settings(max_examples=100, deadline=None)
def test_any_arguments_survive(calls: list[tuple[str, dict[str, Any]]]) -> None:
    bodies = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    texts = {
        HERMES: "".join(f"<tool_call>\n{body}\n</tool_call>\n" for body in bodies),
        LLAMA: "; ".join(bodies),
        MISTRAL: f"[TOOL_CALLS] [{', '.join(bodies)}]",
    }
    for form, text in texts.items():
        _, content, found = parse(form, list(text))
        assert (content, [(name, json.loads(arguments)) for name, arguments in found]) == ("", calls)


def test_a_call_that_never_comes_is_text() -> None:
    """However long: the parser must not read it again and again."""
    for start in ("<tool_call>{", '{"a": "', "[TOOL_CALLS]["):
        for form in (HERMES, LLAMA, MISTRAL):
            pieces = [start, *["x" * 20] * 5000]
            assert parse(form, pieces) == ("", "".join(pieces), [])
