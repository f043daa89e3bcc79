"""Bytes in, messages or BadFrame out."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import MAX_FRAME_BYTES
from protocol.codec import decode_command, decode_event, encode
from protocol.errors import BadFrame
from protocol.messages import CommandEnvelope, EventEnvelope, FileChunk
from tests.protocol.golden import GOLDEN

FRAMES = [bytes.fromhex(data) for _, data in GOLDEN.values()]


def decode(frame: bytes) -> None:
    """Through both decoders: a message or BadFrame, nothing else."""
    for decoder, kind in ((decode_command, CommandEnvelope), (decode_event, EventEnvelope)):
        with contextlib.suppress(BadFrame):
            assert isinstance(decoder(frame), kind)


@given(st.binary(max_size=200))
@settings(max_examples=1000, deadline=None)
def test_any_bytes(frame: bytes) -> None:
    decode(frame)


@given(st.sampled_from(FRAMES), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=4), st.data())
@settings(max_examples=1500, deadline=None)
def test_damaged_frames(frame: bytes, changes: list[tuple[int, int]], data: st.DataObject) -> None:
    damaged = bytearray(frame)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    decode(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    decode(bytes(damaged))
    decode(bytes(damaged) + b"\x00")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
@settings(max_examples=500, deadline=None)
def test_any_messagepack(value: object) -> None:
    decode(msgspec.msgpack.encode(value))
    decode(msgspec.msgpack.encode({"epoch": b"", "session": 1, "seq": 0, "body": value}))


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_cut_anywhere_is_bad(frame: bytes) -> None:
    for end in range(len(frame)):
        for decoder in (decode_command, decode_event):
            with pytest.raises(BadFrame):
                decoder(frame[:end])


def test_nesting_bombs() -> None:
    decode(b"\x91" * 1_000_000)
    decode(b"\x81\xa4body" * 100_000)


def test_the_worker_refuses_fields_that_it_does_not_know_and_the_gateway_reads_past_them() -> None:
    command = {"epoch": b"", "session": 1, "seq": 0, "body": {"type": "abort", "request_id": 1}}
    event = {"epoch": b"", "session": 1, "seq": 0, "body": {"type": "file_chunk", "request_id": 1, "data": b""}}
    decode_command(msgspec.msgpack.encode(command))
    for wrong in ({**command, "x": 1}, {**command, "body": {**command["body"], "x": 1}}):  # type: ignore[dict-item]
        with pytest.raises(BadFrame):
            decode_command(msgspec.msgpack.encode(wrong))
    decode_event(msgspec.msgpack.encode({**event, "x": 1, "body": {**event["body"], "x": 1}}))  # type: ignore[dict-item]
    with pytest.raises(BadFrame):
        decode_event(msgspec.msgpack.encode({**event, "body": {"type": "made_up"}}))


def test_a_frame_that_the_peer_would_refuse_is_not_made_and_not_read() -> None:
    envelope = EventEnvelope(b"", 1, 1, FileChunk(request_id=1, data=bytes(MAX_FRAME_BYTES)))
    with pytest.raises(BadFrame, match="over the limit"):
        encode(envelope)
    with pytest.raises(BadFrame, match="over the limit"):
        decode_event(bytes(MAX_FRAME_BYTES + 1))
