"""Tokenizer: text to token ids and single tokens to text and bytes, from the bytes of a tokenizer.json."""

import json
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer as HubTokenizer


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """Byte-level vocabularies spell each byte as one printable character; this is their table, turned around."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Safe to use from several threads. Raises ValueError if tokenizer_json cannot be read."""

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            self.hub = HubTokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"tokenizer.json cannot be read: {error}") from None
        self.hub.no_truncation()
        self.hub.no_padding()
        spec = json.loads(tokenizer_json)
        self._byte_level = _mentions(spec.get("decoder"), "ByteLevel")
        added = spec.get("added_tokens", [])
        self._added = {token["id"]: token["content"] for token in added}
        self._special = {token["id"]: token["content"] for token in added if token.get("special")}
        self.token_bytes = lru_cache(maxsize=32_768)(self._token_bytes)
        self.token_text = lru_cache(maxsize=32_768)(self._token_text)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The token ids of a text."""
        # The fast variant leaves out character offsets, which nobody reads: a third less time.
        ids: list[int] = self.hub.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary have none."""
        text: str = self.hub.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """The token with exactly this text, if there is one."""
        found: int | None = self.hub.token_to_id(text)
        return found

    def is_special(self, token_id: int) -> bool:
        """True for a token that decoding leaves out unless told otherwise."""
        return token_id in self._special

    def has_special(self, text: str) -> bool:
        """True if a text is such a token."""
        return text in self._special.values()

    def _token_bytes(self, token_id: int) -> bytes:
        """What one token contributes to a text, which may be a part of a character."""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        piece: str | None = self.hub.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            table = _byte_of_char()
            if all(char in table for char in piece):
                return bytes(table[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # a byte-fallback token: <0xE4>
            return bytes.fromhex(piece[3:5])
        return piece.replace("\u2581", " ").encode()

    def _token_text(self, token_id: int) -> str:
        """The token's bytes as text for people; parts of characters become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def _mentions(node: Any, kind: str) -> bool:
    """True if a decoder specification is of that type or a sequence with a part of it."""
    if not isinstance(node, dict):
        return False
    return node.get("type") == kind or any(_mentions(part, kind) for part in node.get("decoders", []))
