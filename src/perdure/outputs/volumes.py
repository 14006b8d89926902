"""Predictions for volumes: a label map on the grid of the file that was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perdure.data.case import Geometry
from perdure.data.volumes.files import WRITTEN, matrix, turn_back, write_volume


def write_label_volume(
    out: Path,
    stem: str,
    labels: npt.NDArray[np.integer[Any]],
    geometry: Geometry,
    ending: str = ".nii.gz",
    largest: int | None = None,
) -> Path:
    """Write a label map of a case as ``out/STEM.nii.gz``, atomically.

    The file has the axes and the affine of the file that the case was read from, whatever its orientation.

    Args:
        out: Folder.
        stem: Name of the file without its ending.
        labels: Class ids ``(D, H, W)``, as the case was shown.
        geometry: Of the case.
        ending: Of the file that was read. ``.mhd``, which is two files, becomes ``.mha``.
        largest: Largest id that the model may predict, so that all maps of one model have one type: 8 bits up to 255,
            else 16 bits. By default the largest of this map.

    Raises:
        PerdureError: The disk is full, ``out`` cannot be written, or the extra ``volumes`` is not installed.
    """
    most = int(labels.max(initial=0)) if largest is None else largest
    stored = labels.astype(np.uint8 if most <= np.iinfo(np.uint8).max else np.uint16)
    target = out / f"{stem}{ending if ending in WRITTEN else '.mha'}"
    write_volume(target, turn_back(stored, geometry), matrix(geometry))
    return target
