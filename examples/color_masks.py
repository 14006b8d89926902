"""Masks painted in colours: the worked example of a reader of one's own in docs/adding-your-data.md.

ROOT/colors.csv                                            a header name,red,green,blue; the first row is background
ROOT/train/images/NAME.jpg  ROOT/train/masks/NAME.png      the same for test/
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, read_image
from perdure.data.source import AbsentSplitError, Image, Kind, Mask, Source, Split
from perdure.errors import DataError
from perdure.labels import label_space


class ColorMasks(Source):
    """Photographs with masks in colours."""

    kind: Kind = "segmentation"
    other_label = 0  # what classes outside of the stream become in test masks: background

    def __init__(self, root: Path, colors: dict[str, int], patients: bool) -> None:
        background, *names = colors
        self.root, self.name, self.patients = root, "color_masks", patients
        self.space = label_space(names, background=background)  # ids are 1, 2, ... in this order
        self.colors = np.array(list(colors.values()))

    def names(self, split: Split) -> Sequence[str]:
        """File names, sorted."""
        folder = self.root / split / "images"
        if not folder.is_dir():
            raise AbsentSplitError(f"{self.root} has no split '{split}'", f"add {split}/images and {split}/masks")
        return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)

    def image(self, split: Split, name: str) -> Image:
        """RGB image, ``(3, H, W)`` uint8."""
        return read_image(self.files(split, name)[0])

    def mask(self, split: Split, name: str) -> Mask:
        """Class ids, ``(H, W)`` int16."""
        red, green, blue = read_image(self.files(split, name)[1]).astype(int)
        found = (red << 16 | green << 8 | blue)[..., None] == self.colors
        if not found.any(-1).all():
            raise DataError(f"{self.files(split, name)[1]} has a colour that colors.csv lacks", "add it or repaint")
        return found.argmax(-1).astype(np.int16)

    def fingerprint(self, split: Split) -> str:
        """Digest of names and masks: lists of images per task are cached under it."""
        digest = hashlib.sha256(self.reading())
        for name in self.names(split):
            digest.update(name.encode() + self.files(split, name)[1].read_bytes())
        return digest.hexdigest()

    def files(self, split: Split, name: str) -> Sequence[Path]:
        """Image and mask: a file that has not changed is not checked again before the next run."""
        folder = self.root / split
        return folder / "images" / name, (folder / "masks" / name).with_suffix(".png")

    def reading(self) -> bytes:
        """What else decides whether a file is sound."""
        return super().reading() + self.colors.tobytes()


def open_color_masks(root: Path, patients: bool = False) -> ColorMasks:
    """Open the folder. What stands under ``data`` in a recipe are the arguments of this function."""
    if not (root / "colors.csv").is_file():
        raise DataError(f"{root} has no colors.csv", "write the lines name,red,green,blue, background first")
    with (root / "colors.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    colors = {row["name"]: int(row["red"]) << 16 | int(row["green"]) << 8 | int(row["blue"]) for row in rows}
    return ColorMasks(root, colors, patients)
