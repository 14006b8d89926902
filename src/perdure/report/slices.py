"""Which slices of a volume a page shows, and how: as on a radiologist's screen, with square pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from perdure.labels import BACKGROUND, IGNORE

if TYPE_CHECKING:
    from perdure.data.case import Geometry

MOST_SIDE: Final = 640
"""Pixels of a picture; larger slices are made smaller, or a report would take 100 MB."""
Labels = npt.NDArray[np.integer[Any]]


class Slice(NamedTuple):
    """A slice as it is shown: image ``(1, h, w)`` float32 from 0 to 1, label maps ``(h, w)``."""

    image: npt.NDArray[np.float32]
    truth: Labels
    judged: Labels
    prediction: Labels


def shown_slices(
    image: npt.NDArray[Any], truth: Labels, judged: Labels, prediction: Labels, geometry: Geometry | None
) -> dict[str, Slice]:
    """The slice in the middle of what is labelled, ``mid``, and the one with the most errors, ``worst-s017``.

    The number of the worst slice is part of its name: another model, or the same one after another task, has its own,
    and pictures of one name show one slice. It is left out where nothing is wrong or where it is the one in the middle.

    Args:
        image: ``(C, D, H, W)``; the first channel is shown.
        truth: Labels ``(D, H, W)``.
        judged: The same with ``IGNORE`` wherever the prediction is neither right nor wrong.
        prediction: Labels ``(D, H, W)``.
        geometry: Spacing, by which pixels become square. Where the place in the world is known too, slices are shown
            as usual in radiology: anterior up, the patient's left on the right side.
    """
    labelled = (truth != BACKGROUND) & (truth != IGNORE)
    levels = np.flatnonzero(labelled.any((1, 2)))
    middle = int(levels[0] + levels[-1]) // 2 if len(levels) else len(truth) // 2
    wrong = ((prediction != judged) & (judged != IGNORE)).sum((1, 2))
    numbers = {"mid": middle}
    if wrong.max(initial=0) and int(wrong.argmax()) != middle:
        numbers[f"worst-s{int(wrong.argmax()):03d}"] = int(wrong.argmax())
    low, high = grey_range(image[0], labelled)
    shown: dict[str, Slice] = {}
    for name, k in numbers.items():
        grey = ((image[0, k].astype(np.float32) - low) / max(high - low, 1e-12)).clip(0, 1)
        maps = [truth[k], judged[k], prediction[k]]
        if geometry is not None and geometry.affine:
            # rows run from posterior to anterior and columns from the patient's left to right
            grey, maps = grey[::-1, ::-1], [part[::-1, ::-1] for part in maps]
        size = square_pixels(grey.shape, () if geometry is None else geometry.spacing)
        shown[name] = Slice(_resized(grey, size), *(_nearest(part, size) for part in maps))
    return shown


def grey_range(values: npt.NDArray[Any], labelled: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Values that become black and white: around those of the labelled voxels, within those of the volume.

    The range of the labelled voxels alone would leave nothing of their surroundings, and that of a whole CT volume,
    from air to bone, shows soft tissue in one grey.
    """
    low, high = map(float, np.percentile(values, (0.5, 99.5)))
    if labelled.any():
        first, last = map(float, np.percentile(values[labelled], (1, 99)))
        margin = 0.5 * (last - first)
        if margin > 0:
            low, high = max(low, first - margin), min(high, last + margin)
    return low, high


def square_pixels(shape: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[int, int]:
    """Height and width of a picture ``(H, W)`` whose pixels are as high as wide, with sides of at most MOST_SIDE."""
    sides = [n * s for n, s in zip(shape, spacing[-2:] or (1.0, 1.0), strict=True)]
    step = max(min(spacing[-2:] or (1.0,)), max(sides) / MOST_SIDE)
    height, width = (max(1, round(side / step)) for side in sides)
    return height, width


def _resized(grey: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(grey))
    if size != grey.shape:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)[None].clip(0, 1)


def _nearest(labels: Labels, size: tuple[int, int]) -> Labels:
    rows, columns = ((np.arange(n) * 2 + 1) * old // (2 * n) for n, old in zip(size, labels.shape, strict=True))
    taken: Labels = labels[rows[:, None], columns]
    return taken
