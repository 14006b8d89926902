"""Peak memory and time of predicting one case, by number of classes.

``python benchmarks/predict_memory.py`` runs each case in a process of its own and prints a table. The photograph goes
through DeepLab with a tiny backbone, scores averaged where windows overlap; the volume through a 3D U-Net with one head
per 8 classes, each voxel from the window in whose middle it lies. ``all at once`` is the bare alternative: scores
averaged and all of them held together.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from perdure.data.preparation import Preparation
from perdure.inference.case import predict_cases
from perdure.methods.prediction import Prediction
from perdure.methods.training import sigmoid_scores
from perdure.networks.build import build_network
from perdure.networks.network import GrowingNetwork
from perdure.networks.segmenter import Segmenter

CASES = {"photograph 3000 x 4000": (3000, 4000), "volume 192 x 256 x 256": (192, 256, 256)}
CLASSES = (2, 20, 150)
ALL = 1 << 40


def network_for(dims: int, classes: int) -> GrowingNetwork:
    """A small network with classifiers of at most 8 classes."""
    torch.manual_seed(0)
    if dims == 2:
        options = {"backbone": "tiny_resnet", "tiny_channels": [8, 16, 16, 32], "output_stride": 8, "width": 32}
        network = build_network("deeplab", 2, 3, **options)
    else:
        network = build_network("residual_unet", 3, 1, widths=[4, 8])
    assert isinstance(network, Segmenter)
    for first in range(0, classes, 8):
        network.grow(min(8, classes - first))
    return network.eval()


def measure(case: str, classes: int, at_once: int) -> dict[str, float]:
    """Seconds and peak resident memory in MiB of this process, over what it had before the prediction."""
    size = CASES[case]
    network = network_for(len(size), classes)
    images = torch.rand(1, 3 if len(size) == 2 else 1, *size, generator=torch.Generator().manual_seed(1))
    blend: Literal["average", "centre"] = "centre" if len(size) == 3 and at_once != ALL else "average"
    window = 512 if len(size) == 2 else 96
    preparation = Preparation(dims=len(size), channels=images.shape[1], window=window, blend=blend)
    groups = (1 + min(8, classes), *(min(8, classes - first) for first in range(8, classes, 8)))

    def predict(window: Tensor) -> Prediction:
        whole = sigmoid_scores(network, window, range(1, classes + 1))
        return Prediction(whole.class_ids, whole.score, groups, whole.held_bytes)

    with torch.inference_mode():
        predict(images[(slice(None), slice(None), *[slice(0, 96)] * len(size))]).score([0, 1])
        before, start = _peak(), time.perf_counter()
        found = predict_cases(predict, images, preparation, size, at_once)
    assert found.labels.shape == (1, *size)
    return {"seconds": time.perf_counter() - start, "before": before, "peak": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, or measure one case if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case")
    parser.add_argument("--classes", type=int)
    parser.add_argument("--at-once", type=int, default=1 << 26)
    asked = parser.parse_args(arguments)
    if asked.case:
        print(json.dumps(measure(asked.case, asked.classes, asked.at_once)))
        return
    print("| case | classes | peak, MiB | seconds | all at once: peak, MiB | seconds |\n|---|---|---|---|---|---|")
    for case in CASES:
        for classes in CLASSES:
            cells = []
            for at_once in (1 << 26, ALL):
                if at_once == ALL and classes == 150:
                    cells += ["not run", "-"]  # more than this machine has
                    continue
                words = [sys.executable, __file__, "--case", case, "--classes", str(classes), "--at-once", str(at_once)]
                done = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                cells += [f"{done['peak'] - done['before']:.0f}", f"{done['seconds']:.1f}"]
            print(f"| {case} | {classes} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
