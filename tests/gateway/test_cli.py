"""The command line, and `serve` with a stand-in for the worker."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from gateway.config import GatewayConfig, add_options, config_from
from gateway.quotas import Limit
from tests.processes import ROOT, wait_for_port

STAND_IN = "import runpy; runpy.run_module('tests.echo_worker', run_name='__main__')\n"


@pytest.fixture
def path_with_worker(directory: Path) -> str:
    """A module search path on which `python -m worker` is the echo worker."""
    package = directory / "worker"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    return f"{directory}:{ROOT}"


def serve(path: str, directory: Path, *options: str) -> "subprocess.Popen[bytes]":
    code = f"import sys; sys.path[:0] = {path.split(':')!r}; from gateway.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(directory)}
    with (directory / "log").open("wb") as log:
        command = [sys.executable, "-P", "-c", code, "serve", *options]
        return subprocess.Popen(command, cwd=directory, env=environment, stderr=log)


def child_of(process: "subprocess.Popen[bytes]") -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def alive(pid: int) -> bool:
    """True unless it has ended; one that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_serve_starts_a_worker_and_ends_it(path_with_worker: str, directory: Path) -> None:
    process = serve(path_with_worker, directory, "--port", "0", "--lora-paths", "lora0=x", "b=y", "--credits", "7")
    try:
        port = wait_for_port(directory / "log", process)
        [private] = directory.glob("polylora-*")
        assert private.stat().st_mode & 0o777 == 0o700
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as reply:
            assert b'"lora0"' in reply.read()
        worker = child_of(process)
        process.terminate()
        assert process.wait(20) == 0
        assert not alive(worker)
        assert not list(directory.glob("polylora-*"))
    finally:
        process.kill()
        process.wait()


def test_serve_fails_with_its_worker(path_with_worker: str, directory: Path) -> None:
    process = serve(path_with_worker, directory, "--port", "0", "--no-such-option")
    assert process.wait(30) == 2
    assert "--no-such-option" in (directory / "log").read_text()
    process = serve(path_with_worker, directory, "--port", "0")
    try:
        wait_for_port(directory / "log", process)
        os.kill(child_of(process), signal.SIGKILL)
        assert process.wait(20) == 1
    finally:
        process.kill()
        process.wait()


def test_a_worker_does_not_outlive_a_killed_gateway(path_with_worker: str, directory: Path) -> None:
    process = serve(path_with_worker, directory, "--port", "0")
    wait_for_port(directory / "log", process)
    worker = child_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(worker)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--worker-endpoint is required"),
        (["--worker-endpoint", "tcp://10.0.0.1:5555"], "CURVE"),
        (["--worker-endpoint", "ipc://@abstract"], "path of a socket"),
        (["--worker-endpoint", "ipc:///x", "--made-up", "1"], "unrecognized arguments"),
        (["--worker-endpoint", "ipc:///x", "--max-bod", "1"], "unrecognized arguments"),
        (["--worker-endpoint", "ipc:///x", "--port", "70000"], "port must be"),
        (["--worker-endpoint", "ipc:///x", "--log-level", "loud"], "log_level must be"),
        (["--worker-endpoint", "ipc:///x", "--adapter-rpm", "60", "gold"], "--adapter-rpm: 'gold' is neither N nor"),
    ],
)
def test_bad_options_of_the_gateway(options: list[str], said: str) -> None:
    command = [sys.executable, "-m", "gateway", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2
    assert said in run.stderr


def parsed(*options: str) -> GatewayConfig:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return config_from(parser.parse_args(options))


def test_quotas_are_set_for_all_and_by_name() -> None:
    config = parsed("--adapter-rpm", "60", "gold=600", "team/a:b=0", "--adapter-rpm", "free=10", "--adapter-tpm", "x=5")
    assert config.adapter_rpm == Limit(60, {"gold": 600, "team/a:b": 0, "free": 10})
    assert config.adapter_tpm == Limit(0, {"x": 5})
    assert config.adapter_concurrency == Limit()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["-1"], "'-1' is neither"),
        (["1.5"], "'1.5' is neither"),
        (["gold=many"], "'gold=many' is neither"),
        (["=5"], "'=5' is neither"),
        (["not ok=5"], "'not ok=5' is neither"),
        (["60", "gold=1000001"], "'gold=1000001' is neither N nor NAME=N, N a number of 0 to 1000000"),
        (["9" * 5000], "is neither"),
        (["60", "70"], "'70' comes after another for all"),
        (["gold=1", "gold=2"], "'gold=2' comes after another for gold"),
    ],
)
def test_a_bad_quota_is_named(values: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"^--adapter-concurrency: .*{re.escape(said)}"):
        parsed("--adapter-concurrency", *values)


def test_help_states_every_option_with_its_default() -> None:
    command = [sys.executable, "-m", "gateway", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    for name in GatewayConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert text.count("(default:") == len(GatewayConfig.__dataclass_fields__)


def test_bare_polylora_names_its_commands() -> None:
    command = [sys.executable, "-c", "from gateway.cli import main; main(['--help'])"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "serve" in text
    assert "chat" in text


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("x", False)]
)
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    assert GatewayConfig(host=host).is_loopback is loopback
