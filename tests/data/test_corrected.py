"""``perdure check --fix``: masks come out on the grid of their images, in a new folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perdure.data.catalog import open_source
from perdure.data.check import inspect

nib = pytest.importorskip("nibabel")


def spoil(root: Path) -> None:
    """Case 0 sound, 1 elsewhere, 2 of another orientation, 3 in fractions, 4 half a class, 5 of another size."""
    masks = {k: root / "labelsTr" / f"case{k}.nii.gz" for k in range(6)}
    stored = {k: nib.load(path) for k, path in masks.items()}
    values = np.asanyarray(stored[0].dataobj)
    affine = stored[0].affine
    nib.save(nib.Nifti1Image(values, affine @ np.diag([1, 1, 2, 1])), masks[1])
    ornt = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("SPL"))
    turned = stored[2].as_reoriented(ornt)
    nib.save(nib.Nifti1Image(np.asanyarray(turned.dataobj), turned.affine), masks[2])
    nib.save(nib.Nifti1Image(values.astype(np.float64), affine), masks[3])
    nib.save(nib.Nifti1Image(values * np.float32(0.5), affine), masks[4])
    nib.save(nib.Nifti1Image(values[:-1], affine), masks[5])


def test_masks_are_corrected_elsewhere(raw: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]) -> None:
    root = raw()
    sound = {k: np.asanyarray(nib.load(root / "labelsTr" / f"case{k}.nii.gz").dataobj) for k in range(6)}
    spoil(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    done = cli("check", "nnunet", root, "--fix", tmp_path / "fixed")
    assert done.code == 1, done.err
    told = " ".join(done.out.split())
    assert "corrected case1: spacing: image 0.5×0.75×2 mm, mask 0.5×0.75×4 mm; now that of the image" in told
    assert "corrected case2: orientation SPL turned to RAS, as the image" in told
    assert "corrected case3: whole numbers stored as fractions are now integers" in told
    assert "case4: " in told and "holds fractions" in told
    assert "case5: image and mask differ in size: image 7×6×5, mask 6×6×5 voxels" in told
    assert "3 masks corrected, 1 copied as they are" in told
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    written = sorted(path.relative_to(tmp_path / "fixed").as_posix() for path in (tmp_path / "fixed").rglob("*.*"))
    assert written == [f"labelsTr/case{k}.nii.gz" for k in range(4)]
    for k in range(4):
        image = nib.load(root / "imagesTr" / f"case{k}_0000.nii.gz")
        mask = nib.load(tmp_path / "fixed" / "labelsTr" / f"case{k}.nii.gz")
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-6)
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asanyarray(mask.dataobj), sound[k])
    assert (tmp_path / "fixed" / "labelsTr" / "case0.nii.gz").read_bytes() == before[root / "labelsTr" / "case0.nii.gz"]
    # laid over the data set they make its cases sound
    shutil.copytree(tmp_path / "fixed", root, dirs_exist_ok=True)
    found = inspect(open_source("nnunet", root), threads=1)
    assert sorted(problem.name for problem in found.problems) == ["case4", "case5"]


def test_all_corrected_is_fine_and_json_tells_it(raw: Callable[..., Path], tmp_path: Path, cli: Any) -> None:
    done = cli("check", "nnunet", raw(), "--fix", tmp_path / "fixed", "--json")
    assert done.code == 0
    assert json.loads(done.out) == {"folder": str(tmp_path / "fixed"), "changed": {}, "failed": {}, "unchanged": 6}


def test_what_cannot_be_corrected(raw: Callable[..., Path], tmp_path: Path, cli: Any) -> None:
    root = raw()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for arguments, code, what in (
        (("nnunet", root, "--fix", tmp_path / "full"), 2, "is there already"),
        (("nnunet", root, "--fix", root / "fixed"), 2, "is in the data set"),
        (("digits", "--fix", tmp_path / "fixed"), 2, "has no files with a place in the world"),
        (("demo", "--fix", tmp_path / "fixed"), 2, "--fix corrects a data set, and 'demo' is none"),
    ):
        done = cli("check", *arguments)
        assert done.code == code and what in done.err and "Traceback" not in done.err, done.err
    (root / "labelsTr" / "case1.nii.gz").unlink()
    done = cli("check", "nnunet", root, "validation=2", "--fix", tmp_path / "fixed")
    assert done.code == 1 and "image without mask" in done.err
    assert not (tmp_path / "fixed").exists() and not (root / "fixed").exists()


def test_nothing_is_left_where_writing_fails(
    raw: Callable[..., Path], tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    done = cli("check", "nnunet", raw(), "--fix", tmp_path / "fixed")
    assert done.code == 1 and "the disk is full" in done.err
    assert {path.name for path in tmp_path.iterdir()} <= {"Dataset001_Test", "cache"}
