"""The engine with a tiny model on the CPU: answers held to grammars, among others that are not; prompts scored."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from gateway.tokenizer import Tokenizer
from protocol.errors import ErrorCode
from protocol.messages import FinishReason, Output
from protocol.sampling import Grammar
from tests import tiny_model
from tests.tiny_models import write_tiny_model
from tests.worker.fakes import MODEL, OWNER, Harness, generate
from worker.engine import Engine
from worker.grammar import GrammarCompiler
from worker.grammar_service import GrammarService
from worker.kv_cache import KVCache
from worker.mailbox import Cancel, CancelAll, Start
from worker.model_runner import ModelRunner
from worker.weights import load_model

EOS = 2
CPU = torch.device("cpu")
TOKENIZER = Tokenizer(tiny_model.tokenizer_json())
CARD = msgspec.structs.replace(
    MODEL, vocab_size=tiny_model.VOCAB_SIZE, eos_token_ids=[EOS], grammars=True, prompt_logprobs=True
)
PROPERTIES = {"a": {"type": "integer", "minimum": 3, "maximum": 120}, "b": {"enum": ["red", "green"]}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["a", "b"], "additionalProperties": False}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
WORD = Grammar("regex", "[a-c]{4,6}!")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = tiny_model.VOCAB_SIZE
    directory = write_tiny_model(tmp_path_factory.mktemp("model"), "llama3", vocab_size=size, eos_token_id=EOS)
    (directory / "tokenizer.json").write_bytes(tiny_model.tokenizer_json())
    return directory


@pytest.fixture(scope="module")
def compiler(model_dir: Path) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(model_dir / "tokenizer.json", tiny_model.VOCAB_SIZE, (EOS,))
    yield compiler
    compiler.close()


def worker(model_dir: Path, compiler: GrammarCompiler, *, runs_ahead: bool, num_blocks: int = 256) -> Harness:
    """The fakes' harness with an engine that has a real model."""
    harness = Harness(num_blocks=num_blocks, max_running=8)
    model, config = load_model(model_dir, torch.float32, CPU)
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    harness.engine = Engine(
        CARD,
        ModelRunner(model, config, KVCache(num_blocks, 4, *shape, torch.float32, CPU)),
        harness.scheduler,
        harness.blocks,
        harness.adapters,
        harness.inbox,
        harness.outbox,
        harness.mail.extend,
        max_loras_per_batch=2,
        runs_ahead=runs_ahead,
        grammars=GrammarService(compiler.compile, harness.jobs),  # type: ignore[arg-type]
        clock=lambda: harness.now,
    )
    return harness


def run(harness: Harness, commands: dict[int, dict[str, object]]) -> dict[int, tuple[str, Output]]:
    """Each answer's text, and its last output."""
    for request_id, fields in commands.items():
        options = {"max_tokens": 60, "temperature": 0.0, **fields}
        harness.put(Start(OWNER, generate(request_id, [5, 6, 7 + request_id], **options)))  # type: ignore[arg-type]
    harness.drain()
    found = {}
    for request_id in commands:
        tokens = [token for token in harness.tokens(request_id) if token != EOS]
        found[request_id] = TOKENIZER.decode(tokens), harness.outputs(request_id)[-1]
    return found


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4, "top_p": 0.9}, {"presence_penalty": 1.0}])
def test_held_answers_fit_and_others_are_as_alone(
    model_dir: Path, compiler: GrammarCompiler, runs_ahead: bool, sampling: dict[str, object]
) -> None:
    held = {"grammar": JSON, "max_tokens": 200, **sampling}
    free = {"ignore_eos": True, **sampling}
    mixed = {1: held, 2: free, 3: {"grammar": WORD, **sampling}, 4: free, 5: held}
    answers = run(worker(model_dir, compiler, runs_ahead=runs_ahead), mixed)
    for request_id in (1, 5):
        text, last = answers[request_id]
        value = json.loads(text)
        assert set(value) == {"a", "b"} and 3 <= value["a"] <= 120 and value["b"] in ("red", "green")
        assert last.finish_reason is FinishReason.STOP
    assert re.fullmatch("[a-c]{4,6}!", answers[3][0])
    for request_id, fields in mixed.items():
        alone = run(worker(model_dir, compiler, runs_ahead=not runs_ahead), {request_id: fields})
        assert alone[request_id][0] == answers[request_id][0]


