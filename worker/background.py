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

        def run() -> None:
            result: T | Exception
            try:
                result = job()
            except Exception as error:
                result = error
            self._inbox.put(JobDone(done, result))

        self._jobs.put(run)

    def _work(self) -> None:
        while True:
            self._jobs.get()()


def log_failure(result: object) -> None:
    """For a job whose outcome nobody waits for."""
    if isinstance(result, Exception):
        log.error("a job in the background failed", exc_info=result)
