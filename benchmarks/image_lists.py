"""Time to build the image lists of a class-incremental stream from PNG masks: first time, and remembered.

    python benchmarks/image_lists.py [--count 10000] [--json FILE]

Masks of 500 x 375 pixels with up to four objects of 20 classes are written to a temporary folder in the VOC
layout. Three ways to the lists of 15-1 with overlap are timed:

* a plain loop over images with ``np.unique`` and Python sets (for comparison);
* the package, nothing remembered: every mask is decoded and fingerprinted;
* the package again: fingerprints only, the presence matrix comes from the cache. Each with a fresh reader.

The operating system's file cache is warm in all three. The three results are checked to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perdure.data.readers.voc import open_voc
from perdure.streams import lists
from perdure.streams.class_incremental import split_classes

CLASSES, HEIGHT, WIDTH = 20, 375, 500
GROUPS = split_classes(range(1, CLASSES + 1), 15, 1)


def write_masks(root: Path, count: int) -> int:
    """Write a data set in the VOC layout; returns the bytes of its masks."""
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    names = [f"m_{i:06d}" for i in range(count)]
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(names))
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]

    def write(index: int) -> int:
        draw = np.random.default_rng(index)
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        for _ in range(draw.integers(1, 5)):
            y, x, h, w = draw.uniform((0, 0, 20, 20), (HEIGHT, WIDTH, 120, 160))
            distance = ((rows - y) / h) ** 2 + ((columns - x) / w) ** 2 + 0.1 * np.sin(columns / 7) * np.sin(rows / 5)
            mask[distance < 1.1] = 255  # a ring of void, as VOC has it
            mask[distance < 1.0] = min(CLASSES, int(draw.geometric(0.15)))
        path = root / "SegmentationClass" / f"{names[index]}.png"
        Image.fromarray(mask).save(path)
        (root / "JPEGImages" / f"{names[index]}.jpg").touch()
        return path.stat().st_size

    with ThreadPoolExecutor() as pool:
        return sum(pool.map(write, range(count)))


def plain_loop(root: Path) -> list[list[int]]:
    """Lists as a loop over images makes them."""
    names = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    found: list[list[int]] = [[] for _ in GROUPS]
    for row, name in enumerate(names):
        with Image.open(root / "SegmentationClass" / f"{name}.png") as file:
            shown = set(np.unique(np.asarray(file)).tolist())
        for task, group in enumerate(GROUPS):
            if shown & set(group):
                found[task].append(row)
    return found


def package(root: Path) -> list[list[int]]:
    """Lists as the package makes them, with a fresh reader."""
    presence = lists.cached_presence(open_voc(root), "train")
    return [rows.tolist() for rows in lists.overlap(presence, GROUPS)]


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds on the clock, seconds of processor time (all threads), and the result."""
    start, used = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - start, time.process_time() - used, result


def measure(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "voc"
        os.environ["PERDURE_CACHE"] = str(Path(folder) / "cache")
        size = write_masks(root, count)
        ways = {
            "plain loop": timed(lambda: plain_loop(root)),
            "package, first time": timed(lambda: package(root)),
            "package, remembered": timed(lambda: package(root)),
        }
        presence = lists.cached_presence(open_voc(root), "train")
        rules = {
            rule.__name__: timed(lambda rule=rule: rule(presence, GROUPS))[0]
            for rule in (lists.overlap, lists.disjoint, lists.seen, lists.partition_by_rarest)
        }
        results = [result for _, _, result in ways.values()]
        if any(result != results[0] for result in results):
            raise SystemExit("the three ways disagree")
        kept = sum(f.stat().st_size for f in Path(os.environ["PERDURE_CACHE"]).rglob("*.bits"))
    return {
        "masks": count,
        "mask_bytes": size,
        "cache_bytes": kept,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "seconds": {name: clock for name, (clock, _, _) in ways.items()},
        "processor_seconds": {name: used for name, (_, used, _) in ways.items()},
        "rules_seconds": rules,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="number of masks")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    figures = measure(options.count)
    loop = figures["seconds"]["plain loop"]
    size = f"{WIDTH} x {HEIGHT}, {figures['mask_bytes'] / 1e6:.0f} MB"
    print(f"{figures['masks']} masks of {size}, {figures['cores']} cores")
    print(f"{'way':<24}{'seconds':>10}{'processor s':>13}{'ms a mask':>11}{'speed-up':>10}")
    for name, seconds in figures["seconds"].items():
        used, each = figures["processor_seconds"][name], 1e3 * seconds / figures["masks"]
        print(f"{name:<24}{seconds:>10.2f}{used:>13.2f}{each:>11.3f}{loop / seconds:>9.1f}x")
    rules = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in figures["rules_seconds"].items())
    print(f"rules on the matrix: {rules}; cache file {figures['cache_bytes'] / 1e3:.0f} kB")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
