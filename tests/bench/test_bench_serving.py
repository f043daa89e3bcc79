"""The serving client against the echo worker: it counts what the server says, and fails loudly on anything else."""

import csv
from pathlib import Path

import pytest

from tests.bench.bench_serving import main
from tests.processes import EchoProcess, GatewayProcess, running


def test_it_measures_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.csv"
    with running(EchoProcess(tmp_path, "--lora-paths", "lora0=x", "lora1=y")) as echo:
        gateway = GatewayProcess(tmp_path / "log", "--worker-endpoint", echo.endpoint)
        with running(gateway):
            url = ["--url", f"http://127.0.0.1:{gateway.port}", "--vocab-size", "100"]
            sizes = ["--input-tokens", "8", "--output-tokens", "5", "--requests", "2"]
            main([*url, *sizes, "--models", "lora0", "lora1", "--clients", "1", "4", "--csv", str(results)])
            words = ["--popularity", "distinct", "--text", "--processes", "2", "--duration", "0"]
            main([*url, *sizes, *words, "--models", "lora0", "lora1", "--clients", "3"])
            with pytest.raises(RuntimeError, match="lora9"):
                main([*url, *sizes, "--models", "lora9"])
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} >= {"output_tokens_per_s", "ttft_p50_ms", "tpot_p99_ms"}
    assert len(rows) == 2 * len({row["metric"] for row in rows})
    may_be_zero = ("tpot", "itl")  # one event may bring all
    assert all(float(row["value"]) > 0 for row in rows if not row["metric"].startswith(may_be_zero))
    shown = capsys.readouterr().out
    assert "clients=4" in shown and "models=2 distinct clients=3 output_tokens_per_s=" in shown
