"""`polylora adapters` against a running gateway: what it prints, and how it fails."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.cli import main
from tests.processes import EchoProcess, GatewayProcess, running

Run = tuple[int, str, str]


@pytest.fixture(scope="module")
def gateway(echo: EchoProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    log: Path = tmp_path_factory.mktemp("gateway") / "log"
    with running(GatewayProcess(log, "--worker-endpoint", echo.endpoint, "--admin-key", "admin")) as process:
        yield process


def adapters(gateway: GatewayProcess, capsys: pytest.CaptureFixture[str], *arguments: str, key: str = "admin") -> Run:
    url = f"http://127.0.0.1:{gateway.port}/v1/"
    status = main(["adapters", arguments[0], "--url", url, "--admin-key", key, *arguments[1:]])
    return (status, *capsys.readouterr())


def test_an_adapters_life(gateway: GatewayProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapters(gateway, capsys, "load", "team/n", "z", "--pinned") == (
        0,
        "team/n: ready, generation 3, pinned\n",
        "",
    )
    status, listed, _ = adapters(gateway, capsys, "list")
    head, *lines = listed.splitlines()
    titles = ["NAME", "STATE", "GENERATION", "RANK", "PINNED", "ON", "IN", "FLIGHT", "SOURCE"]
    assert status == 0 and head.split() == titles
    assert lines[-1].split() == ["team/n", "ready", "3", "8", "yes", "device,host,disk", "0", "z"]
    assert adapters(gateway, capsys, "pin", "team/n", "--off")[1] == "team/n: ready, generation 3\n"
    assert adapters(gateway, capsys, "pin", "team/n")[1] == "team/n: ready, generation 3, pinned\n"
    replaced = adapters(gateway, capsys, "load", "team/n", "y", "--replace", "--expected-generation", "3", "--json")
    assert json.loads(replaced[1])["generation"] == 4
    status, stats, _ = adapters(gateway, capsys, "stats")
    assert status == 0 and "1000 B" in stats and "device: 3 of 100 chunks of 1000 B in use" in stats
    assert adapters(gateway, capsys, "unload", "team/n", "--force", "--timeout", "5")[1] == (
        "team/n: removed, generation 4\n"
    )
    assert adapters(gateway, capsys, "load", "found")[1] == "found: ready, generation 5\n"
    assert adapters(gateway, capsys, "unload", "found", "--expected-generation", "5")[0] == 0
    assert adapters(gateway, capsys, "load", "n", "slow", "--no-wait")[1] == "n: loading\n"
    assert adapters(gateway, capsys, "unload", "n")[1] == "n: cancelled\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unload", "nothing"), "No adapter 'nothing' is loaded."),
        (("load", "lora0", "z"), "loaded already"),
        (("load", "n", "bad"), "'bias' is not supported"),
        (("load", "not ok", "z"), "name must be 1 to 128"),
        (("pin", "nothing"), "No adapter 'nothing' is loaded."),
    ],
)
def test_failures_are_one_line(
    arguments: tuple[str, ...], message: str, gateway: GatewayProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, error = adapters(gateway, capsys, *arguments)
    assert status == 1 and out == "" and error.count("\n") == 1
    assert message in error and error.startswith(f"polylora adapters {arguments[0]}: ")


def test_a_wrong_key_and_a_server_that_is_not_there(
    gateway: GatewayProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = adapters(gateway, capsys, "list", key="wrong")
    assert status == 1 and "API key" in error
    assert adapters(gateway, capsys, "list", key="ké")[2].endswith("characters that a header cannot carry\n")
    assert main(["adapters", "list", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("polylora adapters list: ")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_has_seen_enough_is_no_failure(gateway: GatewayProcess, options: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    url = f"http://127.0.0.1:{gateway.port}"
    program = "import sys; from gateway.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "adapters", "list", "--url", url, "--admin-key", "admin", *options]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_commands_and_options_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["drop"], ["list", "--made-up"], ["load"], ["unload", "n", "--timeout", "soon"]):
        with pytest.raises(SystemExit) as refused:
            main(["adapters", *arguments])
        assert refused.value.code == 2
