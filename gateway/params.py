"""From a request's fields to what the worker is told: SamplingParams, and prompts as token ids."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from gateway.chat_template import ChatTemplateError
from gateway.errors import ApiError, from_worker, invalid, unsupported
from gateway.mixes import Adapter
from gateway.model_text import ModelText, SamplingDefaults
from gateway.schemas import MAX_PROMPTS, ChatRequest, Message, NativeSampling, SamplingFields, Stop
from protocol.bounds import context_length_exceeded
from protocol.messages import ModelCard
from protocol.sampling import Grammar, SamplingParams, TokenId

T = TypeVar("T")

MAX_CHARS_A_TOKEN = 16  # a longer prompt cannot fit the context; it is refused before it is tokenized
_SMALLEST_TOP_P = 1e-9  # keeps the likeliest token alone, which is what top_p=0 asks for
_SEED_MASK = 2**63 - 1
_MAX_TOOL_DEPTH = 16
# Variables that a request may set for the chat template; everything else of the template's world is the server's.
_TEMPLATE_VARIABLES = frozenset(["enable_thinking", "thinking", "reasoning_effort", "date_string"])


@dataclass(slots=True, kw_only=True)
class TextOptions:
    """What happens to one sequence's text."""

    stops: list[str] = field(default_factory=list)
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    only_prompt: bool = False  # max_tokens=0: nothing of the answer is shown


@dataclass(slots=True, kw_only=True)
class Job:
    """One sequence to run."""

    prompt: list[int]
    sampling: SamplingParams
    text: TextOptions
    adapter: Adapter


def text_options(fields: SamplingFields) -> TextOptions:
    """The text side of the OpenAI routes' fields."""
    return TextOptions(
        stops=stop_list(fields.stop),
        include_stop=bool(fields.include_stop_str_in_output),
        skip_special_tokens=fields.skip_special_tokens is not False,
        min_tokens=fields.min_tokens or 0,
        only_prompt=fields.max_tokens == 0,
    )


def stop_list(stop: Stop | None) -> list[str]:
    """One stop string or several."""
    return [stop] if isinstance(stop, str) else stop or []


def sampling_params(
    fields: SamplingFields | NativeSampling,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    min_tokens: int | None,
    seed: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The request's choices over the model's defaults. Ranges were checked when the body was read."""

    def chosen(name: str) -> float:
        value: float | None = getattr(fields, name)
        return getattr(defaults, name) if value is None else value

    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens or 0,
        temperature=chosen("temperature"),
        top_k=max(int(chosen("top_k")), 0),
        top_p=max(chosen("top_p"), _SMALLEST_TOP_P),
        min_p=chosen("min_p"),
        repetition_penalty=chosen("repetition_penalty"),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        seed=None if seed is None else seed & _SEED_MASK,
        logit_bias=fields.logit_bias or {},
        stop_token_ids=fields.stop_token_ids or [],
        ignore_eos=bool(fields.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def with_seed(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The same for another of a prompt's n choices: a seed of its own, or all would be equal."""
    if sampling.seed is None or choice == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice) & _SEED_MASK)


def num_tokens_allowed(asked: int | None, default: int | None, prompt: list[int], model: ModelCard, param: str) -> int:
    """The answer's limit: what was asked, clipped to what the context leaves. Raises if that is nothing."""
    left = model.max_model_len - len(prompt)
    if left < 1:
        raise too_long(len(prompt), model, param)
    if asked is not None and asked > model.max_model_len:
        message = f"max_tokens must be at most {model.max_model_len}, the model's context length."
        raise invalid("max_tokens", message)
    wanted = asked if asked is not None else default
    return left if wanted is None else min(wanted, left)


def too_long(num_prompt: int, model: ModelCard, param: str) -> ApiError:
    """The 400 of a prompt that leaves no room for an answer."""
    error = from_worker(context_length_exceeded(num_prompt, model.max_model_len))
    error.param = param
    return error


def check_num_chars(num_chars: int, model: ModelCard, param: str) -> None:
    """Refuses, before the work of tokenizing, what cannot fit."""
    limit = model.max_model_len * MAX_CHARS_A_TOKEN
    if num_chars > limit:
        message = (
            f"This model's maximum context length is {model.max_model_len} tokens. However, your prompt has "
            f"{num_chars} characters, over the limit of {limit}. Please shorten the prompt."
        )
        raise invalid(param, message, "context_length_exceeded")


def split_prompts(prompt: str | list[Any], param: str) -> list[str | list[int]]:
    """The prompts of a request that may hold one or several, as text or as token ids."""
    if isinstance(prompt, str):
        prompts: list[str | list[int]] = [prompt]
    elif not prompt:
        raise invalid(param, f"{param} must not be empty.")
    elif isinstance(prompt[0], int):
        prompts = [_checked(prompt, list[TokenId], param)]
    elif isinstance(prompt[0], str):
        prompts = list(_checked(prompt, list[str], param))
    else:
        prompts = list(_checked(prompt, list[list[TokenId]], param))
    if len(prompts) > MAX_PROMPTS:
        raise invalid(param, f"{param} may hold at most {MAX_PROMPTS} prompts.")
    if not all(prompts):
        raise invalid(param, f"{param} must not be empty.")
    return prompts


