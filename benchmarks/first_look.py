"""What the check of every file before a run costs, against a bare loop that decodes the same files.

    python benchmarks/first_look.py [--count 200] [--json FILE]

Photographs of 825 x 550 pixels (JPEG) with masks (PNG) are written to a temporary folder. Timed in turn, in processor
time of one thread:

* a bare loop that decodes image and mask with Pillow;
* the survey of the package, nothing remembered: both decoded, sizes and labels compared, pixels digested;
* the survey again: every file is known by path, size and time of change.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from perdure.data.readers.folders import open_folders
from perdure.data.survey import survey

WIDTH, HEIGHT = 825, 550


def write_photographs(root: Path, count: int) -> None:
    for split, number in (("train", count - count // 4), ("test", count // 4)):
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for index in range(number):
            draw = np.random.default_rng((index, number))
            coarse = Image.fromarray(draw.integers(0, 255, (30, 45, 3), np.uint8))
            coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(root / split / "images" / f"{index:04d}.jpg")
            coarse = Image.fromarray(draw.integers(0, 3, (6, 9), np.uint8))
            mask = coarse.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
            mask.save(root / split / "masks" / f"{index:04d}.png")
    (root / "classes.txt").write_text("1 leaf\n2 stem\n")


def bare(root: Path) -> None:
    for path in sorted(root.glob("*/*/*")):
        with Image.open(path) as file:
            np.asarray(file)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_photographs(root, asked.count)
        times: dict[str, list[float]] = {"bare loop": [], "first survey": [], "survey again": []}
        for turn in range(asked.repeats):
            os.environ["PERDURE_CACHE"] = str(Path(folder) / f"cache-{turn}")
            times["bare loop"].append(seconds(lambda: bare(root)))
            for name in ("first survey", "survey again"):
                times[name].append(seconds(lambda: survey(open_folders(root), lambda _: lambda: None)))
    middle = {name: statistics.median(found) for name, found in times.items()}
    for name, value in middle.items():
        each, ratio = 1000 * value / asked.count, value / middle["bare loop"]
        print(f"{name:14} {each:7.2f} ms per photograph with mask   {ratio:6.3f} x bare loop")
    if asked.json:
        asked.json.write_text(json.dumps({"count": asked.count, "seconds": times}))


if __name__ == "__main__":
    main()
