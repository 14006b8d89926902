"""Bring DRIVE (retinal vessels) and the WBC data (white blood cells) into the layout of the reader `folders`.

python scripts/convert_fundus_and_cells.py IN OUT

IN holds the data as they are published: `fundus/DRIVE/{training,test}/{images,1st_manual,mask}` with images in .tif and
masks in .gif, and `wbc/Dataset 1`, `wbc/Dataset 2` with images in .bmp and masks in .png. OUT receives the folders
`vessels` and `cells`, each with `classes.txt`, `images/`, `masks/`, `train.txt` and `test.txt`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

IGNORE = 255
TEST_EVERY = 5
"""WBC has no split: every fifth image of each of its two folders is for testing."""


def vessels(drive: Path, out: Path) -> None:
    """DRIVE: 1 is a vessel, and pixels outside the camera's field of view count nowhere, as in DRIVE's own figures."""
    split = {"training": "train", "test": "test"}
    names: dict[str, list[str]] = {"train": [], "test": []}
    for part, named in split.items():
        for path in found(drive / part / "images", "*.tif"):
            number = path.stem.split("_")[0]
            manual = _grey(only(drive / part / "1st_manual", f"{number}_*"))
            view = _grey(only(drive / part / "mask", f"{number}_*"))
            mask = np.where(view > 127, (manual > 127).astype(np.uint8), np.uint8(IGNORE))
            write(out, path, f"drive_{number}", mask)
            names[named].append(f"drive_{number}")
    finish(out, ["1 vessel"], names)


def cells(wbc: Path, out: Path) -> None:
    """WBC: 1 is cytoplasm (128 in its masks), 2 the nucleus (255)."""
    names: dict[str, list[str]] = {"train": [], "test": []}
    for number in (1, 2):
        for k, path in enumerate(found(wbc / f"Dataset {number}", "*.bmp")):
            grey = _grey(path.with_suffix(".png"))
            odd = sorted(set(np.unique(grey).tolist()) - {0, 128, 255})
            if odd:
                raise SystemExit(f"{path.with_suffix('.png')}: the mask holds {odd[0]}; expected 0, 128 and 255")
            name = f"wbc{number}_{path.stem}"
            write(out, path, name, (grey == 128).astype(np.uint8) + 2 * (grey == 255).astype(np.uint8))
            names["test" if k % TEST_EVERY == 0 else "train"].append(name)
    finish(out, ["1 cytoplasm", "2 nucleus"], names)


def found(folder: Path, pattern: str) -> Iterator[Path]:
    """Files of a folder by name; stops the script where there are none."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise SystemExit(f"{folder} holds no {pattern}: IN must hold fundus/DRIVE and wbc as they are published")
    return iter(paths)


def only(folder: Path, pattern: str) -> Path:
    """The one file that a pattern names."""
    paths = list(found(folder, pattern))
    if len(paths) > 1:
        raise SystemExit(f"{folder} holds {len(paths)} files {pattern}: expected one")
    return paths[0]


def _grey(path: Path) -> npt.NDArray[np.uint8]:
    if not path.is_file():
        raise SystemExit(f"{path} is missing")
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def write(out: Path, image: Path, name: str, mask: npt.NDArray[np.uint8]) -> None:
    """Image and mask as PNG; the pixels of the image stay as they are."""
    with Image.open(image) as picture:
        if picture.size != mask.shape[::-1]:
            raise SystemExit(f"{image} has {picture.size} pixels and its mask {mask.shape[::-1]}")
        target = out / "images" / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").save(target)
    target = out / "masks" / f"{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(target)


def finish(out: Path, classes: list[str], names: dict[str, list[str]]) -> None:
    """The lists, last: a folder without them is one that was not finished."""
    (out / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    for split, inside in names.items():
        (out / f"{split}.txt").write_text("\n".join(inside) + "\n", encoding="utf-8")
    print(f"{out}: {len(names['train'])} images for training, {len(names['test'])} for testing")


def main() -> None:
    """Parse the arguments and convert both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", metavar="IN", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    asked = parser.parse_args()
    if asked.out.exists() and any(asked.out.iterdir()):
        sys.exit(f"{asked.out} is not empty: give a new folder")
    vessels(asked.given / "fundus" / "DRIVE", asked.out / "vessels")
    cells(asked.given / "wbc", asked.out / "cells")


if __name__ == "__main__":
    main()
