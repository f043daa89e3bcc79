"""The commands: `polylora serve` (gateway and worker), `chat` and `adapters`, and `polylora-gateway` (it alone)."""

import argparse
import asyncio
import ctypes
import gc
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from gateway.app import create_app
from gateway.config import GatewayConfig, add_options, config_from
from gateway.server import Server

logger = logging.getLogger(__name__)

_CHILD_GRACE_S = 10.0  # between SIGTERM and SIGKILL
_MAX_SOCKET_PATH = 100  # bytes; the system allows 107
_PR_SET_PDEATHSIG = 1
_GC_THRESHOLD = (20_000, 20, 20)  # of objects made and not freed, then of the rounds before the older are looked at

_SERVE_HELP = """\
Starts a gateway and one worker and serves until it is told to stop. The options below are the gateway's (--log-level is
both's); all others are given to the worker, whose help is shown by polylora-worker --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """`polylora COMMAND ...`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {"serve": _serve, "chat": _chat, "adapters": _adapters}
    parser = argparse.ArgumentParser(prog="polylora", allow_abbrev=False)
    parser.add_argument(
        "command",
        choices=commands,
        help="serve: gateway and worker in one; chat: a terminal client; adapters: list, load, unload, pin, stats",
    )
    command = parser.parse_args(arguments[:1]).command
    return commands[command](arguments[1:])


def main_gateway(argv: Sequence[str] | None = None) -> int:
    """`polylora-gateway`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="polylora-gateway", allow_abbrev=False)
    add_options(parser)
    config = _config(parser, parser.parse_args(argv))
    if not config.worker_endpoint:
        parser.error("--worker-endpoint is required")
    return _run(config, None)


def _chat(arguments: list[str]) -> int:
    from gateway import chat  # only now: a client's imports are nothing to a server

    return chat.main(arguments)


def _adapters(arguments: list[str]) -> int:
    from gateway import adapters_cli

    return adapters_cli.main(arguments)


def _serve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="polylora serve", allow_abbrev=False, description=_SERVE_HELP)
    add_options(parser, leave_out=("worker_endpoint",))
    options, for_worker = parser.parse_known_args(arguments)
    directory = tempfile.mkdtemp(prefix="polylora-")  # with mode 0700: who can enter it can talk to the worker
    if len(directory) > _MAX_SOCKET_PATH - len("/worker.sock"):
        shutil.rmtree(directory)
        directory = tempfile.mkdtemp(prefix="polylora-", dir="/tmp")
    try:
        endpoint = f"ipc://{directory}/worker.sock"
        config = _config(parser, options, worker_endpoint=(endpoint,))
        worker = subprocess.Popen(
            [sys.executable, "-m", "worker", "--endpoint", endpoint, "--log-level", config.log_level, *for_worker],
            preexec_fn=_die_with_parent,
            process_group=0,  # a Ctrl+C in the terminal is the gateway's alone, which ends the worker after draining
        )
        try:
            return _run(config, worker)
        finally:
            _end(worker)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _config(parser: argparse.ArgumentParser, options: argparse.Namespace, **values: object) -> GatewayConfig:
    try:
        return config_from(options, **values)
    except ValueError as error:
        parser.error(str(error))


def _die_with_parent() -> None:
    """In the child: should the gateway be killed outright, no worker is left behind. Linux only, harmless elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(worker: "subprocess.Popen[bytes]") -> None:
    worker.terminate()
    try:
        worker.wait(_CHILD_GRACE_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _run(config: GatewayConfig, worker: "subprocess.Popen[bytes] | None") -> int:
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = create_app(config)
    server = Server(config, app)
    gc.freeze()  # what was imported never becomes garbage; streams make little of it, and pauses cost all of them
    gc.set_threshold(*_GC_THRESHOLD)

    async def serve() -> int:
        watching = [asyncio.create_task(_announce(server))]
        if worker is not None:
            watching.append(asyncio.create_task(_watch(worker, server)))
        try:
            await server.serve()
        finally:
            for task in watching:
                task.cancel()
        if worker is not None and (status := worker.poll()) is not None:
            logger.error("the worker ended with status %d", status)
            return status if status > 0 else 1
        return 0 if server.started else 1

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        return runner.run(serve())


async def _watch(worker: "subprocess.Popen[bytes]", server: Server) -> None:
    """Ends the server when its worker ends: whoever started us learns of it."""
    while worker.poll() is None:
        await asyncio.sleep(0.2)
    server.should_exit = True


async def _announce(server: Server) -> None:
    """Says once where the model answers."""
    fleet = server.config.app.state.gateway.fleet  # type: ignore[union-attr]
    while not (server.started and fleet.ready()):
        await asyncio.sleep(0.05)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    logger.info("%s answers at http://%s:%d/v1", fleet.model.names[0], host, port)
