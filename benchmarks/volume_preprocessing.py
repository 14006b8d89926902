"""Preparing volumes for training, against nnU-Net's own ``run_case_save`` on the same files.

    python benchmarks/volume_preprocessing.py [--root DIR] [--repeats 5] [--json FILE]

Each case is read by nnU-Net's reader, prepared by the same plan and written: once by nnU-Net's own preprocessor, once
as a working file of this package. Both are also timed without reading and writing. The arrays are checked to be equal.
``--root`` is a raw folder of nnU-Net, such as ``Dataset004_Hippocampus``; without it some volumes are made up, whose
spacing differs so that they have to be resampled. Times are of the processor; medians over repeats that run in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perdure.data.case import Case, Geometry
from perdure.data.source import Image, Mask, Source, Split
from perdure.data.volumes.extra import need, quiet
from perdure.data.volumes.options import VolumeOptions
from perdure.data.volumes.plan import plan_volumes
from perdure.data.volumes.working import prepare_working_files
from perdure.labels import label_space


class Raw(Source):
    """A raw folder of nnU-Net with one channel, read by nnU-Net."""

    name, kind, patients, other_label, dims = "raw", "segmentation", True, 0, 3

    def __init__(self, root: Path) -> None:
        self.root = root
        self.declared = json.loads((root / "dataset.json").read_text())
        self.modality = tuple(self.declared["channel_names"].values())
        self.space = label_space([name for name in self.declared["labels"] if name != "background"])
        self.reader = need("nnunetv2.imageio.simpleitk_reader_writer").SimpleITKIO()

    def paths(self, name: str) -> tuple[list[str], str]:
        """Image and label of a case."""
        end = self.declared["file_ending"]
        return [str(self.root / "imagesTr" / f"{name}_0000{end}")], str(self.root / "labelsTr" / f"{name}{end}")

    def names(self, split: Split) -> list[str]:  # noqa: ARG002
        """All cases, in every split."""
        end = self.declared["file_ending"]
        return sorted(file.name.removesuffix(end) for file in (self.root / "labelsTr").glob(f"*{end}"))

    def read(self, split: Split, name: str) -> Case:  # noqa: ARG002
        """A case by nnU-Net's reader."""
        files, label = self.paths(name)
        image, found = self.reader.read_images(files)
        mask = self.reader.read_seg(label)[0][0].astype(np.int16)
        spacing = tuple(float(value) for value in found["spacing"])
        return Case(torch.from_numpy(image), torch.from_numpy(mask), name, geometry=Geometry(spacing, "mm"), group=name)

    def image(self, split: Split, name: str) -> Image:
        """Its image."""
        return np.asarray(self.read(split, name).image.numpy())

    def mask(self, split: Split, name: str) -> Mask:
        """Its label map."""
        return np.asarray(self.read(split, name).label.numpy())

    def fingerprint(self, split: Split) -> str:  # noqa: ARG002
        """Never asked for."""
        return ""


def write_volumes(root: Path, count: int = 4) -> None:
    """A raw folder with one channel and two structures, each case with a spacing of its own."""
    nibabel = need("nibabel")
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    labels = {"background": 0, "front": 1, "back": 2}
    declared = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": count, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(declared))
    for number in range(count):
        draw = np.random.default_rng(number)
        z, y, x = np.ogrid[-1:1:40j, -1:1:96j, -1:1:96j]
        inside = z**2 + y**2 + x**2 < 0.3
        label = inside * (1 + (x > 0.1 * number)).astype(np.int16)
        image = (100 + 60 * label + draw.normal(0, 10, label.shape)).astype(np.float32)
        affine = np.diag([1 + 0.1 * number, 1 + 0.1 * number, 2.5, 1])
        for array, place in ((image, f"imagesTr/case{number}_0000.nii.gz"), (label, f"labelsTr/case{number}.nii.gz")):
            nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), root / place)


def seconds(work: Callable[[], object]) -> float:
    """Processor time of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(root: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, one entry per repeat; asserts that the arrays are equal."""
    source = Raw(root)
    names = source.names("train")
    plan = plan_volumes(source, VolumeOptions())
    print(f"{len(names)} cases, spacing {plan.spacing} mm, patch {plan.patch}, {', '.join(plan.schemes)}")
    plans = need("nnunetv2.utilities.plans_handling.plans_handler").PlansManager(
        {**plan.nnunet_plans(), "image_reader_writer": "SimpleITKIO"}
    )
    configuration = plans.get_configuration("3d_fullres")
    worker = need("nnunetv2.preprocessing.preprocessors.default_preprocessor").DefaultPreprocessor(verbose=False)
    cases = [source.read("train", name) for name in names]

    def theirs(name: str, save: Path | None) -> Any:
        files, label = source.paths(name)
        if save is not None:
            return worker.run_case_save(str(save / name), files, label, plans, configuration, source.declared)
        return worker.run_case(files, label, plans, configuration, source.declared)

    def their_arrays(case: Case) -> Any:
        found = {"spacing": list(case.geometry.spacing)}
        arrays = case.image.numpy(), case.label.numpy()[None]
        return worker.run_case_npy(*arrays, found, plans, configuration, source.declared)

    for case in cases:
        data, label, _ = theirs(case.name, None)
        ready = plan.ready(case)
        assert np.array_equal(ready.image, data) and np.array_equal(ready.label, label[0]), case.name
    times: dict[str, list[float]] = {
        "nnU-Net, files": [],
        "Perdure, files": [],
        "nnU-Net, arrays": [],
        "Perdure, arrays": [],
    }
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder, quiet():
            save = partial(theirs, save=Path(folder))
            times["nnU-Net, files"].append(seconds(partial(deque, map(save, names), maxlen=0)))
            working = partial(prepare_working_files, source, "train", names, plan, Path(folder) / "working")
            times["Perdure, files"].append(seconds(partial(working, content="known")))
            times["nnU-Net, arrays"].append(seconds(lambda: [their_arrays(case) for case in cases]))
            times["Perdure, arrays"].append(seconds(lambda: [plan.ready(case) for case in cases]))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a raw folder of nnU-Net with one channel")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = asked.root or Path(folder) / "Dataset001_Made"
        if asked.root is None:
            write_volumes(root)
        times = measure(root, asked.repeats)
    middle = {name: statistics.median(found) for name, found in times.items()}
    for kind in ("files", "arrays"):
        ours, theirs = middle[f"Perdure, {kind}"], middle[f"nnU-Net, {kind}"]
        print(f"{kind:7} nnU-Net {1000 * theirs:8.1f} ms   Perdure {1000 * ours:8.1f} ms   ratio {ours / theirs:.2f}")
    if asked.json:
        asked.json.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
