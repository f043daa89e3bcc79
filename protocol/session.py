"""The order of messages within a session: one Sender and one Receiver on each side, sequence numbers from 1."""

from protocol.codec import encode
from protocol.errors import SequenceGap, StaleSession
from protocol.messages import AnyCommand, AnyEvent, CommandEnvelope, EventEnvelope

NO_EPOCH = b""


class CommandSender:
    """Stamps the commands of one session."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.epoch = NO_EPOCH  # set by the Welcome
        self._seq = 0

    def stamp(self, body: AnyCommand) -> bytes:
        """The next frame. The first of a session is Hello, with seq 0."""
        frame = encode(CommandEnvelope(self.epoch, self.session, self._seq, body))
        self._seq += 1
        return frame


class EventSender:
    """Stamps the events of one session. The first is Welcome or Reject, with seq 0."""

    def __init__(self, epoch: bytes, session: int) -> None:
        self.epoch = epoch
        self.session = session
        self._seq = 0

    def stamp(self, body: AnyEvent) -> bytes:
        """The next frame."""
        frame = encode(EventEnvelope(self.epoch, self.session, self._seq, body))
        self._seq += 1
        return frame


class Receiver:
    """Checks that a session's messages arrive whole and in order."""

    def __init__(self, epoch: bytes, session: int, last_seq: int = 0) -> None:
        self.epoch = epoch
        self.session = session
        self.last_seq = last_seq

    def accept(self, envelope: CommandEnvelope | EventEnvelope) -> None:
        """Takes the next message into account. Raises StaleSession or SequenceGap."""
        if envelope.epoch != self.epoch or envelope.session != self.session:
            raise StaleSession(f"session {envelope.session}, expected {self.session}, or another epoch")
        if envelope.seq != self.last_seq + 1:
            raise SequenceGap(f"message {envelope.seq} came after {self.last_seq}")
        self.last_seq = envelope.seq
