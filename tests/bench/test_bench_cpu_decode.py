"""The CPU benchmark runs and writes its lines."""

import csv
from pathlib import Path

import pytest

from tests.bench.bench_cpu_decode import main
from tests.tiny_models import write_tiny_model


def test_it_measures_and_appends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir, results = write_tiny_model(tmp_path / "model"), tmp_path / "results.csv"
    arguments = ["--model", str(model_dir), "--rounds", "1", "--context", "20", "--csv", str(results)]
    main(arguments)
    main(arguments)
    with results.open() as file:
        rows = list(csv.DictReader(file))
    metrics = [row["metric"] for row in rows]
    assert len(metrics) == 2 * len(set(metrics))
    assert all(float(row["value"]) > 0 for row in rows)
    assert "one_base_of_limit" in capsys.readouterr().out
