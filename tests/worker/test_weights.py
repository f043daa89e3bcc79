"""Loading: every tensor of a checkpoint is accounted for, and nothing keeps its files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import write_tiny_model
from worker import weight_copier
from worker.model_config import ModelError
from worker.weights import load_model

CPU = torch.device("cpu")


def change(model_dir: Path, changes: dict[str, Tensor | None]) -> None:
    """Rewrites the checkpoint with tensors replaced, added or (None) left out."""
    file = model_dir / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama2", {"model.norm.weight": None}, "lacks the tensor model.norm.weight"),
        ("llama2", {"lm_head.weight": None}, "lacks the tensor lm_head.weight"),
        ("qwen2", {"model.layers.1.self_attn.k_proj.bias": None}, "lacks the tensor model.layers.1.self_attn.k_proj"),
        ("qwen3", {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, r"q_norm.weight has shape \[16\] where"),
        ("llama2", {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 112)}, r"up_proj.weight has shape \[64, 112\]"),
        ("llama2", {"model.layers.0.mlp.up_proj.bias": torch.ones(112)}, "unexpected tensors, the first is model.lay"),
        ("llama2", {"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, "unexpected"),
        ("llama2", {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "model.norm.weight is of type I8"),
        ("smollm", {"lm_head.weight": torch.ones(320, 48)}, "tie_word_embeddings is true but lm_head.weight differs"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Tensor | None], message: str
) -> None:
    write_tiny_model(tmp_path, family)
    change(tmp_path, changes)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, torch.float32, CPU)


def test_known_leftovers_are_no_error(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "smollm")
    embed = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()
    change(tmp_path, {"lm_head.weight": embed, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    model, _ = load_model(tmp_path, torch.float32, CPU)
    assert model.lm_head is model.embed_tokens


def test_shards_progress_and_independence_of_the_files(tmp_path: Path) -> None:
    whole, _ = load_model(write_tiny_model(tmp_path / "whole", "qwen3"), torch.float32, CPU)
    sharded_dir = write_tiny_model(tmp_path / "sharded", "qwen3", num_shards=3)
    seen: list[tuple[int, int]] = []
    sharded, _ = load_model(sharded_dir, torch.float32, CPU, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(file.stat().st_size for file in sharded_dir.glob("*.safetensors"))
    for file in sharded_dir.glob("*.safetensors"):
        with file.open("r+b") as stream:  # in place: a mapped tensor would change with it
            stream.write(b"\0" * file.stat().st_size)
    assert torch.equal(whole.lm_head, sharded.lm_head)
    assert torch.equal(whole.layers[1].attention.qkv_proj.weight, sharded.layers[1].attention.qkv_proj.weight)


def test_tensors_larger_than_a_piece_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path, "qwen2")
    stored = load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr(weight_copier, "PIECE_BYTES", 1000)
    model, _ = load_model(tmp_path, torch.float32, CPU)
    assert torch.equal(model.embed_tokens, stored["model.embed_tokens.weight"])
    parts = [stored[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(model.layers[1].attention.qkv_proj.weight, torch.cat(parts))


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    file.write_bytes(bytes(40))
    copier = weight_copier.WeightCopier(CPU)
    copier.copy(file, 8, torch.float32, torch.empty(8))
    assert list(copier.finish()) == [32]
    copier.copy(file, 12, torch.float32, torch.empty(8))
    with pytest.raises(OSError, match="ends early"):
        list(copier.finish())
    copier.close()
    copier.close()


def test_dtype_is_converted(tmp_path: Path) -> None:
    model, _ = load_model(write_tiny_model(tmp_path), torch.bfloat16, CPU)
    assert {model.embed_tokens.dtype, model.layers[0].mlp.gate_up_proj.weight.dtype} == {torch.bfloat16}


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="model-00001-of-00002.safetensors is not a valid"):
        load_model(tmp_path, torch.float32, CPU)
    shard.unlink()
    with pytest.raises(ModelError, match="has no file model-00001-of-00002.safetensors"):
        load_model(tmp_path, torch.float32, CPU)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="has no file"):
        load_model(tmp_path, torch.float32, CPU)
    index.write_text("[]")
    with pytest.raises(ModelError, match="is not a weight index"):
        load_model(tmp_path, torch.float32, CPU)
    index.unlink()
    with pytest.raises(ModelError, match=r"has no file model\.safetensors"):
        load_model(tmp_path, torch.float32, CPU)
