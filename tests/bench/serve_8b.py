"""Benchmark: `polylora serve` from its start to its load, with random weights of Llama-3.1-8B's shape, in one call.

    python -m tests.bench.serve_8b [--cases 0 8 64 loop] [--clients 1 16 64 256] [--csv FILE] [-- SERVER OPTIONS]

Makes the model and the adapters (rank 16, all modules) in --dir, or takes them from there; starts the server with the
first 8 adapters; says when it was ready and when its first token came; loads the others; then runs bench_serving for
each case: a number of adapters (0: the base), or `loop`: 8 adapters while another comes and goes. Whatever goes wrong,
the end of the server's log is printed and the server stopped. --tiny: the same with a tiny model, for any machine.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from tests.bench import bench_serving
from tests.bench.made_model import LLAMA_8B, TINY
from tests.bench.results import add_csv_arguments, append_csv, machine
from tests.bench.serving_client import Load, post
from tests.end_to_end.servers import ROOT, free_port, stop, wait_until_ready

AT_START = 8  # adapters in --lora-paths
NUM_LOADS_AT_ONCE = 4
LOG_TAIL = 8000  # characters
LOOP_CLIENTS = 64
PROGRAM = "import sys; from gateway.cli import main; sys.exit(main())"  # what the script `polylora` does


Adapters = dict[str, Path]  # by name


class Server:
    """A `polylora serve`, started. It listens on a free port."""

    def __init__(self, log: Path, arguments: list[str]) -> None:
        self.port, self.log = free_port(), log
        command = [sys.executable, "-c", PROGRAM, "serve", f"--port={self.port}", *arguments]
        self.start_s = time.monotonic()
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def age_s(self) -> float:
        return time.monotonic() - self.start_s


def server_arguments(adapters: Adapters, options: argparse.Namespace) -> list[str]:
    """The server's options."""
    most = len(adapters)
    arguments = {
        "model-path": options.dir / "model",
        "served-model-name": "base",
        "max-running-requests": max(options.clients),
        "max-loras-per-batch": options.slots,
        "max-loaded-loras": options.loaded or max(most, options.slots) + 8,
        "num-lora-chunks": min(most, options.slots) + 8,
        "context-length": 1024 if options.tiny else 8192,
        "mem-fraction": 0.1 if options.tiny else 0.85,
        "adapter-root": options.dir,
    }
    at_start = list(adapters.items())[:AT_START]
    return [
        *(f"--{name}={value}" for name, value in arguments.items()),
        *("--lora-paths", *(f"{name}={path}" for name, path in at_start)),
        *options.server,
    ]


@contextlib.contextmanager
def serving(log: Path, arguments: list[str]) -> Iterator[Server]:
    """A server that ends with the block; its log's tail is printed if the block fails."""
    server = Server(log, arguments)
    try:
        yield server
        late = re.findall(r"compiled late: (\w+)", log.read_text(errors="replace"))
        say(f"{len(late)} kernels were compiled late: {', '.join(late)}")
    except BaseException:
        say(f"--- the end of {log}:\n{log.read_text(errors='replace')[-LOG_TAIL:]}\n---")
        raise
    finally:
        stop(server.process)


def say(text: str) -> None:
    print(text, flush=True)


def load_of(server: Server, options: argparse.Namespace, vocab_size: int) -> Load:
    return Load("127.0.0.1", server.port, options.input_tokens, options.output_tokens, vocab_size)


def start_up(server: Server, load: Load, timeout_s: float) -> dict[str, float]:
    """Seconds from the start to ready and to the first token, and what the worker's log says of the way there."""
    wait_until_ready(server.url, server.process, timeout_s)
    ready_s = server.age_s()
    prompt = load.prompt(random.Random(0), load.input_tokens)
    post(load, "/v1/completions", {"model": "base", "prompt": prompt, "max_tokens": 1})
    metrics = {"ready_s": ready_s, "first_token_s": server.age_s()}
    phases: dict[str, float] = {}
    for line in server.log.read_text(errors="replace").splitlines():
        if "start-up: " in line:
            say(line)
            phases |= {f"{name}_s": float(value) for name, value in re.findall(r"([a-z]+) ([\d.]+) s", line)}
    return phases | metrics


def load_others(load: Load, adapters: Adapters) -> None:
    """Loads the adapters that were not there at the start."""
    start_s = time.monotonic()
    bodies = [{"lora_name": name, "lora_path": str(path)} for name, path in list(adapters.items())[AT_START:]]
    with ThreadPoolExecutor(NUM_LOADS_AT_ONCE) as executor:
        times = [seconds for seconds, _ in executor.map(lambda body: post(load, "/v1/load_lora_adapter", body), bodies)]
    if times:
        all_s = time.monotonic() - start_s
        say(f"{len(times)} adapters loaded in {all_s:.1f} s, one in {sum(times) / len(times):.2f} s")


