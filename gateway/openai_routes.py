"""POST /v1/chat/completions and /v1/completions."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from gateway import params
from gateway.chat_json import ChatShape
from gateway.completion_json import CompletionShape
from gateway.errors import invalid, unsupported
from gateway.generation import Plan
from gateway.mixes import Adapter
from gateway.openai_json import Answer, Shape
from gateway.params import Job
from gateway.placement import Lease
from gateway.responses import EventStream, WholeResponse
from gateway.schemas import ChatRequest, CompletionRequest, SamplingFields, body_decoder
from gateway.state import Gateway, gateway_of, read_json
from gateway.structured import grammar_of
from gateway.tools import ToolUse, message_parser, tool_use
from protocol.sampling import Grammar, SamplingParams

_decode_chat = body_decoder(ChatRequest)
_decode_completion = body_decoder(CompletionRequest)

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, on /v1/completions
MAX_INLINE_CHARS = 4096  # a longer prompt is tokenized in a thread; for a shorter one the way there costs more


async def chat_completions(request: Request) -> Response:
    """A chat's next message."""
    gateway = gateway_of(request)
    fields = _decode_chat(await read_json(request))
    adapter = gateway.resolve(fields.model, fields.lora_path, fields.lora_scale)
    num_choices = _check_fields(fields, gateway)
    logprobs = params.chat_logprobs(fields)
    lease = gateway.admit({adapter}, num_choices)
    try:
        grammar, grammar_param = grammar_of(fields, lease.model)
        use = tool_use(fields, lease.text, lease.model, grammar)
        may_think = grammar is None
        if use is not None and use.grammar is not None:
            grammar, grammar_param, may_think = use.grammar, "tools", use.may_think
        prompt = await _chat_prompt(gateway, lease, fields, use)
        asked = fields.max_completion_tokens or fields.max_tokens
        sampling = params.sampling_params(
            fields,
            lease.text.defaults,
            max_tokens=params.num_tokens_allowed(asked, None, prompt, lease.model, "messages"),
            min_tokens=fields.min_tokens,
            seed=fields.seed,
            logprobs=logprobs,
            grammar=grammar,
        )
        jobs = _jobs(fields, [(prompt, sampling)], num_choices, adapter)
        if use is not None and lease.text.tokenizer.has_special(use.form.begin):
            for job in jobs:
                job.text.skip_special_tokens = False  # the mark must be seen to be read
        shape = ChatShape(
            logprobs=logprobs is not None,
            parser=message_parser(lease.text, prompt, use, may_think),
            short_ids=use is not None and use.form.short_ids,
            is_named=use is not None and use.is_named,
        )
        plan = _plan(request, fields, jobs, num_choices, "messages", grammar_param)
        return _respond(gateway, lease, fields, plan, shape)
    except BaseException:
        lease.release()
        raise


async def _chat_prompt(gateway: Gateway, lease: Lease, fields: ChatRequest, use: ToolUse | None) -> list[int]:
    flags = params.check_chat_flags(fields.add_generation_prompt, fields.continue_final_message)
    num_chars = params.num_message_chars(fields.messages) + (use.num_chars if use else 0)
    params.check_num_chars(num_chars, lease.model, "messages")
    knows_developer = lease.text.template is not None and lease.text.template.knows_developer
    render = partial(
        params.render_chat,
        lease.text,
        lease.model,
        params.template_messages(fields.messages, knows_developer),
        add_generation_prompt=flags[0],
        continue_final_message=flags[1],
        variables=params.template_variables(fields, lease.text),
        tools=use.specs if use else None,
        add_special_tokens=bool(fields.add_special_tokens),
    )
    return render() if num_chars <= MAX_INLINE_CHARS else await gateway.in_thread(render)


async def completions(request: Request) -> Response:
    """The continuation of one prompt or many."""
    gateway = gateway_of(request)
    fields = _decode_completion(await read_json(request))
    adapter = gateway.resolve(fields.model, fields.lora_path, fields.lora_scale)
    num_choices = _check_fields(fields, gateway)
    best_of = _best_of(fields, num_choices, gateway)
    if fields.max_tokens == 0 and not fields.echo:
        raise invalid("max_tokens", "max_tokens must be at least 1; 0 is for echo.")
    prompts = params.split_prompts(fields.prompt, "prompt")
    lease = gateway.admit({adapter}, best_of * len(prompts))
    try:
        if fields.echo and fields.logprobs is not None and not lease.model.prompt_logprobs:
            raise unsupported("echo with logprobs")
        grammar, grammar_param = grammar_of(fields, lease.model)
        token_ids = await _encode_prompts(gateway, lease, fields, prompts)
        pairs = [(ids, _completion_sampling(fields, lease, ids, grammar, best_of > num_choices)) for ids in token_ids]
        jobs = _jobs(fields, pairs, best_of, adapter)
        shape = CompletionShape(
            echoes=_echoes(prompts, lease) if fields.echo else None,
            logprobs=fields.logprobs is not None,
            skip_special_tokens=fields.skip_special_tokens is not False,
            num_choices=num_choices,
            best_of=best_of,
        )
        plan = _plan(request, fields, jobs, best_of, "prompt", grammar_param)
        return _respond(gateway, lease, fields, plan, shape)
    except BaseException:
        lease.release()
        raise


