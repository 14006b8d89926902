"""Bring DRIVE (retinal vessels) and the WBC data (white blood cells) into layouts that readers know.

python scripts/convert_fundus_and_cells.py IN OUT

IN holds the data as they are published: `fundus/DRIVE/{training,test}/{images,1st_manual,mask}` with images in .tif and
masks in .gif, and `wbc/Dataset 1`, `wbc/Dataset 2` with images in .bmp and masks in .png. OUT receives the folders
`vessels` and `cells` for the reader `folders`, each with `classes.txt`, `images/`, `masks/`, `train.txt` and
`test.txt`, and `vessel_tiles` for the reader `nnunet`: each photograph of DRIVE cut into squares, which are the slices
of one case. A network of small images can see vessels there, and figures count whole photographs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

IGNORE = 255
TEST_EVERY = 5
"""WBC has no split: every fifth image of each of its two folders is for testing."""
IN_VIEW = 0.9
TILE_IGNORE = 2
"""nnU-Net wants the label of what counts nowhere to follow the classes."""


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


def vessel_tiles(photographs: Path, out: Path, side: int) -> None:
    """Squares of ``side`` pixels, at least nine tenths of each in the camera's field of view, red, green and blue."""
    try:
        import nibabel
    except ImportError:
        raise SystemExit(f"{out} needs nibabel: pip install 'perdure[volumes]'") from None
    for part, split in (("Tr", "train"), ("Ts", "test")):
        images, labels = out / f"images{part}", out / f"labels{part}"
        images.mkdir(parents=True)
        labels.mkdir()
        for name in (photographs / f"{split}.txt").read_text(encoding="utf-8").split():
            with (
                Image.open(photographs / f"images/{name}.png") as image,
                Image.open(photographs / f"masks/{name}.png") as mask,
            ):
                both = squares(np.dstack([np.asarray(image), np.asarray(mask)]), side)
            both = both[(both[..., 3] != IGNORE).mean((1, 2)) >= IN_VIEW]
            if not len(both):
                raise SystemExit(f"{name}: no square of {side} pixels lies in the field of view: give a smaller --tile")
            both[..., 3] = np.where(both[..., 3] == IGNORE, TILE_IGNORE, both[..., 3])
            files = [*(images / f"{name}_{channel:04}.nii.gz" for channel in range(3)), labels / f"{name}.nii.gz"]
            for channel, path in enumerate(files):
                nibabel.save(nibabel.Nifti1Image(both[..., channel].transpose(2, 1, 0), np.eye(4)), path)
    described = {
        "channel_names": {"0": "red", "1": "green", "2": "blue"},
        "labels": {"background": 0, "vessel": 1, "ignore": TILE_IGNORE},
        "numTraining": len(list((out / "labelsTr").iterdir())),
        "file_ending": ".nii.gz",
    }
    (out / "dataset.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: the photographs of {photographs} in squares of {side} pixels")


def squares(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Squares ``(N, side, side, C)`` of a picture ``(H, W, C)``, row by row; what is left over is cut off evenly."""
    rows, columns = (size // side for size in pixels.shape[:2])
    top, left = ((size - count * side) // 2 for size, count in zip(pixels.shape, (rows, columns), strict=False))
    inside, channels = pixels[top : top + rows * side, left : left + columns * side], pixels.shape[2]
    divided = inside.reshape(rows, side, columns, side, channels).swapaxes(1, 2)
    return divided.reshape(rows * columns, side, side, channels)


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
    """Parse the arguments and convert all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", metavar="IN", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--tile", type=int, default=70, help="side of the squares of vessel_tiles, in pixels")
    asked = parser.parse_args()
    if asked.out.exists() and any(asked.out.iterdir()):
        sys.exit(f"{asked.out} is not empty: give a new folder")
    vessels(asked.given / "fundus" / "DRIVE", asked.out / "vessels")
    cells(asked.given / "wbc", asked.out / "cells")
    vessel_tiles(asked.out / "vessels", asked.out / "vessel_tiles", asked.tile)


if __name__ == "__main__":
    main()
