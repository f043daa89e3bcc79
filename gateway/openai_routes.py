"""POST /v1/chat/completions and /v1/completions."""

from starlette.requests import Request
from starlette.responses import Response

from gateway import params
from gateway.errors import invalid, unsupported
from gateway.generation import Plan
from gateway.openai_json import Answer
from gateway.params import Job
from gateway.placement import Lease
from gateway.responses import EventStream, WholeResponse
from gateway.schemas import ChatRequest, CompletionRequest, SamplingFields, body_decoder
from gateway.state import Gateway, gateway_of, read_json
from protocol.sampling import SamplingParams

_decode_chat = body_decoder(ChatRequest)
_decode_completion = body_decoder(CompletionRequest)

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, on /v1/completions
MAX_INLINE_CHARS = 4096  # a longer prompt is tokenized in a thread


async def chat_completions(request: Request) -> Response:
    """A chat's next message."""
    gateway = gateway_of(request)
    fields = _decode_chat(await read_json(request))
    adapter = gateway.resolve(fields.model, fields.lora_path)
    num_choices = _check_fields(fields, gateway)
    flags = params.check_chat_flags(fields.add_generation_prompt, fields.continue_final_message)
    variables = params.check_template_variables(fields.chat_template_kwargs)
    logprobs = params.chat_logprobs(fields)
    lease = gateway.admit({adapter}, num_choices)
    try:
        params.check_num_chars(params.num_message_chars(fields.messages), lease.model, "messages")
        knows_developer = lease.text.template is not None and lease.text.template.knows_developer
        prompt = await gateway.in_thread(
            params.render_chat,
            lease.text,
            lease.model,
            params.template_messages(fields.messages, knows_developer),
            add_generation_prompt=flags[0],
            continue_final_message=flags[1],
            variables=variables,
            add_special_tokens=bool(fields.add_special_tokens),
        )
        asked = fields.max_completion_tokens or fields.max_tokens
        sampling = _sampling(fields, lease, prompt, asked, None, logprobs, "messages")
        jobs = _jobs(fields, [(prompt, sampling)], num_choices, adapter)
        return _respond(request, gateway, lease, fields, jobs, num_choices, logprobs, chat=True, echoes=[])
    except BaseException:
        lease.release()
        raise


async def completions(request: Request) -> Response:
    """The continuation of one prompt or many."""
    gateway = gateway_of(request)
    fields = _decode_completion(await read_json(request))
    adapter = gateway.resolve(fields.model, fields.lora_path)
    num_choices = _check_fields(fields, gateway)
    if fields.echo and fields.logprobs is not None:
        raise unsupported("echo with logprobs")
    prompts = params.split_prompts(fields.prompt, "prompt")
    lease = gateway.admit({adapter}, num_choices * len(prompts))
    try:
        num_chars = max(len(prompt) for prompt in prompts)
        params.check_num_chars(num_chars, lease.model, "prompt")
        special = fields.add_special_tokens is not False
        if num_chars * len(prompts) <= MAX_INLINE_CHARS:
            token_ids = params.encode_prompts(lease.text, prompts, special)
        else:
            token_ids = await gateway.in_thread(params.encode_prompts, lease.text, prompts, special)
        pairs = []
        for ids in token_ids:
            if not ids:
                raise invalid("prompt", "prompt has no tokens.")
            default = DEFAULT_COMPLETION_TOKENS
            pairs.append((ids, _sampling(fields, lease, ids, fields.max_tokens, default, fields.logprobs, "prompt")))
        echoes = _echoes(prompts, lease, num_choices) if fields.echo else []
        jobs = _jobs(fields, pairs, num_choices, adapter)
        return _respond(request, gateway, lease, fields, jobs, num_choices, fields.logprobs, chat=False, echoes=echoes)
    except BaseException:
        lease.release()
        raise


def _check_fields(fields: SamplingFields, gateway: Gateway) -> int:
    """What the two routes check before a place is taken; the number of choices."""
    num_choices = fields.n or 1
    if num_choices > gateway.config.max_choices:
        raise invalid("n", f"n must be at most {gateway.config.max_choices}.")
    if fields.best_of not in (None, 1, num_choices):
        raise unsupported("best_of")
    if fields.stream_options is not None and not fields.stream:
        raise invalid("stream_options", "stream_options needs stream to be true.")
    return num_choices


def _sampling(
    fields: ChatRequest | CompletionRequest,
    lease: Lease,
    prompt: list[int],
    asked: int | None,
    default: int | None,
    logprobs: int | None,
    param: str,
) -> SamplingParams:
    return params.sampling_params(
        fields,
        lease.text.defaults,
        max_tokens=params.num_tokens_allowed(asked, default, prompt, lease.model, param),
        min_tokens=fields.min_tokens,
        seed=fields.seed,
        logprobs=logprobs,
    )


def _jobs(
    fields: SamplingFields, pairs: list[tuple[list[int], SamplingParams]], num_choices: int, adapter: str | None
) -> list[Job]:
    """num_choices jobs for each prompt, in the order of the answer's choices."""
    text = params.text_options(fields)
    return [
        Job(prompt=prompt, sampling=params.with_seed(sampling, choice), text=text, adapter=adapter)
        for prompt, sampling in pairs
        for choice in range(num_choices)
    ]


def _echoes(prompts: list[str | list[int]], lease: Lease, num_choices: int) -> list[str]:
    decode = lease.text.tokenizer.decode
    texts = [prompt if isinstance(prompt, str) else decode(prompt, False) for prompt in prompts]
    return [text for text in texts for _ in range(num_choices)]


def _respond(
    request: Request,
    gateway: Gateway,
    lease: Lease,
    fields: SamplingFields,
    jobs: list[Job],
    num_choices: int,
    logprobs: int | None,
    *,
    chat: bool,
    echoes: list[str],
) -> Response:
    options = fields.stream_options
    plan = Plan(
        jobs=jobs,
        num_choices=num_choices,
        trace=request.scope["request_id"],
        cache_salt=fields.cache_salt or "",
        prompt_param="messages" if chat else "prompt",
    )
    answer = Answer(
        chat=chat,
        model=fields.model,
        logprobs=logprobs is not None,
        echoes=echoes,
        usage=bool(options and options.include_usage),
        running=bool(options and options.continuous_usage_stats),
    )
    generation = gateway.generate(lease, plan)
    if fields.stream:
        return EventStream(generation, answer)
    return WholeResponse(generation, answer, len(jobs))
