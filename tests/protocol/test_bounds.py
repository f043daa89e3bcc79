"""The bounds that depend on the model."""

import msgspec
import pytest

from protocol.bounds import check_generate
from protocol.errors import ErrorCode
from protocol.messages import MAX_MIX, Generate, MixMember, ModelCard
from protocol.sampling import SamplingParams

MODEL = ModelCard(
    names=["m"], digest="d", created=0, vocab_size=100, max_model_len=20, eos_token_ids=[2], lora_enabled=True
)


def command(num_prompt: int = 4, token: int = 5, **sampling: object) -> Generate:
    params = SamplingParams(**{"max_tokens": 5, **sampling})  # type: ignore[arg-type]
    return Generate(request_id=1, prompt_token_ids=[token] * num_prompt, sampling=params)


def mix(*members: tuple[int, float], generation: int = 0) -> Generate:
    mix = [MixMember(*member) for member in members]
    return msgspec.structs.replace(command(), mix=mix, generation=generation)


def test_what_fits_is_fine() -> None:
    assert check_generate(command(), MODEL) is None
    assert check_generate(command(num_prompt=15, max_tokens=5, min_tokens=5, stop_token_ids=[99]), MODEL) is None
    assert check_generate(command(token=99, logit_bias={99: 1.0}), MODEL) is None
    assert check_generate(mix((1, 0.5), (2, -100.0)), MODEL) is None


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (command(num_prompt=20), "messages"),
        (command(token=100), "prompt"),
        (command(max_tokens=17), "max_tokens"),
        (command(min_tokens=6), "min_tokens"),
        (command(stop_token_ids=[1, 100]), "stop_token_ids"),
        (command(logit_bias={100: 0.0}), "logit_bias"),
        (command(temperature=float("nan")), "temperature"),
        (command(top_p=float("nan")), "top_p"),
        (command(repetition_penalty=float("inf")), "repetition_penalty"),
        (command(logit_bias={1: float("nan")}), "logit_bias"),
        (mix((1, 0.5), (1, 0.5)), "lora_path"),
        (mix((1, float("nan"))), "lora_path"),
        (mix((1, 0.5), generation=2), "lora_path"),
    ],
)
def test_what_does_not_is_named(wrong: Generate, param: str) -> None:
    error = check_generate(wrong, MODEL)
    assert error is not None
    assert error.param == param


def test_a_full_context_is_said_in_the_words_that_clients_look_for() -> None:
    error = check_generate(command(num_prompt=25), MODEL)
    assert error is not None
    assert error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert "maximum context length is 20 tokens" in error.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 1.5},
        {"temperature": 2.1},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.1},
        {"presence_penalty": 2.5},
        {"repetition_penalty": 0.0},
        {"seed": 2**63},
        {"logprobs": 21},
        {"stop_token_ids": [0] * 129},
        {"logit_bias": {i: 0.0 for i in range(1025)}},
        {"logit_bias": {1: 100.5}},
        {"made_up": 1},
    ],
)
def test_ranges_are_checked_by_the_types(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"max_tokens": 5, **wrong}, SamplingParams)


@pytest.mark.parametrize(
    "wrong",
    [
        [{"generation": 1, "weight": 100.5}],
        [{"generation": 1, "weight": -100.5}],
        [{"generation": 1}],
        [{"generation": 0, "weight": 1.0}],
        [{"generation": 1, "weight": 1.0, "made_up": 1}],
        [{"generation": i, "weight": 1.0} for i in range(1, MAX_MIX + 2)],
    ],
)
def test_what_is_no_mix_is_refused_by_the_types(wrong: list[dict[str, object]]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**msgspec.to_builtins(command()), "mix": wrong}, Generate)
