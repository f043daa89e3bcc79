"""config.json: what is served is read as transformers reads it, what is not is refused by its key."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import FAMILIES
from worker.layers.rotary_embedding import inverse_frequencies
from worker.model_config import ModelConfig, ModelError


def read(tmp_path: Path, **keys: Any) -> ModelConfig:
    config = {key: value for key, value in (FAMILIES["llama2"] | keys).items() if value != "left out"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ModelConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM; served are LlamaForCausalLM"),
        ({"architectures": []}, "architectures is empty"),
        ({"architectures": None}, r"architectures"),
        ({"hidden_size": "64"}, r"hidden_size"),
        ({"hidden_size": "left out"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_parameters.rope_type dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds sliding_attention"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8},
            "use_sliding_window",
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window"),
    ],
)
def test_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, **keys)


def test_a_directory_without_config_or_with_no_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelConfig.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.read(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_rotary_frequencies_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[family]))
    config, oracle = ModelConfig.read(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert config.num_kv_heads == oracle.num_key_value_heads
    assert config.head_dim == (getattr(oracle, "head_dim", None) or oracle.hidden_size // oracle.num_attention_heads)
    assert config.rms_norm_eps == oracle.rms_norm_eps
    frequencies = LlamaRotaryEmbedding(oracle).inv_freq
    torch.testing.assert_close(inverse_frequencies(config.rope, config.head_dim), frequencies, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_missing_keys_mean_what_they_mean_to_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    missing = {"num_key_value_heads", "max_position_embeddings", "sliding_window", "head_dim", "rms_norm_eps"}
    keys = {key: value for key, value in FAMILIES[family].items() if key not in missing}
    (tmp_path / "config.json").write_text(json.dumps(keys | {"num_attention_heads": 32, "hidden_size": 128}))
    config, oracle = ModelConfig.read(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert config.num_kv_heads == oracle.num_key_value_heads
    assert config.max_position_embeddings == oracle.max_position_embeddings
    assert config.sliding_window == oracle.sliding_window
    assert config.rms_norm_eps == oracle.rms_norm_eps
    assert config.head_dim == (getattr(oracle, "head_dim", None) or 4)


def test_end_of_text_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (2, 5)
    assert read(tmp_path, eos_token_id=[7]).eos_token_ids == (2, 5, 7)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == (2, 5)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read(tmp_path)
