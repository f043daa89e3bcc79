"""Background: a few daemon threads for work that must not stop the engine, such as reading an adapter."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from worker.mailbox import JobDone, Message

log = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """Runs jobs in order of arrival; each result goes into the engine's inbox.

    The threads are daemons, unlike those of concurrent.futures: a download that hangs must not hold a process that
    wants to end.
    """

    def __init__(self, name: str, num_threads: int, inbox: "queue.SimpleQueue[Message]") -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._inbox = inbox
        for index in range(num_threads):
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True).start()

    def submit(self, job: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        """Has `job` run here and `done` called with what it returned or raised on the engine thread."""
        self._jobs.put(lambda: self._inbox.put(JobDone(done, _outcome(job))))

    def _work(self) -> None:
        while True:
            self._jobs.get()()


def _outcome(job: Callable[[], T]) -> T | Exception:
    """What a job returns or raises.

    An exception has its frames, and what their variables hold, adapters in host memory for one. None of those frames
    may hold the exception: nothing would be free before the next garbage collection, which an idle worker never has.
    """
    try:
        return job()
    except Exception as error:
        return error


def log_failure(result: object) -> None:
    """For a job whose outcome nobody waits for."""
    if isinstance(result, Exception):
        log.error("a job in the background failed", exc_info=result)
