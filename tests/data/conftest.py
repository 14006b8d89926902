"""Small data sets of volumes, written for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

AFFINE = np.diag([0.5, 0.75, 2.0, 1.0])
AFFINE[:3, 3] = -10.25, 3.5, 20.125
SIZE = (7, 6, 5)


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write a NIfTI file."""
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, AFFINE if affine is None else affine), path)


def write_raw(root: Path, cases: int = 6, channels: int = 1, **description: Any) -> Path:
    """A raw folder of nnU-Net: noise, and masks that show liver (1) and spleen (2)."""
    rng = np.random.default_rng(5)
    for k in range(cases):
        for channel in range(channels):
            image = rng.normal(size=SIZE).astype(np.float32)
            save(root / "imagesTr" / f"case{k}_{channel:04d}.nii.gz", image)
        mask = np.zeros(SIZE, np.uint8)
        mask[1:4, 1:4, 1:3], mask[4:6, 3:5, 2:4] = 1, 2
        save(root / "labelsTr" / f"case{k}.nii.gz", mask)
    told = {
        "channel_names": {str(c): f"T{c + 1}" for c in range(channels)},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(told | description))
    return root


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., Path]:
    """Call it to write a raw folder of nnU-Net into the test's own folder."""
    return lambda **options: write_raw(tmp_path / "Dataset001_Test", **options)


@pytest.fixture
def save_volume() -> Callable[..., None]:
    """Call it with a path, values and an affine."""
    return save
