"""adapter_config.json: what is refused, and that the answer names the key."""

import dataclasses
import json
from typing import Any

import msgspec
import pytest
from peft import LoraConfig

from protocol.errors import ErrorCode
from tests.worker.adapter_files import config
from worker.adapter_config import MUST_BE_OFF, AdapterConfig, AdapterError, parse_config


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"r": 0}, r"\$.r"),
        ({"r": -1}, r"\$.r"),
        ({"r": "8"}, r"\$.r"),
        ({"r": True}, r"\$.r"),
        ({"r": 10**30}, r"\$.r"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": -16}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ""}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"use_something_new": True}, "use_something_new"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "not_made_yet"}, "init_lora_weights 'not_made_yet' .* is not known"),
    ],
)
def test_a_refusal_names_the_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(AdapterError, match=key) as refused:
        parse_config(json.dumps(config(**changes)).encode())
    assert refused.value.error.code is ErrorCode.ADAPTER_INVALID


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\x80\x04K\x01.",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        json.dumps(config(lora_alpha=float("nan"))).encode(),
        json.dumps(config(lora_alpha=float("inf"))).encode(),
        json.dumps(config()).replace('"lora_alpha": 8', '"lora_alpha": 1e999').encode(),
    ],
)
def test_what_is_no_config_is_refused(data: bytes) -> None:
    with pytest.raises(AdapterError) as refused:
        parse_config(data)
    assert refused.value.error.code is ErrorCode.ADAPTER_INVALID


# What PEFT's LoraConfig has besides, and why it changes nothing here.
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),  # where it came from
    *("inference_mode", "lora_dropout", "runtime_config"),  # of training, or of PEFT's own process
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of initialisations; see init_lora_weights
    *("megatron_config", "megatron_core", "qalora_group_size"),  # of layers or switches that there are not
    "fan_in_fan_out",  # of bases stored transposed
}


def test_every_key_that_peft_knows_is_served_or_refused_or_harmless() -> None:
    """A new PEFT with a new key fails here, so that nobody's adapter is half applied in silence."""
    served = {field.encode_name for field in msgspec.structs.fields(AdapterConfig)}
    written = {field.name for field in dataclasses.fields(LoraConfig)}
    assert written - served - set(MUST_BE_OFF) - HARMLESS == set()
    assert not served & HARMLESS and not set(MUST_BE_OFF) & (served | HARMLESS)


def test_what_peft_writes_by_default_is_taken() -> None:
    harmless = {
        "base_model_name_or_path": "x/y",
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "loftq_config": {},
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "fan_in_fan_out": True,
        "use_dora": False,
        "trainable_token_indices": None,
        "rank_pattern": {},
        "alpha_pattern": {"q_proj": 3.5},
    }
    parsed = parse_config(json.dumps(config(**harmless)).encode())
    assert parsed.r == 4 and parsed.lora_alpha == 8 and parsed.alpha_pattern == {"q_proj": 3.5}
