"""The text side of a tiny made-up model: a byte-level vocabulary of 400 tokens and a ChatML template."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 400
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_json() -> bytes:
    """Special tokens, the 256 bytes, then two-letter merges up to the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet]
    merges = []
    letters = "etaoinshrdlu"
    for first in ["\u0120", *letters]:
        for second in letters:
            if len(pieces) < VOCAB_SIZE:
                merges.append((first, second))
                pieces.append(first + second)
    tokenizer = Tokenizer(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer.to_str().encode()


def files() -> dict[str, bytes]:
    """The files a worker offers."""
    config = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    return {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"temperature": 0.5, "do_sample": True}).encode(),
    }
