"""Jobs beside the engine: what comes back, and what is left of them."""

import gc
import queue
import time
import weakref

from worker.background import Background
from worker.mailbox import JobDone, Message


class Room:
    """Stands for an adapter in host memory."""


def test_what_a_failed_job_held_is_free_as_soon_as_its_failure_is_dealt_with() -> None:
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    rooms: list[weakref.ref[Room]] = []
    failures: list[object] = []

    def fail() -> None:
        room = Room()
        rooms.append(weakref.ref(room))
        raise ValueError("cancelled")

    gc.disable()  # as in a worker that is idle
    try:
        Background("test", 1, inbox).submit(fail, failures.append)
        message = inbox.get(timeout=10)
        assert isinstance(message, JobDone)
        message.done(message.result)
        assert str(failures.pop()) == "cancelled" and rooms[0]() is not None, "its frames are in the traceback"
        del message
        deadline = time.monotonic() + 10  # the thread may not have come back from handing it over
        while rooms[0]() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        gc.enable()
