"""Makes on disk what a serving benchmark needs: a model of random weights, its tokenizer, and PEFT adapters for it.

    python -m tests.bench.made_model DIR --adapters 8 [--tiny] [--layers N] [--ranks R ...] [--modules M ...]

DIR/model is of Llama-3.1-8B's shape, DIR/adapters/a0 and so on are of rank 16 on all modules unless told otherwise.
What is there already stays. Asked greedily, the model says made-up words alone, so that its text tells its tokens.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tests.tiny_models import layer_shapes

NUM_THREADS = 8
LAYERS_A_FILE = 4
END = "<|end|>"
NUM_UNSAID = 257  # END and the bytes: their rows of the head are 0, where the best of the others is well above
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
LLAMA_8B = TINY | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
Shapes = dict[str, tuple[int, ...]]


def make_model(model_dir: Path, config: dict[str, Any]) -> Path:
    """Writes a model of this config, unless it is there already. On a GPU's random numbers where there is one."""
    if (model_dir / "config.json").exists():
        return model_dir
    model_dir.mkdir(parents=True, exist_ok=True)
    files = _files(config)
    _in_threads([lambda i=i: write_tensors(model_dir / _file_name(i, len(files)), files[i]) for i in range(len(files))])
    weight_map = {name: _file_name(i, len(files)) for i, shapes in enumerate(files) for name in shapes}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model_dir / "tokenizer.json").write_text(tokenizer(config["vocab_size"]).to_str())
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (model_dir / "config.json").write_text(json.dumps(config))  # last: it says that all is there
    return model_dir


def make_adapters(
    directory: Path,
    config: dict[str, Any],
    num_adapters: int,
    ranks: Sequence[int] = (16,),
    modules: Sequence[str] = (),
) -> list[Path]:
    """Writes adapters, of these ranks in turn, those that are not there already. modules: () is all seven."""
    paths = [directory / f"a{i}" for i in range(num_adapters)]

    def write(path: Path, rank: int) -> None:
        if not (path / "adapter_config.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            write_tensors(path / "adapter_model.safetensors", _adapter_shapes(config, rank, modules))
            targets = list(modules) or "all-linear"
            # ΔW is about as large as W, so that every adapter says something else.
            keys = {"peft_type": "LORA", "r": rank, "lora_alpha": 8 * rank, "target_modules": targets, "bias": "none"}
            (path / "adapter_config.json").write_text(json.dumps(keys))

    _in_threads([lambda path=path, i=i: write(path, ranks[i % len(ranks)]) for i, path in enumerate(paths)])
    return paths


def _adapter_shapes(config: dict[str, Any], rank: int, modules: Sequence[str]) -> Shapes:
    shapes: Shapes = {}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in layer_shapes(config).items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and (not modules or module.rpartition(".")[2] in modules):
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                shapes |= {f"{prefix}.lora_A.weight": (rank, shape[1]), f"{prefix}.lora_B.weight": (shape[0], rank)}
    return shapes


def write_tensors(path: Path, shapes: Shapes) -> None:
    """A safetensors file of random bfloat16 values. Written here, since it can be larger than one likes in memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(1.0 if "norm" in name else 0, 0.02)
            if name == "lm_head.weight":
                values[:NUM_UNSAID] = 0
            file.write(values.cpu().view(torch.uint8).numpy())


def tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level: every byte is a token, and made-up syllables fill the vocabulary, so that every id is text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made_up = (f"\u0120{i:x}" for i in range(vocab_size))
    pieces = [
        END,
        *alphabet,
        *(piece for piece, _ in zip(made_up, range(vocab_size - 1 - len(alphabet)), strict=False)),
    ]
    made = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True)])
    return made


def said(text: str) -> list[int]:
    """The tokens of what a made model has said. ValueError if it is not made-up words alone."""
    try:
        return [NUM_UNSAID + int(word, 16) for word in text.removeprefix(" ").split(" ")]
    except ValueError:
        raise ValueError("not made-up words alone: a model that an older made_model left there? Remove it") from None


def _files(config: dict[str, Any]) -> list[Shapes]:
    """The tensors of each file."""
    hidden, vocab, num_layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    files: list[Shapes] = [
        {"model.embed_tokens.weight": (vocab, hidden)},
        {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)},
    ]
    for first in range(0, num_layers, LAYERS_A_FILE):
        layers = range(first, min(first + LAYERS_A_FILE, num_layers))
        shapes = layer_shapes(config)
        files.append({f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()})
    return files


def _file_name(i: int, num_files: int) -> str:
    return f"model-{i + 1:05}-of-{num_files:05}.safetensors"


def _in_threads(tasks: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(NUM_THREADS) as executor:
        for future in [executor.submit(task) for task in tasks]:
            future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead")
    parser.add_argument("--layers", type=int, help="of the model, default: its shape's own")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16], help="of the adapters, in turn")
    parser.add_argument("--modules", nargs="+", default=[], help="that adapters change, default: all seven")
    options = parser.parse_args()
    config = TINY if options.tiny else LLAMA_8B
    config |= {"num_hidden_layers": options.layers or config["num_hidden_layers"]}
    make_model(options.directory / "model", config)
    make_adapters(options.directory / "adapters", config, options.adapters, options.ranks, options.modules)


if __name__ == "__main__":
    main()
