"""Messages in order, or an error."""

import pytest

from protocol.codec import decode_command, decode_event
from protocol.errors import SequenceGap, StaleSession
from protocol.messages import Abort, Goodbye, Outputs
from protocol.session import CommandSender, EventSender, Receiver

EPOCH = b"e" * 16


def test_commands_count_up_from_hello() -> None:
    sender = CommandSender(3)
    frames = [decode_command(sender.stamp(Goodbye())) for _ in range(3)]
    assert [(frame.epoch, frame.session, frame.seq) for frame in frames] == [(b"", 3, 0), (b"", 3, 1), (b"", 3, 2)]


def test_a_receiver_takes_the_next_and_only_the_next() -> None:
    sender, receiver = EventSender(EPOCH, 1), Receiver(EPOCH, 1)
    sender.stamp(Outputs(outputs=[]))  # seq 0, the place of Welcome
    first, second, third = (decode_event(sender.stamp(Outputs(outputs=[]))) for _ in range(3))
    receiver.accept(first)
    with pytest.raises(SequenceGap):
        receiver.accept(third)
    receiver.accept(second)
    with pytest.raises(SequenceGap):
        receiver.accept(second)
    assert receiver.last_seq == 2


@pytest.mark.parametrize(("epoch", "session"), [(b"f" * 16, 1), (EPOCH, 2)])
def test_other_epochs_and_sessions_are_stale(epoch: bytes, session: int) -> None:
    sender = CommandSender(session)
    sender.epoch = epoch
    sender.stamp(Goodbye())
    with pytest.raises(StaleSession):
        Receiver(EPOCH, 1).accept(decode_command(sender.stamp(Abort(request_id=1))))
