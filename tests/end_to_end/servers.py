"""Starts `polylora serve` as a user would, waits until it is ready, and stops it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "deploy" / "adapters"
DEMO = [
    f"--adapter-root={ADAPTERS}",
    "--lora-paths",
    *(f"lora{i}={ADAPTERS / f'lora{i}'}" for i in range(3)),
]
QUESTION = "List 3 countries and their capitals."


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(*options: str, timeout_s: float = 240.0) -> Iterator[str]:
    """A server with these options; yields its URL. The first start on a machine converts the default model."""
    port = free_port()
    program = "import sys; from gateway.cli import main; sys.exit(main())"  # what the script `polylora` does
    command = [sys.executable, "-c", program, "serve", "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process, timeout_s)
            yield url
            assert process.poll() is None, "the server ended during the test"
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-8000:])
            raise
        finally:
            stop(process)


def wait_until_ready(url: str, process: "subprocess.Popen[bytes] | subprocess.Popen[str]", timeout_s: float) -> None:
    """Polls /ready; raises when the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}")
        try:
            if httpx.get(url + "/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"not ready after {timeout_s} s")


def stop(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    """SIGTERM, and SIGKILL to its process group if that does not end it."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
