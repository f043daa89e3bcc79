"""The worker's listening socket: a ROUTER on a Unix socket that only this user can reach."""

import os
import socket
import stat
from pathlib import Path

import zmq

from protocol import MAX_FRAME_BYTES

IPC = "ipc://"
MAX_PATH_BYTES = 107  # of a Unix socket's address
SEND_HIGH_WATER_MARK = 2000  # frames that may wait for one gateway before it counts as gone


class EndpointError(Exception):
    """The worker cannot listen there; the message says why."""


def listen(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """A bound ROUTER. Raises EndpointError.

    The socket's directory is made with mode 0700, or must be this user's alone: who can reach the socket can use the
    worker.
    """
    if not endpoint.startswith(IPC) or endpoint.startswith(IPC + "@"):
        raise EndpointError(f"endpoint {endpoint!r}: only ipc:// with a path is private; tcp needs CURVE keys")
    path = Path(endpoint.removeprefix(IPC))
    _make_private(path)
    if _answers(path):
        raise EndpointError(f"another worker listens on {endpoint}")
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unknown or blocked peer is an error, not silence
    router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    router.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
    router.setsockopt(zmq.HANDSHAKE_IVL, 3000)
    umask = os.umask(0o077)
    try:
        router.bind(endpoint)
    except zmq.ZMQError as error:
        router.close(0)
        raise EndpointError(f"cannot listen on {endpoint}: {error}") from None
    finally:
        os.umask(umask)
    return router


def remove(endpoint: str) -> None:
    """Takes away the file of a socket that this process has closed."""
    Path(endpoint.removeprefix(IPC)).unlink(missing_ok=True)


def _make_private(path: Path) -> None:
    if not path.is_absolute() or len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise EndpointError(f"a socket's path must be absolute and at most {MAX_PATH_BYTES} bytes: {path}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.parent.lstat()
    except OSError as error:
        raise EndpointError(f"the directory of {path} cannot be made: {error.strerror}") from None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    if not private:
        raise EndpointError(f"{path.parent} must be a directory of this user with mode 0700")


def _answers(path: Path) -> bool:
    """Whether somebody accepts connections there; the file of a worker that was killed does not count."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(os.fspath(path)) == 0
