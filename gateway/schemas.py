"""The JSON bodies that clients send, as typed Structs, and the one rule for every field.

A field is one of four kinds:
  served       a field of the route's Struct. `null` means the same as leaving it out; a wrong type or value is a 400.
  refused      listed in _REFUSED: a known field that would change the answer and cannot be served. Used, it is a 400
               with code unsupported_parameter; a value that asks for nothing (null, false, an empty list) is accepted.
  bookkeeping  listed in _BOOKKEEPING: does not change the answer; ignored.
  unknown      anything else: ignored, with a line in the debug log.
"""

import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.errors import ApiError, invalid, unsupported
from protocol.messages import MAX_MIX, MAX_MIX_WEIGHT
from protocol.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, Penalty, TokenId

logger = logging.getLogger(__name__)

MAX_STOPS = 16
MAX_MESSAGES = 4096
MAX_PROMPTS = 1024  # in one request
MAX_TOOLS = 128
MAX_CHOICE = 1024  # texts to choose from

StopString = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
NumChoices = Annotated[int, Meta(ge=1)]
NumTokens = Annotated[int, Meta(ge=1)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]],
    Meta(max_length=MAX_LOGIT_BIAS),
]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
CacheSalt = Annotated[str, Meta(max_length=128)]
Weight = Annotated[float, Meta(ge=-MAX_MIX_WEIGHT, le=MAX_MIX_WEIGHT)]


class WeightedAdapter(Struct, forbid_unknown_fields=True):
    """One adapter of a mix: what it adds to the base model counts `weight` times, 1 if that is left out."""

    name: str
    weight: Weight | None = None


MixFields = Annotated[list[WeightedAdapter], Meta(min_length=1, max_length=MAX_MIX)]


class StreamOptions(Struct, frozen=True):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Struct):
    """OpenAI's json_schema. Answers are held to it, strict or not."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """What form the answer takes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct):
    """vLLM's way to ask for it; exactly one of these."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: Annotated[str, Meta(min_length=1)] | None = None
    choice: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=MAX_CHOICE)] | None = None
    grammar: Annotated[str, Meta(min_length=1)] | None = None


class SamplingFields(Struct, kw_only=True):
    """The fields that the two OpenAI routes share."""

    model: Annotated[str, Meta(min_length=1)]
    max_tokens: NumTokens | None = None
    n: NumChoices | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    logit_bias: LogitBias | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: CacheSalt | None = None
    lora_path: str | MixFields | None = None
    lora_scale: Weight | None = None  # of the adapter, or of all of the mix
    service_tier: Literal["auto", "default"] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class ContentPart(Struct):
    """A part of a message's content; only text is served."""

    type: str
    text: str | None = None


class Message(Struct):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionSpec(Struct):
    """A function that the model may call; its parameters are a JSON schema."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[A-Za-z0-9_.-]+\Z")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec


class ChatRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    max_tokens: Annotated[int, Meta(ge=0)] | None = None  # 0: the prompt is scored, nothing is generated
    best_of: NumChoices | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None


class NativeSampling(Struct):
    """SGLang's sampling_params."""

    max_new_tokens: NumTokens | None = None
    min_new_tokens: Annotated[int, Meta(ge=0)] | None = None
    n: NumChoices | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    sampling_seed: Seed | None = None


class NativeRequest(Struct, kw_only=True):
    """POST /generate, SGLang's own route."""

    text: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_PROMPTS)] | None = None
    input_ids: Annotated[list[Any], Meta(min_length=1)] | None = None
    sampling_params: NativeSampling | Annotated[list[NativeSampling], Meta(max_length=MAX_PROMPTS)] | None = None
    # For each prompt, or for all: a name, a mix or null. Entries that are objects are one mix for all.
    lora_path: str | Annotated[list[str | WeightedAdapter | MixFields | None], Meta(max_length=MAX_PROMPTS)] | None = (
        None
    )
    lora_scale: Weight | None = None
    stream: bool | None = None


