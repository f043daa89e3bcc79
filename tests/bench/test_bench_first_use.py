"""The benchmark of an adapter's first use, from end to end on a tiny model."""

from pathlib import Path

from tests.bench import bench_first_use
from tests.bench.test_bench_adapters import figures


def test_every_request_in_turns_has_its_adapter_copied(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    bench_first_use.main(["--tiny", "--rounds", "4", "--dir", str(tmp_path), "--csv", str(results)])
    found = {metric: value for (_, metric), value in figures(results).items()}
    assert found["uploads"] >= 10, "of twelve requests in turns"
    assert found["resident_ms"] > 0 and found["in_host_memory_ms"] > 0
