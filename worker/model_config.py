"""ModelConfig: what config.json says of the base model, checked. Only listed architectures are served."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from worker.chunk_layout import ChunkLayout


class ModelError(Exception):
    """The model's files cannot be served. The message names the file and the key or tensor."""


class RopeParameters(msgspec.Struct, frozen=True):
    """Rotary position parameters as config.json spells them, in rope_scaling or rope_parameters."""

    rope_type: str | None = None
    type: str | None = None  # the older spelling of rope_type
    rope_theta: float | None = None
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"


class HfConfig(msgspec.Struct, frozen=True):
    """The keys of config.json that matter. Other keys are not read."""

    architectures: list[str]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    hidden_act: str = "silu"
    rope_interleaved: bool = False
    partial_rotary_factor: float = 1.0
    quantization_config: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: the base, and how "linear" and "llama3" stretch its wavelengths."""

    theta: float
    kind: str = "default"  # default, linear, llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0  # this and the next two: llama3 only
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-shaped decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # the longest context, tokens
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k
    sliding_window: int | None  # a token sees this many last tokens, itself included
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the checkpoint, as config.json has it; "" when it says nothing

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def chunk_layout(self) -> ChunkLayout:
        """The layout of this model's adapter chunks."""
        return ChunkLayout.of(
            self.num_layers,
            self.hidden_size,
            self.q_size,
            self.kv_size,
            self.intermediate_size,
            self.vocab_size,
            self.tie_word_embeddings,
        )

    @classmethod
    def read(cls, model_dir: Path) -> "ModelConfig":
        """The config of a model directory. Raises ModelError naming the key that cannot be served."""
        try:
            keys = msgspec.json.decode((model_dir / "config.json").read_bytes(), type=dict[str, Any])
            raw = msgspec.convert(_defaults(keys) | keys, HfConfig)
        except FileNotFoundError:
            raise ModelError("the model directory has no config.json") from None
        except msgspec.MsgspecError as error:
            raise ModelError(f"config.json: {error}") from None
        return _checked(raw, _generation_eos(model_dir))


# The served architectures, each with what a missing key of its config.json means where it is not HfConfig's default.
ARCHITECTURES: dict[str, dict[str, int]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}


def _defaults(keys: dict[str, Any]) -> dict[str, int]:
    names = keys.get("architectures")
    return ARCHITECTURES.get(str(names[0]), {}) if isinstance(names, list) and names else {}


def _generation_eos(model_dir: Path) -> tuple[int, ...]:
    """The end-of-text tokens of generation_config.json, which instruct models often have more of there."""
    path = model_dir / "generation_config.json"
    if not path.exists():
        return ()
    try:
        return _ids(json.loads(path.read_bytes()).get("eos_token_id"))
    except (ValueError, TypeError, AttributeError):
        raise ModelError("generation_config.json: eos_token_id must be a token id or a list of them") from None


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(map(int, value)) if isinstance(value, list) else (int(value),)


def _checked(raw: HfConfig, generation_eos: tuple[int, ...]) -> ModelConfig:
    architecture = _architecture(raw)
    is_llama, is_qwen2 = architecture == "LlamaForCausalLM", architecture == "Qwen2ForCausalLM"
    has_bias_switch = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    rope = _rope(raw)
    _refuse_unsupported(raw, architecture)
    num_kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    head_dim = raw.head_dim or raw.hidden_size // raw.num_attention_heads
    _check_sizes(raw, num_kv_heads, head_dim)
    return ModelConfig(
        architecture=architecture,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=raw.max_position_embeddings,
        rms_norm_eps=raw.rms_norm_eps,
        rope=rope,
        tie_word_embeddings=raw.tie_word_embeddings,
        qkv_bias=is_qwen2 or (has_bias_switch and raw.attention_bias),
        o_bias=has_bias_switch and raw.attention_bias,
        mlp_bias=is_llama and raw.mlp_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=raw.sliding_window if architecture == "MistralForCausalLM" else None,
        eos_token_ids=tuple(sorted({*_ids(raw.eos_token_id), *generation_eos})),
        dtype=raw.dtype or raw.torch_dtype or "",
    )


def _architecture(raw: HfConfig) -> str:
    if len(raw.architectures) == 1 and raw.architectures[0] in ARCHITECTURES:
        return raw.architectures[0]
    given, served = ", ".join(raw.architectures) or "empty", ", ".join(ARCHITECTURES)
    raise ModelError(f"config.json: architectures is {given}; served are {served}")


def _refuse_unsupported(raw: HfConfig, architecture: str) -> None:
    """Refuses each key that changes what the model computes and is not implemented."""
    if raw.hidden_act != "silu":
        raise ModelError(f"config.json: hidden_act is {raw.hidden_act}; only silu is supported")
    if raw.quantization_config is not None:
        raise ModelError("config.json: quantization_config is set; quantized weights are not supported")
    if raw.rope_interleaved:
        raise ModelError("config.json: rope_interleaved is not supported")
    if raw.partial_rotary_factor != 1.0:
        raise ModelError("config.json: partial_rotary_factor other than 1 is not supported")
    if raw.use_sliding_window and architecture != "MistralForCausalLM":
        raise ModelError("config.json: use_sliding_window is not supported")
    others = {kind for kind in raw.layer_types or [] if kind != "full_attention"}
    if others and not (architecture == "MistralForCausalLM" and others == {"sliding_attention"}):
        raise ModelError(f"config.json: layer_types holds {', '.join(sorted(others))}, which is not supported")


def _check_sizes(raw: HfConfig, num_kv_heads: int, head_dim: int) -> None:
    sizes = {
        "vocab_size": raw.vocab_size,
        "hidden_size": raw.hidden_size,
        "intermediate_size": raw.intermediate_size,
        "num_hidden_layers": raw.num_hidden_layers,
        "num_attention_heads": raw.num_attention_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": raw.max_position_embeddings,
    }
    for key, size in sizes.items():
        if size < 1:
            raise ModelError(f"config.json: {key} must be positive, not {size}")
    if raw.num_attention_heads % num_kv_heads:
        raise ModelError("config.json: num_attention_heads must be a multiple of num_key_value_heads")
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim must be even, not {head_dim}")
    if raw.sliding_window is not None and raw.sliding_window < 1:
        raise ModelError("config.json: sliding_window must be positive or null")


def _rope(raw: HfConfig) -> Rope:
    """transformers 5 writes rope_parameters, with rope_theta inside; before, rope_scaling beside rope_theta."""
    key = "rope_parameters" if raw.rope_parameters is not None else "rope_scaling"
    given = raw.rope_parameters or raw.rope_scaling or RopeParameters()
    theta = given.rope_theta or raw.rope_theta or 10000.0
    if given.partial_rotary_factor != 1.0:
        raise ModelError(f"config.json: {key}.partial_rotary_factor other than 1 is not supported")
    if given.kind == "default":
        return Rope(theta)
    if given.kind == "linear":
        return Rope(theta, "linear", given.factor)
    if given.kind != "llama3":
        raise ModelError(f"config.json: {key}.rope_type {given.kind} is not supported; default, linear and llama3 are")
    low, high, original = given.low_freq_factor, given.high_freq_factor, given.original_max_position_embeddings
    if low is None or high is None or original is None or low == high:
        raise ModelError(
            f"config.json: {key} of type llama3 needs low_freq_factor, high_freq_factor (different) and "
            "original_max_position_embeddings"
        )
    return Rope(theta, "llama3", given.factor, low, high, original)
