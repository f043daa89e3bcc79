"""A copy stream without a GPU: what would be enqueued, in its order, and events that come when the test says so."""

import contextlib
from dataclasses import dataclass

from worker.copy_stream import CopyStream


@dataclass(eq=False)
class Arrival:
    """An event of the fake stream."""

    is_done: bool = False

    def query(self) -> bool:
        return self.is_done


class Recorded(CopyStream):
    """Takes down what would be enqueued where."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events: list[Arrival] = []

    def wait_for_steps(self) -> None:
        self.log.append("copies wait for steps")

    def copying(self) -> contextlib.AbstractContextManager[None]:
        self.log.append("copy")
        return contextlib.nullcontext()

    def record(self) -> Arrival:  # type: ignore[override]
        self.log.append(f"event {len(self.events)}")
        self.events.append(Arrival())
        return self.events[-1]

    def hold_steps(self, event: Arrival) -> None:  # type: ignore[override]
        self.log.append(f"steps wait for {self.events.index(event)}")
