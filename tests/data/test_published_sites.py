"""Readers of the data sets that CGR was published with, on made files in their official layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import open_source
from perdure.errors import DataError, PerdureError

nibabel = pytest.importorskip("nibabel")


def nifti(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.5, 1.5, 8.0, 1.0])), path)


def mnms(root: Path) -> Path:
    rows = ["External code,VendorName,Vendor,Centre,ED,ES"]
    for number in range(6):
        code, folder = f"A{number}", ("Training/Labeled", "Validation", "Testing")[number % 3]
        series = np.zeros((6, 5, 2, 4), np.int16)
        series += np.arange(4, dtype=np.int16) * 10 + number
        mask = np.zeros((6, 5, 2, 4), np.uint8)
        mask[1, 2, 0, number % 2], mask[3, 3, 1, 3] = 1, 3
        nifti(root / folder / code / f"{code}_sa.nii.gz", series)
        nifti(root / folder / code / f"{code}_sa_gt.nii.gz", mask)
        rows.append(f"{code},Siemens,A,1,{number % 2},3")
    (root / "information.csv").write_text("\n".join(rows))
    return root


def test_mnms_frames_are_cases_and_subjects_stay_whole(tmp_path: Path) -> None:
    source = open_source("mnms", mnms(tmp_path))
    train, test = (source.names(split) for split in ("train", "test"))
    assert len(train) + len(test) == 12 and test
    assert not {name[:2] for name in train} & {name[:2] for name in test}
    assert source.space.name(2) == "myocardium"
    split = "train" if "A1_ED" in train else "test"
    diastole, systole = source.read(split, "A1_ED"), source.read(split, "A1_ES")
    assert diastole.image.shape == (1, 2, 5, 6) and diastole.geometry.spacing == (8, 1.5, 1.5)
    assert (diastole.image == 11).all() and (systole.image == 31).all()
    assert sorted(diastole.label.unique().tolist()) == [0, 1] and sorted(systole.label.unique().tolist()) == [0, 3]
    assert diastole.group == systole.group == "A1"


def test_mnms_that_lacks_something(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no table of subjects"):
        open_source("mnms", tmp_path)
    root = mnms(tmp_path)
    (root / "Training/Labeled/A0/A0_sa.nii.gz").unlink()
    table = root / "information.csv"
    table.write_text(table.read_text().replace("A1,", "B1,").replace("A2,Siemens,A,1,0,3", "A2,Siemens,A,1,0,9"))
    source = open_source("mnms", root)
    with pytest.raises(PerdureError, match="mask without image"):
        source.names("train")
    found, problems = source.listing("train")
    assert "does not name 'A1'" in " ".join(problem.what for problem in problems)
    split = "train" if "A2_ES" in found else "test"
    with pytest.raises(DataError, match="has 4 frames, and the table gives frame 9"):
        source.read(split, "A2_ES")
    table.write_text("External code,ED,ES\nA3,,1\n")
    with pytest.raises(DataError, match="subject 'A3' has no frame numbers"):
        open_source("mnms", root)


def test_fundus_of_several_sites(tmp_path: Path) -> None:
    for site in ("Domain1", "Domain2"):
        for split in ("train", "test"):
            for part in ("image", "mask"):
                (tmp_path / site / split / "ROIs" / part).mkdir(parents=True)
            mask = np.full((8, 8), 255, np.uint8)
            mask[2:6, 2:6], mask[3:5, 3:5] = 128, 0
            Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / site / split / "ROIs/image/a.png")
            Image.fromarray(mask).save(tmp_path / site / split / "ROIs/mask/a.png")
    source = open_source("fundus_sites", tmp_path)
    assert source.names("train") == ("Domain1_train_a", "Domain2_train_a")
    case = source.read("test", "Domain2_test_a")
    assert case.image.shape == (3, 8, 8)
    assert [int((case.label == k).sum()) for k in range(3)] == [48, 4, 12]
    assert open_source("fundus_sites", tmp_path, {"sites": ["Domain2"]}).names("train") == ("Domain2_train_a",)
    with pytest.raises(DataError, match="cannot be read"):
        open_source("fundus_sites", tmp_path, {"sites": ["Domain9"]})
    with pytest.raises(DataError, match="no folder Domain1"):
        open_source("fundus_sites", tmp_path / "Domain1")


def test_prostate_of_several_sites(tmp_path: Path) -> None:
    for site in ("BMC", "UCL"):
        for number in range(3):
            mask = np.zeros((4, 4, 3), np.uint8)
            mask[1, 1], mask[2, 2] = 1, 2
            nifti(tmp_path / site / f"Case0{number}.nii.gz", np.ones((4, 4, 3), np.int16))
            name = "Segmentation" if site == "UCL" else "segmentation"
            nifti(tmp_path / site / f"Case0{number}_{name}.nii.gz", mask)
    source = open_source("prostate_sites", tmp_path)
    names = [*source.names("train"), *source.names("test")]
    assert sorted(names) == [f"{site}_Case0{n}" for site in ("BMC", "UCL") for n in range(3)]
    case = source.read("train", source.names("train")[0])
    assert sorted(case.label.unique().tolist()) == [0, 1] and int(case.label.sum()) == 6
    with pytest.raises(DataError, match="has no folder 'HK'"):
        open_source("prostate_sites", tmp_path, {"sites": ["HK"]})
    (tmp_path / "UCL" / "Case00.nii.gz").unlink()
    with pytest.raises(PerdureError, match="mask without image"):
        open_source("prostate_sites", tmp_path).names("train")
