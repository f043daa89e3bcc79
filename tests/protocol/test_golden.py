"""The wire is plain MessagePack, and today's code reads and writes yesterday's bytes."""

from typing import Any, get_args

import msgpack
import msgspec
import pytest

from protocol.codec import decode_command, decode_event, encode
from protocol.messages import AnyCommand, AnyEvent, CommandEnvelope, EventEnvelope
from tests.protocol.golden import GOLDEN, HEX, MESSAGES, OLDER_HEX


@pytest.mark.parametrize("name", GOLDEN)
def test_writes_these_bytes(name: str) -> None:
    envelope, golden = GOLDEN[name]
    assert encode(envelope).hex() == golden


@pytest.mark.parametrize("name", GOLDEN)
def test_reads_these_bytes(name: str) -> None:
    envelope, golden = GOLDEN[name]
    decode = decode_command if isinstance(envelope, CommandEnvelope) else decode_event
    assert decode(bytes.fromhex(golden)) == envelope


@pytest.mark.parametrize("name", OLDER_HEX)
def test_reads_older_bytes(name: str) -> None:
    assert decode_command(bytes.fromhex(OLDER_HEX[name])) == MESSAGES[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_another_library_reads_the_same(name: str) -> None:
    envelope, golden = GOLDEN[name]
    plain = msgpack.unpackb(bytes.fromhex(golden), raw=False, strict_map_key=False)
    assert set(plain) == {"epoch", "session", "seq", "body"}
    assert plain["body"]["type"] == envelope.body.__struct_config__.tag
    assert plain_lists(plain) == plain_lists(builtins(envelope))


def test_every_message_is_here() -> None:
    assert {type(envelope.body) for envelope in MESSAGES.values()} == {*get_args(AnyCommand), *get_args(AnyEvent)}
    assert set(HEX) == set(MESSAGES)


def builtins(envelope: CommandEnvelope | EventEnvelope) -> Any:
    return msgspec.to_builtins(envelope, builtin_types=(bytes,))


def plain_lists(value: Any) -> Any:
    """Tuples as lists, as MessagePack has them."""
    if isinstance(value, dict):
        return {key: plain_lists(item) for key, item in value.items()}
    return [plain_lists(item) for item in value] if isinstance(value, list | tuple) else value
