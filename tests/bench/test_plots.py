"""The plots draw what the CSV holds, and leave out what it has not."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.plots import HERE, main
from tests.bench.results import append_csv
from tests.bench.svg import scale

SVG = "{http://www.w3.org/2000/svg}"


def test_the_figures_of_the_repository_can_be_drawn(tmp_path: Path) -> None:
    main(["--out", str(tmp_path)])
    words = [element.text for element in ElementTree.parse(tmp_path / "throughput.svg").iter(f"{SVG}text")]
    assert {"base", "8 adapters", "Polylora", "vLLM 0.26.0", "SGLang 0.5.16", "256"} <= set(words)
    for path in (HERE / "plots").glob("*.svg"):
        assert (tmp_path / path.name).exists(), f"{path.name} is not drawn any more"


def test_the_newest_figure_of_the_last_machine_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.csv"
    for machine, value in (("card", 40.0), ("other card", 90.0), ("card", 20.0)):
        append_csv(
            results, machine, "gpu_step context=512 rank=16 rows=64 adapters=8", {"lora_overhead_percent": value}, "c0"
        )
    main(["--results", str(results), "--out", str(tmp_path)])
    root = ElementTree.parse(tmp_path / "overhead.svg").getroot()
    (point,) = root.iter(f"{SVG}circle")
    (rule, *_) = [line for line in root.iter(f"{SVG}path") if line.get("d", "").endswith("H316.0")][::-1]
    assert float(rule.get("d", "").partition(" ")[2].partition("H")[0]) == float(point.get("cy", ""))  # 20 is the top
    assert "itl: no figures yet" in capsys.readouterr().out


def test_times_between_tokens_stand_beside_the_quiet_ones(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    for suffix, p99 in (("", 10.0), (" loading", 11.0)):
        metrics = {"itl_p50_ms": 5.0, "itl_p99_ms": p99}
        append_csv(results, "card", f"serving adapters models=8 uniform clients=64{suffix}", metrics, "c0")
    main(["--results", str(results), "--out", str(tmp_path)])
    bars = list(ElementTree.parse(tmp_path / "itl.svg").iter(f"{SVG}rect"))
    assert len(bars) == 1 + 4 + 2  # the background, two panels of two, the legend


@pytest.mark.parametrize(
    ("largest", "end", "step"), [(9889, 10000, 2000), (0.42, 0.5, 0.1), (12, 12.5, 2.5), (1, 1, 0.2)]
)
def test_axes_end_at_round_numbers(largest: float, end: float, step: float) -> None:
    assert scale(largest) == (pytest.approx(end), pytest.approx(step))