def test_an_answer_that_is_complete_ends_whatever_else_was_asked(model_dir: Path, compiler: GrammarCompiler) -> None:
    fields = {"grammar": WORD, "ignore_eos": True, "min_tokens": 50}
    text, last = run(worker(model_dir, compiler, runs_ahead=True), {1: fields})[1]
    assert re.fullmatch("[a-c]{4,6}!", text)
    assert last.finish_reason is FinishReason.STOP


def test_logprobs_are_of_the_raw_distribution(model_dir: Path, compiler: GrammarCompiler) -> None:
    harness = worker(model_dir, compiler, runs_ahead=True)
    run(harness, {1: {"grammar": WORD, "logprobs": 3}})
    for output in harness.outputs(1):
        assert output.logprobs is not None
        [found] = output.logprobs
        assert found.top[0][1] > found.logprob, "a random model would not have chosen what it was held to"


def test_preemption_loses_nothing(model_dir: Path, compiler: GrammarCompiler) -> None:
    commands = {i: {"grammar": JSON, "max_tokens": 200, "temperature": 1.0, "seed": i} for i in range(1, 6)}
    plenty = run(worker(model_dir, compiler, runs_ahead=True), commands)
    harness = worker(model_dir, compiler, runs_ahead=True, num_blocks=24)
    commands = {i: {**fields, "max_tokens": 80} for i, fields in commands.items()}
    tight = run(harness, commands)
    assert harness.scheduler.num_preemptions
    for request_id, (text, _) in tight.items():
        assert plenty[request_id][0].startswith(text)


def test_a_grammar_that_cannot_be_used_fails_its_request_alone(model_dir: Path, compiler: GrammarCompiler) -> None:
    bad = Grammar("json_schema", '{"type": "nonsense"}')
    answers = run(worker(model_dir, compiler, runs_ahead=True), {1: {"grammar": bad}, 2: {"grammar": WORD}})
    error = answers[1][1].error
    assert error is not None and (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "grammar")
    assert "nonsense" in error.message
    assert answers[2][1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("cancel", [Cancel(OWNER, 1), CancelAll(OWNER)])
def test_cancelled_while_it_is_compiled(model_dir: Path, compiler: GrammarCompiler, cancel: Cancel | CancelAll) -> None:
    harness = worker(model_dir, compiler, runs_ahead=True)
    harness.jobs.hold = True
    harness.put(Start(OWNER, generate(1, [5, 6], grammar=WORD)))
    harness.step()
    harness.put(cancel)
    harness.step()
    harness.jobs.release()
    harness.drain()
    assert harness.outputs(1) == []


PROMPT = list(range(3, 60))


def scores(harness: Harness, request_id: int, max_tokens: int = 2) -> list[float]:
    """Of PROMPT, one for each token but the first."""
    fields = {"max_tokens": max_tokens, "temperature": 0.0, "prompt_logprobs": 1}
    harness.put(Start(OWNER, generate(request_id, PROMPT, **fields)))  # type: ignore[arg-type]
    harness.drain()
    first, *others = harness.outputs(request_id)
    assert first.prompt_logprobs is not None
    assert all(output.prompt_logprobs is None for output in others)
    return [found.logprob for found in first.prompt_logprobs]


def test_prompts_are_scored_whole_whatever_is_cached(model_dir: Path, compiler: GrammarCompiler) -> None:
    harness = worker(model_dir, compiler, runs_ahead=True)
    found = [scores(harness, request_id) for request_id in (1, 2)]
    assert len(found[0]) == len(PROMPT) - 1
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert harness.outputs(2)[0].cached_tokens == 0
    run(harness, {3: {}})
    harness.put(Start(OWNER, generate(4, PROMPT, ignore_eos=True)))
    harness.drain()
    assert harness.outputs(4)[0].cached_tokens > 0, "what a scored prompt leaves in the cache serves others"


def test_prompts_are_scored_once_though_they_are_preempted(model_dir: Path, compiler: GrammarCompiler) -> None:
    alone = scores(worker(model_dir, compiler, runs_ahead=False), 1)
    harness = worker(model_dir, compiler, runs_ahead=True, num_blocks=24)
    for i in range(2, 5):  # these come first and grow
        harness.put(Start(OWNER, generate(i, [5, 6, i], max_tokens=80, temperature=0.0, ignore_eos=True)))
    harness.step(2)
    assert scores(harness, 1) == pytest.approx(alone, abs=1e-5)
    assert harness.scheduler.num_preemptions
