"""One step ahead with a real model: every answer is what its sequence gets alone, from steps that nobody overtakes."""

import queue
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from protocol.messages import FinishReason, ModelCard, Output, Outputs
from tests.tiny_models import write_tiny_model
from tests.worker.driver import Driver
from tests.worker.fakes import OWNER, generate
from worker.adapter_cache import AdapterCache
from worker.adapter_service import AdapterService
from worker.block_manager import BlockManager
from worker.engine import Engine
from worker.mailbox import Cancel, Mail, Message, Outbox, Start
from worker.scheduler import Scheduler

BLOCK_SIZE = 4
EOS = 7
# What the sampler must know of the tokens so far, and what it must not need to know.
SAMPLINGS: list[dict] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 0.7, "seed": 6, "repetition_penalty": 1.4, "frequency_penalty": 0.8},
    {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 3},
    {"temperature": 1.2, "seed": 7, "min_tokens": 4, "logit_bias": {EOS: 6.0}},
    {"temperature": 0.0, "logit_bias": {EOS: 6.0}, "logprobs": 0},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")


@dataclass
class Worker:
    """An engine on a runner, stepped by hand."""

    engine: Engine
    scheduler: Scheduler
    blocks: BlockManager
    inbox: "queue.SimpleQueue[Message]"
    mail: Mail

    @classmethod
    def of(cls, model_dir: Path, *, runs_ahead: bool, num_blocks: int = 64) -> "Worker":
        runner = Driver.of(model_dir, block_size=BLOCK_SIZE, num_blocks=num_blocks).runner
        vocab_size = len(runner.model.embed_tokens)
        sizes = {"vocab_size": vocab_size, "max_model_len": 128, "eos_token_ids": [EOS], "lora_enabled": False}
        card = ModelCard(names=["m"], digest="", created=0, **sizes)
        inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        outbox, mail = Outbox(), []
        cache = AdapterCache(num_chunks=1, max_per_batch=1, max_loaded=1)
        adapters = AdapterService(cache, None, None, outbox, None, None, base_names=frozenset(), enabled=False)  # type: ignore[arg-type]
        blocks = BlockManager(num_blocks, BLOCK_SIZE)
        limits = {"max_running": 6, "max_prefill_tokens": 8, "max_adapters": 1, "max_overtake_s": 1.0}
        scheduler = Scheduler(blocks, adapters, **limits)
        engine = Engine(
            card, runner, scheduler, blocks, adapters, inbox, outbox, mail.extend, max_loras_per_batch=1,
            runs_ahead=runs_ahead,
        )  # fmt: skip
        return cls(engine, scheduler, blocks, inbox, mail)

    def step(self) -> None:
        self.engine.step()
        self.scheduler.check_integrity()

    def drain(self) -> None:
        while self.scheduler.running or self.scheduler.waiting or not self.inbox.empty():
            self.step()
        assert self.blocks.num_free == self.blocks.num_blocks

    def outputs(self, request_id: int) -> list[Output]:
        events = [event for _, event in self.mail if isinstance(event, Outputs)]
        return [output for event in events for output in event.outputs if output.request_id == request_id]


def asked(number: int) -> dict:
    """The arguments of the number-th request; some prompts share a beginning."""
    prompt = [20 + number % 3 + i for i in range(1 + 5 * number % 17)]
    return {"prompt": prompt, "max_tokens": 5 + number % 9, **SAMPLINGS[number % len(SAMPLINGS)]}


def alone(model_dir: Path, number: int) -> list[Output]:
    worker = Worker.of(model_dir, runs_ahead=False)
    worker.inbox.put(Start(OWNER, generate(0, **asked(number))))
    worker.drain()
    return worker.outputs(0)


def answer(outputs: list[Output]) -> tuple[list[int], FinishReason | None]:
    assert all(output.offset == i and output.error is None for i, output in enumerate(outputs))
    return [token for output in outputs for token in output.token_ids], outputs[-1].finish_reason


@pytest.mark.parametrize("num_blocks", [64, 14])
def test_any_mix_is_what_each_gets_alone(model_dir: Path, num_blocks: int) -> None:
    """Greedy and drawn, with and without penalties, ending by themselves and at their limit, preempted, aborted."""
    expected = [alone(model_dir, number) for number in range(24)]
    reasons = {answer(outputs)[1] for outputs in expected}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    rng = random.Random(num_blocks)
    worker = Worker.of(model_dir, runs_ahead=True, num_blocks=num_blocks)
    aborted = set()
    for number in range(24):
        worker.inbox.put(Start(OWNER, generate(number, **asked(number))))
        for _ in range(rng.randrange(3)):
            worker.step()
        if rng.random() < 0.2:
            aborted.add(rng.randrange(number + 1))
            worker.inbox.put(Cancel(OWNER, max(aborted)))
    worker.drain()
    assert (worker.scheduler.num_preemptions > 0) == (num_blocks == 14)
    for number, outputs in enumerate(expected):
        found = worker.outputs(number)
        if number in aborted and (not found or found[-1].finish_reason is None):
            assert [o.token_ids for o in found] == [o.token_ids for o in outputs[: len(found)]]
            continue
        assert answer(found) == answer(outputs)
        logprobs = [entry for output in found for entry in output.logprobs or []]
        expected_logprobs = [entry for output in outputs for entry in output.logprobs or []]
        assert [e.logprob for e in logprobs] == pytest.approx([e.logprob for e in expected_logprobs], abs=1e-4)
        assert [[t for t, _ in e.top] for e in logprobs] == [[t for t, _ in e.top] for e in expected_logprobs]
    status = worker.engine.status()
    assert status.generation_tokens_total == sum(len(worker.outputs(number)) for number in range(24))


def test_a_row_that_is_no_number_fails_alone_while_the_next_step_reads_its_token(model_dir: Path) -> None:
    expected = answer(alone(model_dir, 0))
    worker = Worker.of(model_dir, runs_ahead=True)
    worker.engine._steps._runner.model.embed_tokens[319] = torch.nan  # type: ignore[attr-defined]
    worker.inbox.put(Start(OWNER, generate(1, [5, 319], 8, temperature=0.0)))
    worker.inbox.put(Start(OWNER, generate(0, **asked(0))))
    worker.drain()
    assert answer(worker.outputs(0)) == expected
    (output,) = worker.outputs(1)
    assert output.error is not None and output.token_ids == []
