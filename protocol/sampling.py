"""SamplingParams: how tokens are chosen. The one definition, used by gateway and worker alike."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARS = 64 * 1024

Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
TokenId = Annotated[int, Meta(ge=0)]


class Grammar(Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer is held to, as its source: it is compiled where the tokens are chosen."""

    kind: Literal["json_schema", "regex", "grammar"]  # grammar: llguidance's Lark, or GBNF
    source: Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the tokens of one sequence are chosen, and when it ends.

    The order of application is: logit_bias, penalties, min_tokens mask, temperature, top_k, top_p, min_p.
    A stop *string* is the gateway's business; the worker knows token ids only.
    """

    max_tokens: Annotated[int, Meta(ge=1)]
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 1.0  # 0 is greedy
    top_k: Annotated[int, Meta(ge=0)] = 0  # 0 keeps every token
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None  # None: the worker draws one
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_LOGIT_BIAS)
    ] = {}
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] = []
    ignore_eos: bool = False
    # None: no logprobs. k: the chosen token's logprob and those of the k likeliest, of the raw distribution.
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    # The same for every token of the prompt but the first, which nothing comes before.
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    grammar: Grammar | None = None