def _checked(value: Any, kind: type[T], param: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        message = f"{param} must be a string, a list of strings, a list of token ids, or a list of such lists."
        raise invalid(param, message) from None


def encode_prompts(text: ModelText, prompts: list[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
    """All prompts as token ids."""
    encode = text.tokenizer.encode
    return [encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt for prompt in prompts]


# ------------------------------------------------------------------------------------------------------------ chat


def num_message_chars(messages: list[Message]) -> int:
    """Of all text that the template will see, roughly."""
    num_chars = 0
    for message in messages:
        if isinstance(message.content, str):
            num_chars += len(message.content)
        else:
            num_chars += sum(len(part.text or "") for part in message.content or [])
        if message.tool_calls:
            num_chars += len(msgspec.json.encode(message.tool_calls))
    return num_chars


def template_messages(messages: list[Message], knows_developer: bool) -> list[dict[str, Any]]:
    """The messages as templates expect them: content as one string, tool arguments as objects."""
    return [_template_message(message, f"messages[{i}]", knows_developer) for i, message in enumerate(messages)]


def _template_message(message: Message, param: str, knows_developer: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" and not knows_developer else message.role
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_part_text(part, f"{param}.content[{i}]") for i, part in enumerate(content))
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise invalid(f"{param}.content", f"{param}.content is required.")
    result: dict[str, Any] = {"role": role, "content": "" if content is None else content}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        result["tool_calls"] = [_tool_call(call, f"{param}.tool_calls") for call in message.tool_calls]
    return result


def _part_text(part: Any, param: str) -> str:
    if part.type not in ("text", "input_text", "refusal"):
        raise invalid(f"{param}.type", f"{param}.type: only text parts are supported.", "unsupported_parameter")
    if part.text is None:
        raise invalid(f"{param}.text", f"{param}.text is required.")
    return str(part.text)


def _tool_call(call: dict[str, Any], param: str) -> dict[str, Any]:
    """OpenAI writes a call's arguments as a JSON string; templates want the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(param, f"{param}: a call needs a function with a name.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            raise invalid(param, f"{param}: a function's arguments are not valid JSON.") from None
    if depth_of(arguments, _MAX_TOOL_DEPTH) > _MAX_TOOL_DEPTH:
        raise invalid(param, f"{param}: a function's arguments are nested deeper than {_MAX_TOOL_DEPTH}.")
    return {**call, "function": {**function, "arguments": arguments}}


def depth_of(value: Any, most: int, depth: int = 0) -> int:
    """How deep lists and objects lie in each other; counted up to one more than `most`."""
    if depth > most or not isinstance(value, dict | list):
        return depth
    children = value.values() if isinstance(value, dict) else value
    return max((depth_of(child, most, depth + 1) for child in children), default=depth + 1)


def template_variables(fields: ChatRequest, text: ModelText) -> dict[str, Any]:
    """chat_template_kwargs, if all of them are allowed, and reasoning_effort, if the template knows it."""
    variables: dict[str, Any] = dict(fields.chat_template_kwargs or {})
    for name in variables:
        if name not in _TEMPLATE_VARIABLES:
            allowed = ", ".join(sorted(_TEMPLATE_VARIABLES))
            raise invalid("chat_template_kwargs", f"chat_template_kwargs may only set {allowed}.")
    if fields.reasoning_effort is not None:
        if text.template is None or not text.template.mentions("reasoning_effort"):
            raise unsupported("reasoning_effort")
        variables.setdefault("reasoning_effort", fields.reasoning_effort)
    return variables


def render_chat(
    text: ModelText,
    model: ModelCard,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: dict[str, Any],
    tools: list[dict[str, Any]] | None = None,
    add_special_tokens: bool = False,
) -> list[int]:
    """A chat's prompt as token ids. Slow: call it in a thread. Raises ApiError."""
    if text.template is None:
        raise invalid("messages", "This model has no chat template; use /v1/completions.")
    try:
        prompt = text.template.render(
            messages,
            max_chars=model.max_model_len * MAX_CHARS_A_TOKEN,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
            tools=tools,
        )
    except ChatTemplateError as error:
        raise invalid("messages", f"messages: {error}.") from None
    token_ids = text.tokenizer.encode(prompt, add_special_tokens)
    if not token_ids:
        raise invalid("messages", "messages: the rendered prompt is empty.")
    return token_ids


def check_chat_flags(add_generation_prompt: bool | None, continue_final_message: bool | None) -> tuple[bool, bool]:
    """The two flags with their defaults; asking for both is a 400."""
    if add_generation_prompt and continue_final_message:
        message = "continue_final_message and add_generation_prompt cannot both be true."
        raise invalid("continue_final_message", message)
    return add_generation_prompt is not False and not continue_final_message, bool(continue_final_message)


def chat_logprobs(request: ChatRequest) -> int | None:
    """How many logprobs the worker is asked for."""
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true.")
    return (request.top_logprobs or 0) if request.logprobs else None
