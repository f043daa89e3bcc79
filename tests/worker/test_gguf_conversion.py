"""The conversion on a tiny GGUF file: weights, config and tokenizer are those that went in."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from worker.gguf_conversion import UnsupportedGGUF, convert_gguf

CONFIG = LlamaConfig(
    vocab_size=265,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def byte_tokens() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]


def permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q and k as GGUF keeps them."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(265)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    merges = ["a b", "ab c", "Ġ a", "1 2"]
    writer.add_token_list(CONTROL + byte_tokens() + ["ab", "abc", "Ġa", "12", "pad1", "pad2"])
    writer.add_token_types([3] * 3 + [1] * 262)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = model.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].half().numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(CONFIG.num_hidden_layers):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = permuted(weight, 4 if theirs == "attn_q" else 2)
            data = weight.contiguous().numpy()
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", data, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for parameter in model.parameters():  # values that bfloat16 and float16 hold exactly
        parameter.data = torch.randint(-8, 9, parameter.shape) / 16
    return model


@pytest.fixture(scope="module")
def converted(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    convert_gguf(write_gguf(directory / "model.gguf", model), directory)
    return directory


def test_weights_and_config_are_what_went_in(converted: Path, model: LlamaForCausalLM) -> None:
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    found = load_file(converted / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name].float(), tensor), name
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert (config["rms_norm_eps"], config["rope_theta"], config["num_key_value_heads"]) == (1e-5, 100000.0, 2)
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize("text", ["abc a", "tab 12\n\tabcabc", "naïve — 漢字 🙂", "  a  b  ", "don't 1999"])
def test_the_tokenizer_round_trips(text: str, converted: Path) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_tokenizer_knows_merges_digits_and_control_tokens(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("abc a12") == ["abc", "Ġa", "1", "2"]  # digits are never merged
    assert tokenizer("<|im_start|>abc<|im_end|>")["input_ids"] == [1, tokenizer.convert_tokens_to_ids("abc"), 2]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.decode([1, 2], skip_special_tokens=True) == ""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False)
    assert chat == "<|im_start|>abc<|im_end|>"


def test_another_kind_of_file_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedGGUF, match=r"tokenizer\.ggml\.pre is 'llama-bpe'"):
        convert_gguf(write_gguf(tmp_path / "model.gguf", model, pre="llama-bpe"), tmp_path)
