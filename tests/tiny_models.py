"""Tiny random models of each served family, written as config.json and safetensors, as a hub checkpoint has them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _config(architecture: str, model_type: str, **keys: Any) -> dict[str, Any]:
    return _BASE | {"architectures": [architecture], "model_type": model_type} | keys


# Name -> config.json. Head sizes 16, 24, 32 and 80; grouped and plain multi-head; tied and not.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": _config("LlamaForCausalLM", "llama", num_key_value_heads=4),
    "llama3": _config("LlamaForCausalLM", "llama", rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE, head_dim=24),
    "llama3_new_spelling": _config(
        "LlamaForCausalLM",
        "llama",
        rope_parameters=_LLAMA3_ROPE | {"rope_theta": 500000.0},
        tie_word_embeddings=True,
        dtype="float32",
    ),
    "llama_biased": _config(
        "LlamaForCausalLM",
        "llama",
        attention_bias=True,
        mlp_bias=True,
        rope_scaling={"type": "linear", "factor": 4.0},
        num_key_value_heads=1,
    ),
    "smollm": _config("LlamaForCausalLM", "llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    | {"tie_word_embeddings": True},
    "mistral": _config("MistralForCausalLM", "mistral", head_dim=80, sliding_window=None),
    "mistral_window": _config("MistralForCausalLM", "mistral", sliding_window=7),
    "qwen2": _config(
        "Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True, sliding_window=32, use_sliding_window=False
    ),
    "qwen3": _config("Qwen3ForCausalLM", "qwen3", head_dim=24, rope_theta=1000000.0),
    "qwen3_biased": _config("Qwen3ForCausalLM", "qwen3", head_dim=32, attention_bias=True, tie_word_embeddings=True),
}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, float32, with weights large enough that answers vary."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)

    hidden, vocab = config["hidden_size"], config["vocab_size"]
    # Small beside what the layers add, so that even a tied model does not just repeat its input.
    weights = {"model.embed_tokens.weight": normal(vocab, hidden) * 0.1}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in layer_shapes(config).items():
            weights[f"model.layers.{layer}.{name}"] = normal(*shape) + (1.0 if "norm" in name else 0.0)
    weights["model.norm.weight"] = normal(hidden) + 1
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(vocab, hidden)
    return weights


def layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer, named within it, in the order of MODULES."""
    hidden, intermediate, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    biased = {name for name in linears if config.get("mlp_bias" if name.startswith("mlp") else "attention_bias")}
    if config["model_type"] == "qwen2":
        biased |= {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": linears[name][:1] for name in sorted(biased)}
    shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    return shapes


def write_tiny_model(model_dir: Path, family: str = "smollm", num_shards: int = 1, seed: int = 0, **keys: Any) -> Path:
    """Write a tiny model of a family of FAMILIES into model_dir (made if absent); keys override its config."""
    config = FAMILIES[family] | keys
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(config))
    weights = tensors(config, seed)
    if num_shards == 1:
        save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
        return model_dir
    names = list(weights)
    weight_map = {name: f"model-{1 + i % num_shards:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        shard = {name: weights[name] for name in names if weight_map[name] == file}
        save_file(shard, model_dir / file, metadata={"format": "pt"})
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model_dir
