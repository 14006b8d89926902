"""How long the command line takes to answer: whole processes, medians.

python benchmarks/startup.py [--runs 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = (["--help"], ["run", "--help"], ["list", "methods"], ["list", "recipes"], ["list", "metrics"])


def wall(command: list[str]) -> float:
    """Seconds of one process from start to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "perdure", *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    for command in COMMANDS:
        wall(command)
        seconds = sorted(wall(command) for _ in range(asked.runs))
        row = {"command": "perdure " + " ".join(command), "median": statistics.median(seconds), "max": seconds[-1]}
        rows.append(row)
        print(f"{row['command']:<24} median {row['median']:.2f} s   max {row['max']:.2f} s")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