def run_case(case: str, server: Server, extra: Path, options: argparse.Namespace, vocab_size: int) -> None:
    """One case at all its concurrencies."""
    num_adapters = AT_START if case == "loop" else int(case)
    models = [f"a{i}" for i in range(num_adapters)] or ["base"]
    clients = options.clients
    if case == "loop":
        clients = [min(LOOP_CLIENTS, max(clients))]
    elif num_adapters:
        clients = [n for n in clients if n >= min(num_adapters, max(clients))]  # each adapter has a client
    arguments = ["--url", server.url, "--models", *models, "--clients", *map(str, clients)]
    arguments += ["--input-tokens", str(options.input_tokens), "--output-tokens", str(options.output_tokens)]
    arguments += ["--vocab-size", str(vocab_size), "--requests", str(options.requests)]
    arguments += ["--label", "adapters" if num_adapters else "base", "--popularity", options.popularity]
    if case == "loop":
        arguments += ["--load-loop", f"extra={extra}"]
    if options.csv:
        arguments += ["--csv", str(options.csv), "--machine", options.machine, "--commit", options.commit]
    bench_serving.main(arguments)


def run(options: argparse.Namespace) -> None:
    """Everything, in order."""
    vocab_size = (TINY if options.tiny else LLAMA_8B)["vocab_size"]
    largest = max([AT_START, *(int(case) for case in options.cases if case != "loop")])
    start_s = time.monotonic()
    num_paths = min(largest, options.directories)
    # In a process of its own, which leaves nothing on the GPU.
    command = [sys.executable, "-m", "tests.bench.made_model", str(options.dir), "--adapters", str(num_paths + 1)]
    subprocess.run(command + ["--tiny"] * options.tiny, cwd=ROOT, check=True)
    *paths, extra = (options.dir / "adapters" / f"a{i}" for i in range(num_paths + 1))
    adapters = {f"a{i}": paths[i % num_paths] for i in range(largest)}
    say(f"the model and {num_paths + 1} adapters in {options.dir} after {time.monotonic() - start_s:.1f} s")
    for i in range(options.starts):
        with serving(options.dir / "server.log", server_arguments(adapters, options)) as server:
            load = load_of(server, options, vocab_size)
            metrics = start_up(server, load, options.limit)
            say("start " + " ".join(f"{name}={value:.4g}" for name, value in metrics.items()))
            if options.csv:
                append_csv(options.csv, options.machine, f"start_up adapters={AT_START}", metrics, options.commit)
            if i + 1 < options.starts:
                continue
            load_others(load, adapters)
            for case in options.cases:
                run_case(case, server, extra, options, vocab_size)


def add_server_arguments(parser: argparse.ArgumentParser, directory: str, space: str) -> None:
    """What every benchmark that makes a model and starts a server takes. directory: in /tmp; space: what it needs."""
    default_dir = Path(tempfile.gettempdir(), directory)
    parser.add_argument("--dir", type=Path, default=default_dir, help=f"{space} (default {default_dir})")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for any machine")
    parser.add_argument("--limit", type=int, default=540, help="seconds after which it gives up")
    add_csv_arguments(parser)
    parser.add_argument("server", nargs="*", help="after --: more options of polylora serve")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Its arguments, with what add_server_arguments has left to be found."""
    options = parser.parse_args(arguments)
    options.dir = options.dir.resolve()
    options.machine = options.machine or machine_name()
    return options


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser, "polylora-bench", "16 GB and more")
    parser.add_argument("--cases", nargs="+", default=["0", "8", "64", "loop"], help="numbers of adapters, or loop")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--popularity", choices=("uniform", "zipf", "distinct"), default="uniform")
    parser.add_argument("--slots", type=int, default=64, help="distinct adapters in a step; the pool holds 8 more")
    parser.add_argument("--loaded", type=int, help="adapters that host memory holds (default: all)")
    parser.add_argument(
        "--directories", type=int, default=64, help="different adapters on disk, 84 MB each, and one more"
    )
    parser.add_argument("--starts", type=int, default=1, help="times to start the server; the last one gets the load")
    return parsed(parser, arguments)


def machine_name() -> str:
    """The GPU's name, asked for without taking a place on it, or else the processor's."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.strip()
    return machine(os.cpu_count() or 1)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the time is over."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _give_up(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("the time of --limit is over")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with time_limit(options.limit):
        run(options)


if __name__ == "__main__":
    main()
