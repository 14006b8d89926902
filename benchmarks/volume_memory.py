"""Peak memory of predicting one volume, by number of classes.

``python benchmarks/volume_memory.py`` predicts each case in a process of its own and prints a table. A residual 3D
U-Net with one head per 8 classes gives sigmoid scores, as methods do; they go through the one way from a case to
labels.
``--raw 128 160 160`` gives the raw volume another size than the prepared one, so that scores have to be brought back to
it as well. Memory is resident, of the whole process: what it has before the prediction, and its peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from perdure.data.case import Grid
from perdure.data.preparation import Preparation
from perdure.inference.case import predict_cases
from perdure.methods.prediction import Prediction
from perdure.methods.training import sigmoid_scores
from perdure.networks.build import build_network
from perdure.networks.segmenter import Segmenter

Blend = Literal["average", "centre"]
CLASSES = (2, 20, 143)
HEAD = 8


def measure(classes: int, blend: Blend, size: tuple[int, ...], raw: tuple[int, ...]) -> dict[str, float]:
    """Processor seconds, and resident memory of this process in MiB: before the prediction, and at its peak."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = build_network("residual_unet", 3, 1, widths=[16, 32, 64])
    assert isinstance(network, Segmenter)
    for first in range(0, classes, HEAD):
        network.grow(min(HEAD, classes - first))
    network.eval()

    def predict(images: Tensor) -> Prediction:
        return sigmoid_scores(network, images, range(1, classes + 1))

    image = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1))
    preparation = Preparation(dims=3, channels=1, window=64, overlap=0.5, blend=blend)
    with torch.inference_mode():
        predict(image[..., :64, :64, :64]).score([0, 1])  # what the libraries need once is there before
        before, begun = _peak(), time.process_time()
        found = predict_cases(predict, image, preparation, Grid(raw))
        seconds = time.process_time() - begun
    assert found.labels.shape == (1, *raw)
    return {"seconds": seconds, "before": before, "peak": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--blend", choices=get_args(Blend), nargs="+", default=get_args(Blend))
    parser.add_argument("--size", type=int, nargs=3, default=(96, 128, 128))
    parser.add_argument(
        "--raw", type=int, nargs=3, help="size of the raw volume; that of the prepared one if not given"
    )
    parser.add_argument("--one", action="store_true", help="measure in this process, print one line of JSON")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    size, raw = tuple(asked.size), tuple(asked.raw or asked.size)
    if asked.one:
        print(json.dumps(measure(asked.classes[0], asked.blend[0], size, raw)))
        return
    sizes = ["--size", *map(str, size), "--raw", *map(str, raw)]
    rows = []
    print("| blend | classes | before, MiB | peak, MiB | added, MiB | seconds |\n|---|---|---|---|---|---|")
    for blend in asked.blend:
        for classes in asked.classes:
            words = [sys.executable, __file__, "--one", "--blend", blend, "--classes", str(classes), *sizes]
            row = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            before, peak = row["before"], row["peak"]
            cells = f"{before:.0f} | {peak:.0f} | {peak - before:.0f} | {row['seconds']:.1f}"
            print(f"| {blend} | {classes} | {cells} |", flush=True)
            rows.append({"blend": blend, "classes": classes, **row})
    if asked.json:
        asked.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
