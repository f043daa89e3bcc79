"""Starts and stops the processes that tests talk to, and speaks raw HTTP to them."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import zmq

ROOT = Path(__file__).parents[1]


class EchoProcess:
    """A running echo worker and its control socket."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.endpoint = f"ipc://{directory}/worker.sock"
        self._control = f"ipc://{directory}/control.sock"
        self._options = options
        self.start()

    def start(self) -> None:
        """Starts it, again if it was killed."""
        command = [sys.executable, "-m", "tests.echo_worker", "--endpoint", self.endpoint, "--control", self._control]
        self.process = subprocess.Popen([*command, *self._options], cwd=ROOT)

    def do(self, action: str, **values: Any) -> dict[str, Any]:
        """One order to it; what it counts. An order to die has no answer."""
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
            socket.connect(self._control)
            socket.send_json({"do": action, **values})
            if action == "die":
                self.process.wait(10)
                return {}
            answer: dict[str, Any] = socket.recv_json()
            return answer

    def until(self, **expected: Any) -> dict[str, Any]:
        """Waits until its counts are these."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            counts = self.do("stats")
            if expected.items() <= counts.items():
                return counts
            time.sleep(0.01)
        raise AssertionError(f"{expected} never came, only {counts}")

    def stop(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait(10)


class GatewayProcess:
    """A running gateway, in front of some workers."""

    def __init__(self, log: Path, *options: str) -> None:
        command = [sys.executable, "-m", "gateway", "--port", "0", *options]
        self.started_s = time.monotonic()
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=stream)
        self.port = wait_for_port(log, self.process)
        self.seconds_to_start = time.monotonic() - self.started_s

    def cpu_s(self) -> float:
        """CPU seconds that it has used, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def stop(self) -> int:
        """Asks it to end; its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def wait_for_port(log: Path, process: "subprocess.Popen[bytes]", timeout_s: float = 30) -> int:
    """The port in the line that says where the model answers."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := re.search(r"answers at http://[^ ]*:(\d+)/v1", log.read_text()):
            return int(found[1])
        if process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"it did not start:\n{log.read_text()}")


@contextlib.contextmanager
def running(process: EchoProcess | GatewayProcess) -> Iterator[Any]:
    """Stops it at the end."""
    try:
        yield process
    finally:
        process.stop()


def post_bytes(path: str, body: Any, *headers: str) -> bytes:
    """An HTTP request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


async def events(port: int, path: str, body: Any) -> AsyncIterator[Any]:
    """The events of one stream, as JSON, with "[DONE]" as a string. Closing the iterator closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(post_bytes(path, body))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], head + await reader.read(1000)
        async for line in reader:
            if line.startswith(b"data: "):
                data = line[6:].strip()
                yield "[DONE]" if data == b"[DONE]" else json.loads(data)
            elif line == b"0\r\n":
                return
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
