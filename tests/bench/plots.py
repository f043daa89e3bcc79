"""Draws the benchmarks' CSV files into tests/bench/plots: the newest figure of each, of one machine a plot.

    python -m tests.bench.plots [--machine NAME]

throughput.svg  output tokens a second against clients, beside peers.csv
overhead.svg    what adapters add to a decode step, against their number
prefill.svg     what adapters add to a prompt, against its tokens
itl.svg         time between tokens, quiet and while an adapter is loaded in a loop
"""

import argparse
import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.svg import Panel, Series, chart

HERE = Path(__file__).parent
Row = dict[str, str]
OURS = "Polylora"


@dataclass(frozen=True, slots=True)
class Figures:
    """The newest value of one metric for each benchmark that matches a pattern, on one machine."""

    values: dict[tuple[str, ...], float]  # by the pattern's groups
    machine: str
    note: str  # machine, days and commits


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: list[Row], pattern: str, metric: str, machine: str | None) -> Figures | None:
    """machine: that of the last row that matches, unless given. None if no row does."""
    found = [
        (match.groups(), row)
        for row in rows
        if row["metric"] == metric and (match := re.fullmatch(pattern, row["benchmark"])) is not None
    ]
    wanted = machine or (found[-1][1]["machine"] if found else "")
    last = {key: row for key, row in found if row["machine"] == wanted}
    if not last:
        return None
    days = sorted({row["date"] for row in last.values()})
    commits = list(dict.fromkeys(row["commit"] for row in last.values()))
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    values = {key: float(row["value"]) for key, row in last.items()}
    return Figures(values, wanted, f"{wanted}, {span}, commit {', '.join(commits)}")


def places_of(*all_values: dict[str, float]) -> list[str]:
    """The numbers on an x axis."""
    return sorted({place for values in all_values for place in values}, key=int)


def throughput(rows: list[Row], peers: list[Row], machine: str | None) -> str | None:
    found = newest(rows, r"serving .*models=(\d+) uniform clients=(\d+)", "output_tokens_per_s", machine)
    if found is None:
        return None
    panels = []
    for models, title in ((1, "base"), (8, "8 adapters"), (64, "64 adapters")):
        ours = {clients: value for (count, clients), value in found.values.items() if int(count) == models}
        series = [Series(OURS, ours)] if ours else []
        for server in dict.fromkeys(peer["server"] for peer in peers):
            values = {
                peer["clients"]: float(peer["output_tokens_per_s"])
                for peer in peers
                if peer["server"] == server and int(peer["adapters"]) == (models if models > 1 else 0)
            }
            if values:
                series.append(Series(server, values, is_dashed=True))
        panels.append(Panel(title, "clients", places_of(*(each.values for each in series)), series))
    note = f"{OURS}: {found.note}. Peers: {peers[0]['machine']}, {peers[0]['date']}, another run"
    return chart(panels, "output tokens / s", note)


def overhead(rows: list[Row], machine: str | None) -> str | None:
    """Of decode steps: a line for each number of rows."""
    found = newest(rows, r"gpu_step context=512 rank=16 rows=(\d+) adapters=(\d+)", "lora_overhead_percent", machine)
    if found is None:
        return None
    title, axis = "decode step, rank 16, all modules", "adapters in the batch"
    return over_base(found.values, found.note, title, axis, "rows", is_bars=False)


def prefill(rows: list[Row], machine: str | None) -> str | None:
    """Of prompts: bars for each number of adapters."""
    found = newest(rows, r"gpu_prefill rank=16 tokens=(\d+) adapters=(\d+)", "lora_overhead_percent", machine)
    if found is None:
        return None
    values = {(adapters, tokens): value for (tokens, adapters), value in found.values.items()}
    return over_base(
        values, found.note, "prompts, rank 16, all modules", "tokens of the step", "adapters", is_bars=True
    )


def over_base(
    values: dict[tuple[str, ...], float], note: str, title: str, axis: str, unit: str, *, is_bars: bool
) -> str:
    """LoRA's overhead: a series for each first key, called by it and unit, over the second keys."""
    series = [
        Series(f"{first} {unit}", {second: value for (of, second), value in values.items() if of == first})
        for first in sorted({first for first, _ in values}, key=int)
    ]
    panel = Panel(title, axis, places_of(*(each.values for each in series)), series, is_bars=is_bars)
    return chart([panel], "% over the base", note)


def inter_token(rows: list[Row], machine: str | None) -> str | None:
    panels, note = [], ""
    for metric, title in (("itl_p50_ms", "median"), ("itl_p99_ms", "99th percentile")):
        loading = newest(rows, r"serving (.*) loading", metric, machine)
        if loading is None:
            return None
        quiet = newest(rows, r"serving (.*clients=\d+)", metric, loading.machine)
        assert quiet is not None
        clients = {name: re.sub(r".*clients=", "", name) for (name,) in loading.values}
        series = [
            Series(state, {clients[name]: figures.values[name,] for name in clients if (name,) in figures.values})
            for state, figures in (("quiet", quiet), ("while an adapter is loaded in a loop", loading))
        ]
        panels.append(Panel(title, "clients", places_of(*(each.values for each in series)), series, is_bars=True))
        note = loading.note
    return chart(panels, "ms between tokens", note)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", help="as the CSV has it (default: the last one that has the figures)")
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    parser.add_argument("--out", type=Path, default=HERE / "plots")
    options = parser.parse_args(arguments)
    rows, peers = read(options.results), read(HERE / "peers.csv")
    plots: dict[str, Callable[[], str | None]] = {
        "throughput": lambda: throughput(rows, peers, options.machine),
        "overhead": lambda: overhead(rows, options.machine),
        "prefill": lambda: prefill(rows, options.machine),
        "itl": lambda: inter_token(rows, options.machine),
    }
    options.out.mkdir(exist_ok=True)
    for name, draw in plots.items():
        drawn = draw()
        if drawn is None:
            print(f"{name}: no figures yet")
            continue
        path = options.out / f"{name}.svg"
        path.write_text(drawn)
        print(path)


if __name__ == "__main__":
    main()
