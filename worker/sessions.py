"""Sessions: who is connected, what each has unfinished, and when it was last heard."""

from protocol.messages import AnyCommand, CommandEnvelope, Output
from protocol.session import EventSender, Receiver
from worker.mailbox import Owner

MAX_SESSIONS = 256


class Session:
    """One gateway's connection, from its Hello on."""

    def __init__(self, route: bytes, owner: Owner, epoch: bytes, now: float) -> None:
        """route: the socket's routing id. now: monotonic seconds."""
        self.route = route
        self.owner = owner
        self.sender = EventSender(epoch, owner[1])
        self.last_heard_s = now
        self._receiver = Receiver(epoch, owner[1])
        self._unfinished: set[int] = set()

    @property
    def last_seq_seen(self) -> int:
        return self._receiver.last_seq

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def accept(self, envelope: CommandEnvelope, now: float) -> AnyCommand:
        """The next message in order renews the lease. Raises StaleSession or SequenceGap."""
        self._receiver.accept(envelope)
        self.last_heard_s = now
        return envelope.body

    def begin(self, request_id: int) -> bool:
        """Counts a sequence as unfinished; False if that id is already."""
        is_new = request_id not in self._unfinished
        self._unfinished.add(request_id)
        return is_new

    def abandon(self, request_id: int) -> bool:
        """The gateway wants no more of a sequence; False if there is nothing to end."""
        if request_id not in self._unfinished:
            return False
        self._unfinished.discard(request_id)
        return True

    def wanted(self, outputs: list[Output]) -> list[Output]:
        """Those of unfinished sequences. The last of a sequence gives its credit back."""
        kept = [output for output in outputs if output.request_id in self._unfinished]
        self._unfinished.difference_update(output.request_id for output in kept if _is_last(output))
        return kept


class SessionTable:
    """All sessions, by route and by owner; at most one for each gateway."""

    def __init__(self) -> None:
        self._by_route: dict[bytes, Session] = {}
        self._by_gateway: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._by_route)

    def all(self) -> list[Session]:
        """A copy, so that sessions may end while it is walked."""
        return list(self._by_route.values())

    def at(self, route: bytes) -> Session | None:
        """The session of a connection."""
        return self._by_route.get(route)

    def of_gateway(self, gateway: bytes) -> Session | None:
        """The session of a gateway."""
        return self._by_gateway.get(gateway)

    def of(self, owner: Owner) -> Session | None:
        """The session itself, if it is still there."""
        session = self._by_gateway.get(owner[0])
        return session if session is not None and session.owner == owner else None

    def add(self, session: Session) -> None:
        """Takes a session in; its gateway and route have no other."""
        assert session.route not in self._by_route and session.owner[0] not in self._by_gateway
        self._by_route[session.route] = session
        self._by_gateway[session.owner[0]] = session

    def remove(self, session: Session) -> bool:
        """Takes a session out; False if it was out already."""
        if self._by_route.get(session.route) is not session:
            return False
        del self._by_route[session.route]
        del self._by_gateway[session.owner[0]]
        return True


def _is_last(output: Output) -> bool:
    return output.finish_reason is not None or output.error is not None