class TokenizeRequest(Struct, kw_only=True):
    """POST /tokenize, as vLLM's: of a prompt, or of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """POST /detokenize, as vLLM's."""

    tokens: list[TokenId]
    model: str | None = None


class LoadRequest(Struct, kw_only=True):
    """POST /load_lora_adapter (SGLang: pinned) and /v1/load_lora_adapter (vLLM: load_inplace)."""

    lora_name: str
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    pinned: bool | None = None
    load_inplace: bool | None = None


class UnloadRequest(Struct, kw_only=True):
    """POST /unload_lora_adapter and /v1/unload_lora_adapter."""

    lora_name: str


T = TypeVar("T", bound=Struct)

_MAX_PROBLEM = 200  # characters
_raw_decoder = msgspec.json.Decoder(dict[str, Raw])
_UNUSED = frozenset([b"null", b"false", b"[]", b"{}", b'""'])

# Refused fields, with the values besides _UNUSED that ask for nothing.
_REFUSED: dict[str, frozenset[bytes]] = {
    name: frozenset(values)
    for names, values in [
        ("tools functions audio web_search_options suffix documents chat_template prompt_logprobs prompt_embeds", []),
        ("guided_json guided_regex guided_choice guided_grammar guided_decoding_backend", []),
        ("use_beam_search bad_words allowed_token_ids truncate_prompt_tokens logprob_token_ids stop_regex", []),
        ("regex ebnf json_schema structural_tag response_format kv_transfer_params custom_logit_processor", []),
        ("return_token_ids return_tokens_as_token_ids return_logprob return_hidden_states", []),
        ("input_embeds image_data video_data audio_data session_params return_text_in_logprobs", []),
        ("store moderation vllm_xargs", []),
        ("tool_choice function_call", [b'"none"']),
        ("modalities", [b'["text"]']),
        ("length_penalty best_of", [b"1", b"1.0"]),
        ("priority", [b"0"]),
        ("verbosity", [b'"medium"']),
        ("spaces_between_special_tokens", [b"true"]),
    ]
    for name in names.split()
}
REFUSED_NAMES = tuple(sorted(_REFUSED))
_BOOKKEEPING = frozenset(
    ["user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "parallel_tool_calls"]
    + [
        "prediction",
        "request_id",
        "session_id",
        "rid",
        "stream_interval",
        "truncation_side",
        "logprob_start_len",
        "top_logprobs_num",
    ]
)


def body_decoder(kind: type[T]) -> Callable[[bytes], T]:
    """The reader of one route's bodies. It raises ApiError: a 400 that names the field."""
    decoder = msgspec.json.Decoder(kind)
    known = frozenset(field.name for field in msgspec.structs.fields(kind))

    def decode(body: bytes) -> T:
        try:
            value = decoder.decode(body)
            present = _raw_decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _field_error(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise invalid(None, "The body is not valid JSON.") from None
        check_other_fields(present, known)
        return value

    return decode


def check_other_fields(present: dict[str, Raw], known: frozenset[str]) -> None:
    """Applies the rule above to the fields that the Struct does not have."""
    for name in present.keys() - known:
        if name in _REFUSED:
            value = bytes(present[name])
            if value not in _UNUSED and value not in _REFUSED[name]:
                raise unsupported(name)
        elif name not in _BOOKKEEPING:
            logger.debug("ignored the unknown field %.64r", name)


def _field_error(text: str) -> ApiError:
    """msgspec's message, "Expected `int`, got `str` - at `$.n`", in a user's words."""
    problem, _, path = text.partition(" - at ")
    param = path.replace("`key` in ", "").strip("`").removeprefix("$").removeprefix(".") or None
    if param is None and (missing := problem.partition("missing required field `")[2]):
        param = missing.rstrip("`")
        return invalid(param, f"{param} is required.")
    words = problem[:1].lower() + problem[1:_MAX_PROBLEM].replace("`", "")  # it may repeat what was sent
    return invalid(param, f"{param or 'The body'}: {words}.")
