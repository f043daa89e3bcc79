"""The benchmarks of many adapters and of loads beside streams, from end to end on a tiny model."""

import csv
import dataclasses
from pathlib import Path

import pytest

from tests.bench import bench_adapters, bench_beside_loads
from tests.bench.bench_beside_loads import Windows
from tests.bench.greedy_check import Parted, check

SIZES = ["--tiny", "--clients", "6", "--input-tokens", "9", "--output-tokens", "6"]


def figures(path: Path) -> dict[tuple[str, str], float]:
    with path.open() as file:
        return {(row["benchmark"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}


def test_adapters_that_fit_are_compared_with_those_that_do_not(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    few = ["--registered", "1", "40", "--resident", "16", "--slots", "8", "--loaded", "20", "--requests", "4"]
    more = ["--rounds", "1", "--processes", "2", "--dir", str(tmp_path), "--csv", str(results)]
    bench_adapters.main([*SIZES, *few, *more])
    found = figures(results)
    assert found["adapters memory", "chunks_total"] == bench_adapters.num_chunks(16) == 24
    assert found["adapters memory", "host_adapters"] == 20
    assert found["adapters registered=1", "models_at_once"] in (0, 1), "0: every answer came in one event"
    assert found["adapters registered=1", "uploads"] == 0, "it was brought to the device before"
    assert found["adapters registered=40 again", "uploads"] > 0
    assert found["adapters registered=40 resident", "uploads"] == 0
    assert found["adapters registered=40 over resident", "resident_share"] > 0
    assert found["adapters register 40", "load_s"] > 0


def test_streams_beside_loads_are_the_quiet_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.csv"
    bench_beside_loads.main(
        [*SIZES, "--output-tokens", "40", "--windows", "2", "--dir", str(tmp_path), "--csv", str(results)]
    )
    found = {metric: value for (_, metric), value in figures(results).items()}
    assert found["streams"] == found["exact"] == found["exact_quiet"] == 12
    assert found["loads"] == found["replaces"] == found["unloads"] >= 2
    assert {"p99_over_quiet", "worst_pair"} <= found.keys()
    assert found["quiet_worst_nats"] < 1e-3 and found["parted"] == 0
    assert found["least_foreign_nats"] > 0.01 and found["foreign_unnoticed"] == 0
    assert "exact 6 quiet, 6 beside, of 6" in capsys.readouterr().out


def test_streams_of_other_adapters_are_told_from_those_that_rounding_has_parted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = bench_beside_loads.parse([*SIZES, "--output-tokens", "40", "--dir", str(tmp_path)])
    with bench_beside_loads.streams_at(options) as traffic:
        quiet = bench_beside_loads.window(traffic, options)
        words = quiet[1].content.split(" ")
        words[21] = "2" if words[21] == "1" else "1"
        beside = [
            dataclasses.replace(quiet[0], content=quiet[1].content),  # what another adapter says, to another prompt
            dataclasses.replace(quiet[1], content=" ".join(words)),
            *quiet[2:],
        ]
        found = bench_beside_loads.check_streams(Windows([quiet, quiet], [quiet, beside]), traffic)
        lines = [line for line in capsys.readouterr().out.splitlines() if " parts at token " in line]
        streams = [bench_beside_loads.stream_of(answer, traffic) for answer in quiet]
        right, _ = check(traffic.load, streams, [Parted(streams[1], 0)])  # whatever was expected in its place
    assert found["parted"] == found["parted_by_more_than_rounding"] == len(lines) == 2
    assert found["foreign_unnoticed"] == 0
    assert lines[1].startswith("beside 1 a1 parts at token 20, ") and "MORE THAN ROUNDING" in lines[1]
    assert right["parted"] == 1 and right["parted_by_more_than_rounding"] == 0
