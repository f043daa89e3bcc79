"""Increments of text: whole characters, and together the whole decoding."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders
from tokenizers.models import BPE

from gateway.detokenizer import Detokenizer
from gateway.tokenizer import Tokenizer
from tests import tiny_model

TOKENIZER = Tokenizer(tiny_model.tokenizer_json())
TEXTS = ["Grüße, 世界! 👩‍👩‍👧 done", "naïve café — ½ € 𝔘𝔫𝔦", "plain ascii text, and more of it"]


def increments(ids: list[int], skip: bool = True, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip)
    return [detokenizer.add([token_id]) for token_id in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_never_cut(text: str) -> None:
    pieces = increments(TOKENIZER.encode(text, False))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 5


def test_what_is_incomplete_at_the_end_is_shown_as_such() -> None:
    ids = TOKENIZER.encode("a世", False)[:-1]
    assert "".join(increments(ids)) == TOKENIZER.decode(ids) == "a\ufffd"


@given(st.lists(st.integers(0, tiny_model.VOCAB_SIZE - 1), max_size=60), st.booleans())
def test_any_tokens_join_to_the_whole_decoding(ids: list[int], skip: bool) -> None:
    assert "".join(increments(ids, skip)) == TOKENIZER.decode(ids, skip)


@given(st.text(max_size=40), st.data())
def test_steps_of_several_tokens(text: str, data: st.DataObject) -> None:
    ids = TOKENIZER.encode(text, False)
    detokenizer, pieces, i = Detokenizer(TOKENIZER, True), [], 0
    while i < len(ids):
        step = data.draw(st.integers(1, 5))
        pieces.append(detokenizer.add(ids[i : i + step]))
        i += step
    assert "".join(pieces) + detokenizer.finish() == text


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    lone = TOKENIZER.encode("世", False)[0]
    detokenizer = Detokenizer(TOKENIZER, True)
    shown = "".join(detokenizer.add([lone]) for _ in range(2000))
    assert len(shown) > 1900
    assert len(detokenizer._window) < 32
    assert shown + detokenizer.finish() == TOKENIZER.decode([lone] * 2000)


def sentencepiece_like() -> Tokenizer:
    """Spaces as U+2581, the first one stripped, bytes as <0xNN>: as in Llama 2."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581Hello", "\u2581world", "\u2581", "x"]
    hub = HubTokenizer(BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    hub.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(hub.to_str().encode())


def test_spaces_survive_where_decoding_strips_the_first() -> None:
    tokenizer = sentencepiece_like()
    hello, world = 257, 258
    ids = [hello, world, *(1 + byte for byte in "é世".encode()), world]
    assert increments(ids, tokenizer=tokenizer)[0] == "Hello"
    assert "".join(increments(ids, tokenizer=tokenizer)) == tokenizer.decode(ids) == "Hello worldé世 world"


def test_bytes_of_tokens() -> None:
    assert TOKENIZER.token_bytes(TOKENIZER.encode("世", False)[0]) == "世".encode()[:1]
    assert TOKENIZER.token_bytes(0) == b"<|endoftext|>"
    assert TOKENIZER.token_bytes(10**6) == b""
    tokenizer = sentencepiece_like()
    assert tokenizer.token_bytes(1 + 0xE4) == b"\xe4"
    assert tokenizer.token_text(257) == " Hello"


def test_a_broken_file_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer(json.dumps({"model": 1}).encode())
