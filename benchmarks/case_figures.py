"""Seconds per case of Dice, HD95, average surface distance and surface Dice, beside bare MONAI calls.

``python benchmarks/case_figures.py`` makes a volume of 64 x 128 x 128 voxels with 5 structures and a prediction of
it. ``perdure`` finds the box of each structure and computes the three figures from one set of distances; ``MONAI``
calls its three functions on the one-hot volume. The largest difference of their figures is printed too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perdure.metrics.confusion import paired, tally
from perdure.metrics.surfaces import surface_figures

SIZE = (64, 128, 128)
SPACING = (3.0, 0.8, 0.8)
CLASSES = 5
TOLERANCE = 2.0


def volume(seed: int) -> tuple[Tensor, Tensor]:
    """Ground truth with an ellipsoid per class, and a prediction that is moved and has holes at its surface."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij")
    masks = np.zeros((2, *SIZE), np.int64)
    for c in range(1, CLASSES + 1):
        centre = [rng.uniform(0.25 * n, 0.75 * n) for n in SIZE]
        radii = [rng.uniform(0.1 * n, 0.22 * n) for n in SIZE]
        for mask, moved in zip(masks, (0.0, 2.0), strict=True):
            away = sum(((g - m - moved) / r) ** 2 for g, m, r in zip(grid, centre, radii, strict=True))
            mask[away + (rng.normal(0, 0.05, SIZE) if moved else 0) < 1] = c
    truth, guess = (torch.from_numpy(mask) for mask in masks)
    return truth, guess


def ours(truth: Tensor, guess: Tensor) -> np.ndarray:
    """Counts and surfaces as the evaluation takes them."""
    pairs = paired(truth[None], guess[None], tuple(range(CLASSES + 1)))
    tally(*pairs, CLASSES + 1)
    return surface_figures(pairs[0][0], pairs[1][0], CLASSES + 1, SPACING, TOLERANCE)[1:]


def bare(truth: Tensor, guess: Tensor) -> np.ndarray:
    """Four calls of MONAI's functions."""
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    one, other = (torch.nn.functional.one_hot(v, CLASSES + 1).movedim(-1, 0)[None].float() for v in (guess, truth))
    steps = list(SPACING)
    compute_dice(one, other, include_background=False)
    hd95 = compute_hausdorff_distance(one, other, percentile=95, spacing=steps)[0]
    asd = compute_average_surface_distance(one, other, symmetric=True, spacing=steps)[0]
    nsd = compute_surface_dice(one, other, [TOLERANCE] * CLASSES, spacing=steps)[0]
    return torch.stack([hd95, asd, 100 * nsd], 1).numpy()


def seconds(what: Callable[[Tensor, Tensor], np.ndarray], cases: int) -> tuple[float, list[np.ndarray]]:
    """Processor time per case, the first one, which imports, left out: other programs of the machine do not count."""
    what(*volume(0))
    spent, found = 0.0, []
    for seed in range(1, cases + 1):
        pair = volume(seed)
        started = time.process_time()
        found.append(what(*pair))
        spent += time.process_time() - started
    return spent / cases, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3)
    cases = parser.parse_args().cases
    torch.set_num_threads(1)
    one, other = seconds(ours, cases), seconds(bare, cases)
    worst = max(float(np.abs(a - b).max()) for a, b in zip(one[1], other[1], strict=True))
    result: dict[str, Any] = {
        "size": SIZE,
        "classes": CLASSES,
        "perdure seconds per case": round(one[0], 3),
        "MONAI seconds per case": round(other[0], 3),
        "largest difference (mm, %)": worst,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
