"""The versioned CSV of benchmark results: one line a metric, with date, commit and machine."""

import argparse
import csv
import datetime
import platform
import subprocess
import sys
from pathlib import Path


def add_csv_arguments(parser: argparse.ArgumentParser, machine_name: str = "") -> None:
    """--csv, --machine and --commit: what append_csv is given. machine_name: if none is; "": the benchmark finds it."""
    parser.add_argument("--csv", type=Path, help="append the results here, results.csv beside this file by custom")
    default = machine_name or "what it runs on"
    parser.add_argument("--machine", default=machine_name, help=f"name written into the CSV; default: {default}")
    parser.add_argument("--commit", default="", help="commit written into the CSV; default: git's HEAD")


def report(options: argparse.Namespace, name: str, metrics: dict[str, float], prefix: str = "") -> None:
    """Prints a case's figures, and appends them where --csv says: there with a prefix to the name."""
    sys.stdout.write(f"{name}  {'  '.join(f'{metric} {value:.4g}' for metric, value in metrics.items())}\n")
    sys.stdout.flush()
    if options.csv:
        append_csv(options.csv, options.machine, prefix + name, metrics, options.commit)


def append_csv(path: Path, machine_name: str, benchmark: str, metrics: dict[str, float], commit: str = "") -> None:
    """Appends date, commit, machine, benchmark, metric, value; writes the header first where there is none.

    commit: git's HEAD unless given, as it must be where there is no repository.
    """
    if not commit:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip()
    head = [datetime.date.today().isoformat(), commit, machine_name, benchmark]
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(["date", "commit", "machine", "benchmark", "metric", "value"])
        for metric, value in metrics.items():
            writer.writerow([*head, metric, f"{value:.4g}"])


def machine(num_threads: int) -> str:
    """The processor, as far as the system tells, and the threads in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {num_threads} threads"
