"""What the worker tells of its model's directory: the tokenizer files, and a fingerprint of the weights."""

import hashlib
from pathlib import Path

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
SAMPLE_BYTES = 1 << 20


def read_tokenizer_files(model_dir: Path) -> dict[str, bytes]:
    """The listed files that exist, by name. Gateways get these and no others."""
    return {name: (model_dir / name).read_bytes() for name in TOKENIZER_FILES if (model_dir / name).is_file()}


def fingerprint(model_dir: Path) -> str:
    """SHA-256 over config.json and each weight file's name, size, first and last MiB."""
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in sorted(model_dir.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