def _check_fields(fields: SamplingFields, gateway: Gateway) -> int:
    """What the two routes check before a place is taken; the number of choices."""
    num_choices = fields.n or 1
    if num_choices > gateway.config.max_choices:
        raise invalid("n", f"n must be at most {gateway.config.max_choices}.")
    if fields.stream_options is not None and not fields.stream:
        raise invalid("stream_options", "stream_options needs stream to be true.")
    return num_choices


def _best_of(fields: CompletionRequest, num_choices: int, gateway: Gateway) -> int:
    """How many sequences run for each prompt; the best num_choices are shown."""
    best_of = fields.best_of or num_choices
    if best_of < num_choices:
        raise invalid("best_of", "best_of must be at least n.")
    if best_of > gateway.config.max_choices:
        raise invalid("best_of", f"best_of must be at most {gateway.config.max_choices}.")
    if best_of > num_choices and fields.stream:
        raise invalid("best_of", "best_of cannot be streamed: the best is known only at the end.")
    return best_of


async def _encode_prompts(
    gateway: Gateway, lease: Lease, fields: CompletionRequest, prompts: list[str | list[int]]
) -> list[list[int]]:
    num_chars = max(len(prompt) for prompt in prompts)
    params.check_num_chars(num_chars, lease.model, "prompt")
    special = fields.add_special_tokens is not False
    if num_chars * len(prompts) <= MAX_INLINE_CHARS:
        token_ids = params.encode_prompts(lease.text, prompts, special)
    else:
        token_ids = await gateway.in_thread(params.encode_prompts, lease.text, prompts, special)
    if not all(token_ids):
        raise invalid("prompt", "prompt has no tokens.")
    return token_ids


def _completion_sampling(
    fields: CompletionRequest, lease: Lease, prompt: list[int], grammar: Grammar | None, ranked: bool
) -> SamplingParams:
    """ranked: best_of needs the logprobs, asked for or not."""
    only_prompt = fields.max_tokens == 0
    asked = 1 if only_prompt else fields.max_tokens  # the worker cannot make none
    return params.sampling_params(
        fields,
        lease.text.defaults,
        max_tokens=params.num_tokens_allowed(asked, DEFAULT_COMPLETION_TOKENS, prompt, lease.model, "prompt"),
        min_tokens=None if only_prompt else fields.min_tokens,
        seed=fields.seed,
        logprobs=0 if ranked and fields.logprobs is None else fields.logprobs,
        prompt_logprobs=fields.logprobs if fields.echo else None,
        grammar=grammar,
    )


def _jobs(
    fields: SamplingFields, pairs: list[tuple[list[int], SamplingParams]], num_choices: int, adapter: Adapter
) -> list[Job]:
    """num_choices jobs for each prompt, in the order of the answer's choices."""
    text = params.text_options(fields)
    return [
        Job(prompt=prompt, sampling=params.with_seed(sampling, choice), text=text, adapter=adapter)
        for prompt, sampling in pairs
        for choice in range(num_choices)
    ]


def _echoes(prompts: list[str | list[int]], lease: Lease) -> list[str]:
    decode = lease.text.tokenizer.decode
    return [prompt if isinstance(prompt, str) else decode(prompt, False) for prompt in prompts]


def _plan(
    request: Request,
    fields: SamplingFields,
    jobs: list[Job],
    num_choices: int,
    prompt_param: str,
    grammar_param: str,
) -> Plan:
    return Plan(
        jobs=jobs,
        num_choices=num_choices,
        trace=request.scope["request_id"],
        cache_salt=fields.cache_salt or "",
        prompt_param=prompt_param,
        grammar_param=grammar_param,
    )


def _respond(gateway: Gateway, lease: Lease, fields: SamplingFields, plan: Plan, shape: Shape) -> Response:
    options = fields.stream_options
    answer = Answer(
        shape,
        model=fields.model,
        service_tier=fields.service_tier,
        usage=bool(options and options.include_usage),
        running=bool(options and options.continuous_usage_stats),
    )
    generation = gateway.generate(lease, plan)
    if fields.stream:
        return EventStream(generation, answer)
    return WholeResponse(generation, answer, len(plan.jobs))
