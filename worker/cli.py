"""The command line of a worker: options, signals, and one clear line when it cannot start."""

import argparse
import logging
import os
import signal
import sys
import time
from types import FrameType

from worker.config import ConfigError, add_options, config_from


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs a worker until a signal ends it. Returns the exit code: 0 after a signal, 1 if it could not start."""
    start_s = time.monotonic()
    parser = _Parser(prog="polylora-worker", description="Serves one model and its adapters.", allow_abbrev=False)
    add_options(parser)
    try:
        config = config_from(parser.parse_args(arguments))
    except ConfigError as error:
        parser.exit(2, f"polylora-worker: {error}\n")
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Threads that spin without end for a sibling that is off its core make a step 5 to 20 times slower once anything
    # else wants a core (a step's linears, 2 threads, 2 busy cores: 310 to 1930 ms; 1000 turns and then sleep: 81).
    # Sleeping at once (OMP_WAIT_POLICY=PASSIVE) costs a fifth on a quiet machine. Read when torch loads OpenMP.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # An adapter's 84 MB in pages of 4 KB take 25 ms to come and 5 to go, which every other thread waits for; in huge
    # pages 8 and 0.4 (bench_loads: a load 246 to 176). Read by torch.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from worker.boot import BootError, Worker  # torch takes seconds; a wrong option is told before

    try:
        worker = Worker(config, start_s)
    except BootError as error:
        sys.stderr.write(f"polylora-worker: {error}\n")
        return 1

    graces_s = [0.0, config.shutdown_grace]  # the second signal does not wait

    def stop(number: int, frame: FrameType | None) -> None:
        worker.stop(graces_s.pop() if len(graces_s) > 1 else graces_s[0])

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    worker.run()
    return 0
