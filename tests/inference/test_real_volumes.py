"""Label maps of real volumes lie where their scans do, whatever way round the file has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perdure.data.volumes.files import write_volume

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

CASES = {
    "hippocampus": "hippocampus/nnUNet_raw/Dataset004_Hippocampus",
    "prostate in MR": "prostate/nnUNet_raw/Dataset105_ProstateMR",
}
WAYS = ("RAS", "LPS", "SAR", "ASL")
"""As the file is, as DICOM has it, and with permuted axes."""


@pytest.mark.parametrize("place", CASES.values(), ids=list(CASES))
def test_affines_of_predicted_real_volumes(
    place: str, shared_data: Path, volume_run: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    scan = nib.load(min((shared_data / place / "imagesTr").glob("*.nii.gz")))
    # a file as it is, and the same voxels at the same places with their axes in another order and sense
    (tmp_path / "in").mkdir()
    nib.save(scan, tmp_path / "in/stored.nii.gz")
    for codes in WAYS:
        ornt = nib.orientations.axcodes2ornt(tuple(codes))
        turned = scan.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(scan.affine), ornt))
        write_volume(tmp_path / f"in/{codes}.nii.gz", np.asanyarray(turned.dataobj), turned.affine)
    done = cli("predict", volume_run, "-i", tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu")
    assert done.code == 0, done.err
    found = {file.name: file for file in (tmp_path / "out").iterdir() if file.suffix != ".json"}
    assert sorted(found) == sorted(file.name for file in (tmp_path / "in").iterdir())
    for name, file in found.items():
        given = tmp_path / "in" / name
        a, b = sitk.ReadImage(str(file)), sitk.ReadImage(str(given))
        assert a.GetSize() == b.GetSize()
        for read in ("GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(a, read)(), getattr(b, read)(), rtol=0, atol=1e-6, err_msg=name)
        mask, image = nib.load(file), nib.load(given)
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, rtol=0, atol=1e-6, err_msg=name)
    seen = [nib.as_closest_canonical(nib.load(file)) for file in found.values()]
    assert len(seen) == 1 + len(WAYS)
    for mask in seen[1:]:  # one scan, so one answer
        np.testing.assert_array_equal(np.asanyarray(mask.dataobj), np.asanyarray(seen[0].dataobj))
