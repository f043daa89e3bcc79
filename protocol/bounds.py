"""The bounds of a Generate that depend on the model. The gateway checks them for the user, the worker for itself."""

import math

from protocol.errors import Error, ErrorCode
from protocol.messages import BASE_GENERATION, Generate, ModelCard
from protocol.sampling import SamplingParams

# Values of a prompt's logprobs, the chosen and the likeliest together: at 15 bytes each a quarter of a frame.
MAX_PROMPT_LOGPROBS = 2**18


def check_generate(command: Generate, model: ModelCard) -> Error | None:
    """The first thing wrong with a command that has the right types, or None."""
    sampling = command.sampling
    num_prompt = len(command.prompt_token_ids)
    if num_prompt + 1 > model.max_model_len:
        return context_length_exceeded(num_prompt, model.max_model_len)
    if max(command.prompt_token_ids) >= model.vocab_size:
        return _invalid("prompt", f"a prompt token id is outside the vocabulary of {model.vocab_size}")
    if num_prompt + sampling.max_tokens > model.max_model_len:
        left = model.max_model_len - num_prompt
        return _invalid("max_tokens", f"max_tokens must be at most {left}, what the context leaves after the prompt")
    if sampling.min_tokens > sampling.max_tokens:
        return _invalid("min_tokens", f"min_tokens must be at most max_tokens, {sampling.max_tokens}")
    if any(token_id >= model.vocab_size for token_id in sampling.stop_token_ids):
        return _invalid("stop_token_ids", f"a stop token id is outside the vocabulary of {model.vocab_size}")
    if any(token_id >= model.vocab_size for token_id in sampling.logit_bias):
        return _invalid("logit_bias", f"a logit_bias key is outside the vocabulary of {model.vocab_size}")
    if sampling.grammar is not None and not model.grammars:
        return _invalid("grammar", "this server's worker cannot hold answers to a grammar")
    if (error := _check_prompt_logprobs(command, model) or _check_mix(command)) is not None:
        return error
    return _check_finite(sampling)


def _check_finite(sampling: SamplingParams) -> Error | None:
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        if not math.isfinite(getattr(sampling, name)):  # MessagePack carries NaN, and NaN passes every comparison
            return _invalid(name, f"{name} must be finite")
    if not all(math.isfinite(bias) for bias in sampling.logit_bias.values()):
        return _invalid("logit_bias", "logit_bias values must be finite")
    return None


def _check_mix(command: Generate) -> Error | None:
    generations = [member.generation for member in command.mix]
    if generations and command.generation != BASE_GENERATION:
        return _invalid("lora_path", "a request has an adapter or a mix of adapters, not both")
    if len(set(generations)) < len(generations):
        return _invalid("lora_path", "an adapter is in a mix once")
    if not all(math.isfinite(member.weight) for member in command.mix):
        return _invalid("lora_path", "the weights of a mix must be finite")
    return None


def _check_prompt_logprobs(command: Generate, model: ModelCard) -> Error | None:
    asked = command.sampling.prompt_logprobs
    if asked is None:
        return None
    if not model.prompt_logprobs:
        return _invalid("prompt_logprobs", "this server's worker cannot give the logprobs of a prompt")
    most = MAX_PROMPT_LOGPROBS // (asked + 1)
    if len(command.prompt_token_ids) > most:
        return _invalid("prompt_logprobs", f"so many logprobs a token need a prompt of at most {most} tokens")
    return None


def context_length_exceeded(num_prompt: int, max_model_len: int) -> Error:
    """The error of a prompt that leaves no room for an answer, in the words that clients look for."""
    message = (
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt has {num_prompt} tokens"
        " and an answer needs at least one. Please shorten the prompt."
    )
    return Error(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, "messages")


def _invalid(param: str, message: str) -> Error:
    return Error(ErrorCode.INVALID_REQUEST, message, param)
