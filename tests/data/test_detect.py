"""Which reader a folder gets that is named without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.data.catalog import DATASETS
from perdure.data.detect import detect, find_data, short_name
from perdure.errors import DataError, PerdureError, UsageError


def put(*places: str, **content: object) -> Callable[[Path], None]:
    """Empty files, or folders where a name ends in a slash; ``content`` is that of ``dataset.json``."""

    def make(root: Path) -> None:
        for place in places:
            path = root / place
            (path if place.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not place.endswith("/"):
                path.touch()
        if content:
            (root / "dataset.json").write_text(json.dumps(content))

    return make


LAYOUTS: list[tuple[str, Callable[[Path], None]]] = [
    ("nnunet", put("imagesTr/", channel_names={"0": "CT"}, labels={})),
    ("nnunet", put("imagesTr/a_0000.nii.gz", channel_names={}, modality={})),
    ("decathlon", put("imagesTr/a.nii.gz", modality={"0": "MRI"}, training=[])),
    ("nnunet", put("imagesTr/a_0000.nii.gz", file_ending=".nii.gz", labels={})),
    ("nnunet", put("imagesTr/a_0000.nii.gz", labels=["background", "liver"])),
    ("decathlon", put("imagesTr/a.nii.gz", modality={"0": "MRI"})),
    ("voc", put("JPEGImages/", "SegmentationClass/")),
    ("voc", put("VOCdevkit/VOC2012/JPEGImages/")),
    ("cityscapes", put("leftImg8bit/", "gtFine/")),
    ("h5_volumes", put("one.h5")),
    ("h5_volumes", put("one.hdf5", "readme.txt")),
    ("nifti_folders", put("images/a.nii.gz", "masks/a.nii.gz")),
    ("nifti_folders", put("images/a.mha", "masks/a.mha")),
    ("nifti_folders", put("train/images/a.nrrd", "train/masks/a.nrrd")),
    ("nifti_folders", put("imagesTr/a.nii", "labelsTr/a.nii")),
    ("folders", put("images/a.png", "masks/a.png")),
    ("folders", put("train/images/a.png", "train/masks/a.png")),
    ("medmnist", put("pathmnist.npz")),
    ("class_folders", put("train/cat/a.png", "test/cat/b.png")),
]


@pytest.mark.parametrize(("reader", "make"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_layout_has_one_reader(tmp_path: Path, reader: str, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    assert detect(tmp_path) == reader
    assert reader in DATASETS
    assert find_data(str(tmp_path)) == (reader, tmp_path)


REFUSED: list[tuple[str, type[PerdureError], str, str]] = [
    ("empty", DataError, "nothing in", "data.name=NAME"),
    ("gone", DataError, "gone does not exist", "give the folder"),
    ("file", DataError, "file is not a folder", "give the folder"),
    ("nnunet", UsageError, "the data set 'nnunet' needs a folder", "--data DIR data.name=nnunet"),
    ("damaged", DataError, "dataset.json is not valid JSON", "it is the dataset.json of nnU-Net or of the Decathlon"),
    ("phantom", DataError, "phantom does not exist", "phantoms"),
]


@pytest.mark.parametrize(("text", "error", "what", "hint"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: type[PerdureError], what: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    Path("damaged").mkdir()
    Path("damaged/dataset.json").write_text('{"labels": ')
    with pytest.raises(error) as told:
        find_data(text)
    assert what in told.value.what and hint in told.value.hint


def test_built_in_data_is_named_unless_a_folder_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_data("phantoms") == ("phantoms", None)
    put("images/a.nii.gz")(tmp_path / "phantoms")
    assert find_data("phantoms") == ("nifti_folders", Path("phantoms"))


def test_only_some_entries_of_a_large_folder_are_looked_at(tmp_path: Path) -> None:
    put(*(f"note{number:03d}.txt" for number in range(250)), "volume.h5")(tmp_path)
    with pytest.raises(DataError, match="nothing in"):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Dataset001_Organs", "organs"),
        ("Task05_Prostate", "prostate"),
        ("Dataset12", "dataset12"),
        ("My Data", "my data"),
        ("dataset001_organs", "dataset001_organs"),
    ],
)
def test_a_task_is_named_after_its_folder(tmp_path: Path, folder: str, name: str) -> None:
    assert short_name(tmp_path / folder) == name
