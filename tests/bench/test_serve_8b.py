"""The serving benchmark from end to end on a tiny model, and its way of failing."""

import csv
from pathlib import Path

import pytest

from tests.bench.serve_8b import main

SIZES = ["--tiny", "--clients", "2", "--requests", "1", "--input-tokens", "9", "--output-tokens", "5"]


def test_it_starts_a_server_and_measures_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.csv"
    main([*SIZES, "--dir", str(tmp_path), "--cases", "0", "9", "loop", "--directories", "4", "--csv", str(results)])
    with results.open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["benchmark"], row["metric"]) for row in rows}
    assert {name for name, _ in found} == {
        "start_up adapters=8",
        "serving base models=1 uniform clients=2",
        "serving adapters models=9 uniform clients=2",
        "serving adapters models=8 uniform clients=2",
        "serving adapters models=8 uniform clients=2 loading",
    }
    assert ("serving adapters models=8 uniform clients=2 loading", "itl_p99_over_quiet") in found
    assert {"ready_s", "first_token_s", "imports_s", "model_s", "adapters_s", "all_s"} <= {
        metric for name, metric in found if name.startswith("start_up")
    }
    assert "1 adapters loaded in" in capsys.readouterr().out


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended"):
        main([*SIZES, "--dir", str(tmp_path), "--cases", "0", "--", "--num-kv-blocks", "1"])
    assert "there is KV for" in capsys.readouterr().out
