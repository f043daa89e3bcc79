"""`polylora adapters`: lists, loads, replaces, pins and unloads the adapters of a running server."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0
LONGEST_WAIT_S = 3600.0  # for a load or an unload; the server bounds both

Call = Callable[..., Any]


class CommandError(Exception):
    """What went wrong, in one line for the user."""


def _client(options: argparse.Namespace) -> httpx.Client:
    if options.admin_key and not options.admin_key.isascii():
        raise CommandError("--admin-key has characters that a header cannot carry")
    headers = {"Authorization": f"Bearer {options.admin_key}"} if options.admin_key else {}
    url = options.url.rstrip("/").removesuffix("/v1")
    return httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(CONNECT_TIMEOUT_S, read=LONGEST_WAIT_S))


def _call(http: httpx.Client, method: str, name: str | None = None, **more: Any) -> Any:
    """The reply's JSON. Raises CommandError with the server's own words."""
    path = "/v1/adapters" if name is None else f"/v1/adapters/{quote(name)}"
    try:
        response = http.request(method, path, **more)
        body = response.json()
    except httpx.HTTPError as error:
        raise CommandError(str(error).strip() or type(error).__name__) from None
    except ValueError:
        raise CommandError(f"status {response.status_code}, and no JSON: is this a Polylora server?") from None
    if response.is_error:
        raise CommandError(body["error"]["message"])
    return body


def _list(http: httpx.Client, options: argparse.Namespace) -> Any:
    reply = _call(http, "GET")
    if not options.json:
        _table(
            ["NAME", "STATE", "GENERATION", "RANK", "PINNED", "ON", "IN FLIGHT", "SOURCE"],
            [
                [line["name"], line["state"], line["generation"] or "-", line.get("rank", "-")]
                + ["yes" if line.get("pinned") else "no", _tiers(line), line.get("in_flight", 0), line["source"]]
                for line in reply["data"]
            ],
        )
    return reply


def _stats(http: httpx.Client, options: argparse.Namespace) -> Any:
    reply = _call(http, "GET")
    if options.json:
        return reply
    _table(
        ["NAME", "STATE", "REQUESTS", "IN FLIGHT", "HITS", "MISSES", "DEVICE", "HOST", "DISK"],
        [
            [line["name"], line["state"], line["requests"], line["in_flight"], line["hits"], line["misses"]]
            + [_size(line["resident"][tier]) for tier in ("device", "host", "disk")]
            for line in reply["data"]
            if "resident" in line
        ],
    )
    for memory in reply["memory"] if isinstance(reply["memory"], list) else [reply["memory"]]:
        used = memory["chunks_total"] - memory["chunks_free"]
        _say(f"device: {used} of {memory['chunks_total']} chunks of {_size(memory['chunk_bytes'])} in use")
        _say(
            f"host: {memory['host_adapters']} of {memory['host_adapters_max']} adapters, {_size(memory['host_bytes'])}"
        )
        _say(f"disk: {_size(memory['disk_bytes'])}")
    return reply


def _load(http: httpx.Client, options: argparse.Namespace) -> Any:
    body: dict[str, Any] = {"source": options.source, "replace": options.replace, "wait": not options.no_wait}
    body |= {"pinned": True} if options.pinned else {}
    if options.expected_generation is not None:
        body["expected_generation"] = options.expected_generation
    return _tell(_call(http, "PUT", options.name, json=body), options)


def _pin(http: httpx.Client, options: argparse.Namespace) -> Any:
    return _tell(_call(http, "PUT", options.name, json={"pinned": not options.off}), options)


def _unload(http: httpx.Client, options: argparse.Namespace) -> Any:
    query = {"force": "true"} if options.force else {}
    query |= {} if options.timeout is None else {"timeout": str(options.timeout)}
    if options.expected_generation is not None:
        query["expected_generation"] = str(options.expected_generation)
    return _tell(_call(http, "DELETE", options.name, params=query), options)


def _tell(line: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    if not options.json:
        parts = [line["state"]]
        parts += [f"generation {line['generation']}"] if line.get("generation") else []
        parts += ["pinned"] if line.get("pinned") else []
        parts += [f"{line['in_flight']} requests in flight"] if line.get("in_flight") else []
        _say(f"{line['name']}: {', '.join(parts)}")
    return line


def _tiers(line: dict[str, Any]) -> str:
    return ",".join(tier for tier, num_bytes in line.get("resident", {}).items() if num_bytes) or "-"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


def _table(head: list[str], rows: list[list[Any]]) -> None:
    lines = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        _say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    """Without control characters: what somebody has named must not steer the terminal."""
    sys.stdout.write("".join(char for char in text if char.isprintable() or char == "\n") + "\n")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--url", default=DEFAULT_URL, help="the server (default: %(default)s)")
    common.add_argument(
        "--admin-key",
        default=os.environ.get("POLYLORA_ADMIN_KEY"),
        help="the server's admin key (default: $POLYLORA_ADMIN_KEY)",
    )
    common.add_argument("--json", action="store_true", help="print the server's reply as it is")
    parser = argparse.ArgumentParser(prog="polylora adapters", description="Manage a running server's adapters.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, run: Call) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    command("list", "every adapter: state, generation, rank, pin, where it is", _list)
    command("stats", "requests, hits and bytes of each adapter, and what all take", _stats)
    load = command("load", "load an adapter, or replace it", _load)
    load.add_argument("name")
    load.add_argument("source", nargs="?", help="path, hub id or URL (default: what the server's resolver finds)")
    load.add_argument("--pinned", action="store_true", help="keep it on the device")
    load.add_argument("--replace", action="store_true", help="give the name new content, if it is taken")
    load.add_argument("--no-wait", action="store_true", help="return while it loads")
    unload = command("unload", "take a name away, wait for its requests, free", _unload)
    unload.add_argument("name")
    unload.add_argument("--timeout", type=float, help="seconds to wait for its requests (default: the server's)")
    unload.add_argument("--force", action="store_true", help="end its requests with an error instead")
    for sub in (load, unload):
        sub.add_argument("--expected-generation", type=int, help="only if this generation holds the name; 0: none")
    pin = command("pin", "keep an adapter on the device, or no longer", _pin)
    pin.add_argument("name")
    pin.add_argument("--off", action="store_true", help="no longer")
    return parser


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        with _client(options) as http:
            reply = options.run(http, options)
        if options.json:
            _say(json.dumps(reply, indent=2))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
    except (CommandError, httpx.InvalidURL) as error:
        sys.stderr.write(f"polylora adapters {options.command}: {error}\n")
        return 1
    return 0
