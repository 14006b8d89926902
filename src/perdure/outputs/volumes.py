"""Predictions for volumes: a label map on the grid of the file that was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perdure.data.case import Geometry
from perdure.data.volumes.files import WRITTEN, write_volume
from perdure.data.volumes.headers import matrix, turn_back


def write_label_volume(
    out: Path,
    stem: str,
    labels: npt.NDArray[np.integer[Any]],
    geometry: Geometry,
    ending: str = ".nii.gz",
) -> Path:
    """Write a label map of a case as ``out/STEM.nii.gz``, atomically.

    The file has the axes and the affine of the file that the case was read from, whatever its orientation.

    Args:
        out: Folder.
        stem: Name of the file without its ending.
        labels: Class ids ``(D, H, W)``, as the case was shown.
        geometry: Of the case.
        ending: Of the file that was read. ``.mhd``, which is two files, becomes ``.mha``.

    Raises:
        PerdureError: The disk is full, ``out`` cannot be written, or the extra ``volumes`` is not installed.
    """
    # one type for all maps of all models, which every reader knows; ids end below 4096
    stored = labels.astype(np.int16)
    target = out / f"{stem}{ending if ending in WRITTEN else '.mha'}"
    write_volume(target, turn_back(stored, geometry), matrix(geometry))
    return target
