"""Messages to bytes and back. Whatever is wrong with a frame, the answer is BadFrame."""

from typing import TypeVar

import msgspec

from protocol import MAX_FRAME_BYTES
from protocol.errors import BadFrame
from protocol.messages import CommandEnvelope, EventEnvelope

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(CommandEnvelope)
_event_decoder = msgspec.msgpack.Decoder(EventEnvelope)


def encode(envelope: CommandEnvelope | EventEnvelope) -> bytes:
    """One message as one frame. Raises BadFrame if the peer would refuse its size."""
    frame = _encoder.encode(envelope)
    if len(frame) > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return frame


def decode_command(frame: bytes) -> CommandEnvelope:
    """Reads a frame from a gateway. Raises BadFrame."""
    return _decode(_command_decoder, frame)


def decode_event(frame: bytes) -> EventEnvelope:
    """Reads a frame from a worker. Raises BadFrame."""
    return _decode(_event_decoder, frame)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    if len(frame) > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(str(error)) from None
