"""Grammars: what they allow, token by token; that bad ones are refused with a reason, and dangerous ones end alone."""

import contextlib
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.tokenizer import Tokenizer
from protocol.sampling import Grammar
from tests import tiny_model
from tests.json_schemas import schemas
from worker.grammar import GrammarCompiler, GrammarError, Matcher, load_tokenizer, new_matcher

EOS = 2
TOKENIZER = Tokenizer(tiny_model.tokenizer_json())


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarCompiler]:
    path = tmp_path_factory.mktemp("model") / "tokenizer.json"
    path.write_bytes(tiny_model.tokenizer_json())
    compiler = GrammarCompiler(path, tiny_model.VOCAB_SIZE, (EOS,))
    yield compiler
    compiler.close()


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def allowed(matcher: Matcher) -> list[int]:
    mask = matcher.mask()
    return [token for token in range(tiny_model.VOCAB_SIZE) if mask[token // 8] >> token % 8 & 1]


def walk(matcher: Matcher, seed: int, num_tokens: int = 400) -> str | None:
    """A random answer, if it came to its end."""
    rng, ids = random.Random(seed), []
    for _ in range(num_tokens):
        choices = allowed(matcher)
        token = EOS if EOS in choices else rng.choice(choices)
        matcher.accept(token)
        if token == EOS:
            return TOKENIZER.decode(ids)
        ids.append(token)
    return None


def accepts(matcher: Matcher, text: str) -> bool:
    try:
        for token in TOKENIZER.encode(text, False):
            matcher.accept(token)
        return EOS in allowed(matcher)
    except GrammarError:
        return False


@pytest.mark.parametrize(("value", "instance"), schemas(20), ids=str)
def test_schemas_allow_what_fits_them(compiler: GrammarCompiler, value: dict[str, Any], instance: Any) -> None:
    grammar = schema(value)
    assert accepts(compiler.compile(grammar), json.dumps(instance))
    assert accepts(compiler.compile(grammar), json.dumps(instance, indent=2))
    assert not accepts(compiler.compile(grammar), json.dumps([instance]))
    assert not accepts(compiler.compile(grammar), json.dumps(instance)[:-1])


def test_any_walk_along_the_masks_fits(compiler: GrammarCompiler) -> None:
    choice = {"enum": ["red", "green"]}
    grammar = schema(
        {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 3, "maximum": 17},
                "b": choice,
                "c": {"type": "boolean"},
            },
            "required": ["a", "b", "c"],
            "additionalProperties": False,
        }
    )
    for seed in range(10):
        text = walk(compiler.compile(grammar), seed)
        assert text is not None
        value = json.loads(text)
        assert 3 <= value["a"] <= 17 and value["b"] in choice["enum"] and value["c"] in (True, False)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("regex", "[a-c]{2,3}x"), "abx", "ax"),
        (Grammar("grammar", 'start: "yes" | "no \\"q\\""'), 'no "q"', "no"),
        (Grammar("grammar", 'root ::= "a" | "b" root'), "bba", "bb"),
        (schema({"type": "object"}), '{"any": ["thing", {"é": null}]}', "[]"),
    ],
    ids=str,
)
def test_the_other_kinds(compiler: GrammarCompiler, grammar: Grammar, good: str, bad: str) -> None:
    assert accepts(compiler.compile(grammar), good)
    assert not accepts(compiler.compile(grammar), bad)


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"type": "nonsense"}),
        schema({"type": "string", "enum": [1]}),
        schema({"type": "array", "uniqueItems": True}),
        schema({"$ref": "#"}),
        schema({"$ref": "http://example.com/schema.json"}),
        Grammar("json_schema", "{"),
        Grammar("json_schema", "5"),
        Grammar("regex", "(?=a)b"),
        Grammar("regex", "("),
        Grammar("grammar", "nonsense"),
        Grammar("grammar", "start: missing"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_with_a_reason(compiler: GrammarCompiler, grammar: Grammar) -> None:
    for _ in range(2):  # the second answer is remembered
        with pytest.raises(GrammarError) as caught:
            compiler.compile(grammar)
        assert 5 < len(str(caught.value)) <= 200
        assert "\n" not in str(caught.value) and "/work" not in str(caught.value)


def test_a_vocabulary_that_cannot_write_it(tmp_path: Path) -> None:
    """Nothing may be masked away altogether: what is chosen then would be no token."""
    spec = json.loads(tiny_model.tokenizer_json())
    del spec["model"]["vocab"]["!"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(GrammarError):
        new_matcher(load_tokenizer(path, tiny_model.VOCAB_SIZE, (EOS,)), Grammar("regex", "!")).mask()


def test_copies_go_their_own_ways(compiler: GrammarCompiler) -> None:
    first = compiler.compile(Grammar("regex", "ab|ba"))
    first.accept(TOKENIZER.encode("a", False)[0])
    second = first.copy()
    assert accepts(second, "b")
    assert accepts(first, "b")
    assert accepts(compiler.compile(Grammar("regex", "ab|ba")), "ba")


def test_a_process_that_was_killed_comes_again(compiler: GrammarCompiler) -> None:
    compiler.compile(Grammar("regex", "first"))
    assert compiler._process is not None
    compiler._process.kill()
    compiler._process.wait()
    assert accepts(compiler.compile(Grammar("regex", "second")), "second")


def test_a_process_that_does_not_answer_is_ended(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.compile(Grammar("regex", "third"))
    assert compiler._process is not None
    os.kill(compiler._process.pid, signal.SIGSTOP)
    monkeypatch.setattr("worker.grammar._ANSWER_S", 0.2)
    with pytest.raises(GrammarError, match="too much time"):
        compiler.compile(Grammar("regex", "fourth"))
    monkeypatch.undo()
    assert accepts(compiler.compile(Grammar("regex", "fifth")), "fifth")


def test_the_cache_is_bounded(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.grammar._MAX_CACHED", 3)
    for i in range(10):
        compiler.compile(Grammar("regex", f"x{i}"))
    assert len(compiler._cache) == 3
    assert compiler._num_chars == sum(len(grammar.source) for grammar in compiler._cache)


@pytest.mark.parametrize("pattern", [".*a.{400}", "(a|aa)*b{1000}", "(((a{1,100}){1,100}){1,100}){1,100}", "(x+x+)+y"])
def test_patterns_that_make_others_hang(compiler: GrammarCompiler, pattern: str) -> None:
    """Either an answer or a refusal, and the next grammar is served."""
    with contextlib.suppress(GrammarError):
        assert allowed(compiler.compile(Grammar("regex", pattern)))
    assert accepts(compiler.compile(Grammar("regex", "next")), "next")
