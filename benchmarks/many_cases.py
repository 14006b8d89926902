"""Lists and checks of 1,000 volumes: a data set as nnU-Net has it, of tiny files, against a bare loop that reads them.

``python benchmarks/many_cases.py [--count 1000] [--json FILE]`` writes the files, then, each in a process of its own
and one after another: a bare loop that reads every image and mask with nibabel; ``perdure check nnunet DIR``; opening
the data set; the survey before a run, first and remembered; and the stream of one data set with its image counts, first
and remembered. Seconds are of the processor, of all threads, without the start of Python and its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from perdure.data.volumes.extra import need

SHAPE = (12, 16, 16)


def write_cases(root: Path, count: int) -> None:
    """A raw folder of nnU-Net: one channel, two structures, every case on a grid of its own."""
    nibabel = need("nibabel")
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    labels = {"background": 0, "front": 1, "back": 2}
    declared = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": count, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(declared))
    for number in range(count):
        draw = np.random.default_rng(number)
        label = np.zeros(SHAPE, np.uint8)
        label[2:8, 3:9, 3:9], label[2:8, 9:13, 3:9] = 1, 2
        image = (100 + 60 * label + draw.normal(0, 10, SHAPE)).astype(np.int16)
        affine = np.diag([1 + number / 1000, 1, 2.5, 1])
        for array, place in (
            (image, f"imagesTr/case{number:04d}_0000.nii.gz"),
            (label, f"labelsTr/case{number:04d}.nii.gz"),
        ):
            nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), root / place)


def bare(root: Path) -> Callable[[], None]:
    """Every image and mask, read whole."""
    nibabel = need("nibabel")

    def work() -> None:
        for path in sorted((*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir())):
            volume = nibabel.load(path)
            assert np.asanyarray(volume.dataobj).size and volume.affine is not None

    return work


def check(root: Path) -> Callable[[], None]:
    """``perdure check nnunet DIR``, its output kept from the screen."""
    from perdure.cli.check import check_dataset

    def work() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert check_dataset("nnunet", root, {}, False)

    return work


def opened(root: Path) -> Callable[[], None]:
    """The data set opened and its cases listed."""
    from perdure.data.catalog import open_source

    def work() -> None:
        assert len(open_source("nnunet", root, {}).names("train")) > 0

    return work


def surveyed(root: Path) -> Callable[[], None]:
    """The look at every file before a run."""
    from perdure.data.catalog import open_source
    from perdure.data.survey import survey

    source = open_source("nnunet", root, {})

    def work() -> None:
        assert not survey(source, lambda _: lambda: None).problems

    return work


def streamed(root: Path) -> Callable[[], None]:
    """A stream of this data set, and how many images show each class."""
    from perdure.data.catalog import open_source
    from perdure.data.preparation import Preparation
    from perdure.streams.partial_labels import DataSet, partial_labels
    from perdure.streams.summary import summarize

    source = open_source("nnunet", root, {})
    preparation = Preparation(dims=3, channels=1)

    def work() -> None:
        stream = partial_labels([DataSet(source, "made")], preparation=preparation)
        assert summarize(stream)["tasks"][0]["new"] == ["front", "back"]

    return work


WAYS = {
    "bare loop with nibabel": bare,
    "perdure check": check,
    "open and list": opened,
    "survey before a run, after the check": surveyed,
    "survey, nothing remembered": surveyed,
    "stream and its counts, first": streamed,
    "stream and its counts, again": streamed,
}
FORGET = ("survey, nothing remembered",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.way:
        from perdure.data.readers.nnunet import open_nnunet
        from perdure.data.volumes.extra import need

        assert callable(open_nnunet) and need("nibabel")  # imported before the clock starts
        work = WAYS[asked.way](asked.root)
        begun = time.process_time()
        work()
        print(json.dumps(time.process_time() - begun))
        return
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "Dataset001_Made"
        write_cases(root, asked.count)
        for number, way in enumerate(WAYS):
            cache = Path(name) / (f"cache{number}" if way in FORGET else "cache")
            words = [sys.executable, __file__, "--way", way, "--root", str(root)]
            environment = {**os.environ, "PERDURE_CACHE": str(cache)}
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found[way] = json.loads(done.stdout.splitlines()[-1])
            print(f"{way:40}{found[way]:8.2f} s{1000 * found[way] / asked.count:8.2f} ms per case", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
