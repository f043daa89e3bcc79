"""adapter_config.json of a PEFT LoRA by a typed schema; keys that would change the result unserved are refused."""

import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from protocol.errors import Error, ErrorCode

CONFIG_FILE = "adapter_config.json"

Rank = Annotated[int, Meta(ge=1, le=65536)]
Alpha = Annotated[float, Meta(gt=0)]
LayerIndex = Annotated[int, Meta(ge=0)]

# Keys that change what an adapter computes. Each must be absent, null, false or an empty list; an empty object is to
# PEFT a configuration with its defaults. (fan_in_fan_out is not among them: it is about bases that store their weights
# transposed, and PEFT itself ignores it on linear layers.)
MUST_BE_OFF = [
    "alora_invocation_tokens",
    "arrow_config",
    "auto_map",
    "custom_code",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
]
# Why, where it is not plain from the name.
REASONS = {
    "lora_bias": " (biases are not applied)",
    "modules_to_save": " (whole modules are not replaced, only low-rank changes are applied)",
    "trainable_token_indices": " (the embeddings are the base model's)",
}
# Initialisations that leave the base's weights alone. All others change them too, so that such an adapter is wrong on
# the plain base, or came after this was written.
HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica"}


class AdapterError(Exception):
    """An adapter cannot be loaded; `error` is for the user."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.error = error


def invalid(message: str, param: str = "lora_path") -> AdapterError:
    """The adapter's content is refused."""
    return AdapterError(Error(ErrorCode.ADAPTER_INVALID, message, param))


def beyond_limit(message: str, param: str = "lora_path") -> AdapterError:
    """The adapter is larger than this worker takes."""
    return AdapterError(Error(ErrorCode.ADAPTER_LIMIT, message, param))


class AdapterConfig(Struct, frozen=True, kw_only=True):
    """The keys of adapter_config.json that say what a LoRA computes."""

    peft_type: str
    r: Rank
    lora_alpha: Alpha
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    layers_to_transform: list[LayerIndex] | LayerIndex | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True


def parse_config(data: bytes) -> AdapterConfig:
    """The config in these bytes. Raises AdapterError naming the key that is wrong or not served."""
    try:
        keys = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise invalid(f"{CONFIG_FILE} is not a JSON object (NaN and Infinity are not JSON either)") from None
    if keys.get("peft_type") != "LORA":
        raise invalid(f"{CONFIG_FILE}: peft_type must be LORA")
    for name in _switched_on(keys):
        raise invalid(f"{CONFIG_FILE}: {name} is set, which is not supported{REASONS.get(name, '')}")
    try:
        config = msgspec.convert(keys, AdapterConfig)
    except (msgspec.ValidationError, RecursionError) as error:
        raise invalid(f"{CONFIG_FILE}: {str(error)[:200]}") from None
    _check(config)
    return config


def _switched_on(keys: dict[str, Any]) -> list[str]:
    """The keys that are set and must not be: the known ones, and any unknown one that switches something on."""
    known = {field.encode_name for field in msgspec.structs.fields(AdapterConfig)}
    unknown_switches = [name for name in keys if name.startswith("use_") and name not in known]
    return [name for name in sorted({*MUST_BE_OFF, *unknown_switches}) if keys.get(name) not in (None, False, [])]


def _check(config: AdapterConfig) -> None:
    if config.bias != "none":
        raise invalid(f"{CONFIG_FILE}: bias must be none, others are not supported")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in HARMLESS_INITS:
        raise invalid(
            f"{CONFIG_FILE}: init_lora_weights {init[:20]!r} changes the base model, or is not known;"
            " convert the adapter to a plain LoRA when saving it"
        )
    if not math.isfinite(config.lora_alpha) or not all(map(math.isfinite, (config.alpha_pattern or {}).values())):
        raise invalid(f"{CONFIG_FILE}: lora_alpha and the values of alpha_pattern must be finite")
    if not config.target_modules:
        raise invalid(f"{CONFIG_FILE}: target_modules is empty")
    has_layers = config.layers_to_transform is not None
    if has_layers and isinstance(config.target_modules, str):
        raise invalid(f"{CONFIG_FILE}: layers_to_transform needs a list of target_modules")
    if config.layers_pattern and not has_layers:
        raise invalid(f"{CONFIG_FILE}: layers_pattern needs layers_to_transform")
