"""POST /generate, SGLang's own route: text or token ids, an adapter for each prompt."""

import random
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway import params
from gateway.errors import invalid
from gateway.generation import Delta, Generation, Plan
from gateway.mixes import Adapter
from gateway.model_text import SamplingDefaults
from gateway.openai_json import DONE
from gateway.params import Job, TextOptions
from gateway.placement import Lease
from gateway.responses import EventStream, WholeResponse
from gateway.schemas import NativeRequest, NativeSampling, WeightedAdapter, body_decoder
from gateway.state import Gateway, gateway_of, read_json
from protocol.messages import MAX_MIX

_decode = body_decoder(NativeRequest)
_encode = msgspec.json.Encoder().encode

DEFAULT_NATIVE_TOKENS = 128  # SGLang's max_new_tokens


class NativeAnswer:
    """SGLang's shapes: one object, or a list for several. A stream's events repeat the text from its beginning."""

    def __init__(self, num_answers: int, as_list: bool) -> None:
        self._id = f"{random.getrandbits(128):032x}"
        self._started_s = time.monotonic()
        self._as_list = as_list
        self._joined = [Delta(i, "", [], []) for i in range(num_answers)]

    def chunks(self, deltas: list[Delta], generation: Generation) -> bytes:
        """One event for each delta."""
        events = []
        for delta in deltas:
            joined = self._joined[delta.index]
            joined.text += delta.text
            joined.token_ids += delta.token_ids
            joined.finish_reason, joined.stop_reason = delta.finish_reason, delta.stop_reason
            body = self._body(joined, generation)
            if self._as_list:
                body["index"] = delta.index
            events.append(b"data: " + _encode(body) + b"\n\n")
        return b"".join(events)

    def last(self, generation: Generation) -> bytes:
        """The mark that the stream is complete."""
        return DONE

    def whole(self, answers: list[Delta], generation: Generation) -> bytes:
        """The body of an answer that is not streamed."""
        bodies = [self._body(answer, generation) for answer in answers]
        return _encode(bodies if self._as_list else bodies[0])

    def _body(self, answer: Delta, generation: Generation) -> dict[str, Any]:
        usage = generation.choice_usage(answer.index)
        finish: dict[str, Any] | None = None
        if answer.finish_reason == "length":
            finish = {"type": "length", "length": usage.completion_tokens}
        elif answer.finish_reason is not None:
            matched = answer.stop_reason
            finish = {"type": answer.finish_reason, "matched": answer.token_ids[-1] if matched is None else matched}
        meta = {
            "id": f"{self._id}-{answer.index}" if self._as_list else self._id,
            "finish_reason": finish,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "e2e_latency": time.monotonic() - self._started_s,
        }
        return {"text": answer.text, "output_ids": answer.token_ids, "meta_info": meta}


async def generate(request: Request) -> Response:
    """Answers one prompt or a list, each under the base model or an adapter."""
    gateway = gateway_of(request)
    fields = _decode(await read_json(request))
    prompts, is_list = _prompts(fields)
    samplings = _per_prompt(fields.sampling_params or NativeSampling(), len(prompts), "sampling_params")
    num_choices = samplings[0].n or 1
    if num_choices > gateway.config.max_choices:
        raise invalid("n", f"n must be at most {gateway.config.max_choices}.")
    if any((sampling.n or 1) != num_choices for sampling in samplings):
        raise invalid("n", "n must be the same for all prompts.")
    adapters = _adapters(gateway, fields, len(prompts))
    lease = gateway.admit(set(adapters), num_choices * len(prompts))
    try:
        params.check_num_chars(max(len(prompt) for prompt in prompts), lease.model, "text")
        token_ids = await gateway.in_thread(params.encode_prompts, lease.text, prompts, True)
        jobs = [
            job
            for ids, sampling, adapter in zip(token_ids, samplings, adapters, strict=True)
            for job in _jobs(ids, sampling, adapter, lease, num_choices)
        ]
        param = "text" if fields.text is not None else "input_ids"
        plan = Plan(jobs=jobs, num_choices=num_choices, trace=request.scope["request_id"], prompt_param=param)
        answer = NativeAnswer(len(jobs), is_list or num_choices > 1)
        generation = gateway.generate(lease, plan)
    except BaseException:
        lease.release()
        raise
    return EventStream(generation, answer) if fields.stream else WholeResponse(generation, answer, len(jobs))


def _prompts(fields: NativeRequest) -> tuple[list[str | list[int]], bool]:
    """The prompts, and whether they came as a list."""
    if (fields.text is None) == (fields.input_ids is None):
        raise invalid("text", "Exactly one of text and input_ids is required.")
    if fields.text is not None:
        return params.split_prompts(fields.text, "text"), not isinstance(fields.text, str)
    assert fields.input_ids is not None
    return params.split_prompts(fields.input_ids, "input_ids"), not isinstance(fields.input_ids[0], int)


def _per_prompt(value: Any, num_prompts: int, param: str) -> list[Any]:
    """One value for every prompt: a list of that length, or a single value for all."""
    if not isinstance(value, list):
        return [value] * num_prompts
    if len(value) != num_prompts:
        message = f"{param} has {len(value)} entries for {num_prompts} prompts; it must have one for each."
        raise invalid(param, message)
    return value


def _adapters(gateway: Gateway, fields: NativeRequest, num_prompts: int) -> list[Adapter]:
    """The adapter or mix of each prompt."""
    base, given, scale = gateway.fleet.require_model().names[0], fields.lora_path, fields.lora_scale
    if isinstance(given, list):
        mix = [entry for entry in given if isinstance(entry, WeightedAdapter)]
        if mix and (len(mix) < len(given) or len(mix) > MAX_MIX):
            message = f"lora_path is one mix of at most {MAX_MIX} adapters, or a list with one name or mix a prompt."
            raise invalid("lora_path", message)
        if mix:
            return [gateway.resolve(base, mix, scale)] * num_prompts
    chosen = _per_prompt(given, num_prompts, "lora_path")
    if scale is not None and not any(chosen):
        raise invalid("lora_scale", "lora_scale needs an adapter, and this request names none.")
    named = {
        name: gateway.resolve(base, name, scale if name else None) for name in chosen if not isinstance(name, list)
    }
    return [
        gateway.resolve(base, entry, scale, f"lora_path[{i}]") if isinstance(entry, list) else named[entry]
        for i, entry in enumerate(chosen)
    ]


def _jobs(prompt: list[int], fields: NativeSampling, adapter: Adapter, lease: Lease, num_choices: int) -> list[Job]:
    if not prompt:
        raise invalid("text", "text has no tokens.")
    asked = fields.max_new_tokens
    sampling = params.sampling_params(
        fields,
        SamplingDefaults(),
        max_tokens=params.num_tokens_allowed(asked, DEFAULT_NATIVE_TOKENS, prompt, lease.model, "text"),
        min_tokens=fields.min_new_tokens,
        seed=fields.sampling_seed,
        logprobs=None,
    )
    text = TextOptions(
        stops=params.stop_list(fields.stop),
        include_stop=bool(fields.no_stop_trim),
        skip_special_tokens=fields.skip_special_tokens is not False,
        min_tokens=fields.min_new_tokens or 0,
    )
    return [
        Job(prompt=prompt, sampling=params.with_seed(sampling, i), text=text, adapter=adapter)
        for i in range(num_choices)
    ]
