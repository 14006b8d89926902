"""Draw the picture of the phantoms in the docs: one column per data set, each image above its labels.

    python scripts/phantoms_picture.py docs/images/phantoms.png

Volumes are shown as radiologists hang them, with the patient's right on the left: the slice across the body that shows
most of the labels, then one from left to right. Of the kinds in 2D two cases are shown.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from perdure.data.phantoms.raw_folders import FOLDERS
from perdure.data.readers.phantoms import Phantoms, open_phantoms

WINDOW: Final = (-160, 300)
"""Hounsfield units shown as black and white: soft tissue."""
SHARE: Final = 0.45
"""Opacity of the labels."""
Pixels = npt.NDArray[np.float64]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and write the picture."""
    parser = argparse.ArgumentParser(description="one column per phantom data set, each image above its labels")
    parser.add_argument("out", type=Path, help="PNG to write")
    draw(parser.parse_args(arguments).out)
    return 0


def draw(out: Path) -> None:
    """Write the picture with 256 colours: the noise of a photograph in full colour takes five times the room."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    options: list[dict[str, Any]] = [fixed for kind in FOLDERS.values() for fixed in kind.values()]
    page = Figure(figsize=(11.6, 8.1), facecolor="white")
    grid = page.subplots(4, len(options), gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    for column, given in enumerate(options):
        source = open_phantoms(**given)
        views = _volume(source) if source.dims == 3 else _slices(source)
        for row, view in enumerate(views):
            axes = grid[row, column]
            axes.imshow(view, interpolation="nearest")
            axes.set_axis_off()
        names = [c.name.replace("_", " ") for c in source.space.classes]
        colors = [tuple(channel / 255 for channel in c.color) for c in source.space.classes]
        grid[0, column].set_title(given.get("set", given["kind"]), fontsize=11)
        handles = [Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)]
        grid[-1, column].legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=8, frameon=False
        )
    page.subplots_adjust(left=0.01, right=0.99, top=0.96, bottom=0.09)
    buffer = io.BytesIO()
    page.savefig(buffer, dpi=100)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size // 1000} kB")


def _volume(source: Phantoms) -> list[Pixels]:
    """The two cuts of one case, each without and with labels."""
    name = source.names("train")[1]
    image, mask = source.image("train", name)[0], source.mask("train", name)
    spacing = source.read("train", name).geometry.spacing
    # each class counts as a share of its largest slice, or the lungs would outweigh a lesion
    counts = [[(mask == k).sum(axes) for k in source.space.ids] for axes in ((1, 2), (0, 2))]
    level, front = (int(sum(n / n.max() for n in along).argmax()) for along in counts)
    slices = round(spacing[0] / spacing[1] * len(image))
    rows = np.arange(slices) * len(image) // slices  # slices are thicker than pixels are wide
    found: list[Pixels] = []
    frame = ((max(0, (image.shape[2] - slices) // 2),) * 2, (0, 0))
    upright = np.pad(image[rows, front], frame, constant_values=-1000), np.pad(mask[rows, front], frame)
    for values, label in ((image[level], mask[level]), upright):
        grey = np.clip((values[::-1, ::-1] - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1)
        found += _with_labels(source, grey, label[::-1, ::-1])
    return found


def _slices(source: Phantoms) -> list[Pixels]:
    """Two cases, each without and with labels."""
    found: list[Pixels] = []
    for name in source.names("train")[2:4]:
        found += _with_labels(source, source.image("train", name)[0] / 255, source.mask("train", name))
    return found


def _with_labels(source: Phantoms, grey: npt.NDArray[Any], label: npt.NDArray[np.int16]) -> list[Pixels]:
    """An image ``(H, W)`` of brightness 0 to 1 in colour, without and with its labels."""
    plain = np.repeat(grey[..., None].astype(np.float64), 3, 2)
    colors = source.space.palette()[label] / 255
    return [plain, np.where((label > 0)[..., None], (1 - SHARE) * plain + SHARE * colors, plain)]


if __name__ == "__main__":
    raise SystemExit(main())
