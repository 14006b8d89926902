"""Layouts of volumes: what a case is, which cases are for testing, and what else files beside the data say."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.data.content import content_fingerprint
from perdure.data.dataset import Dataset
from perdure.data.detect import detect
from perdure.data.preparation import Preparation
from perdure.data.readers.volumes import VolumeSource, told_of_patients, told_of_volumes
from perdure.data.source import AbsentSplitError, Source
from perdure.data.survey import survey
from perdure.errors import DataError, UsageError
from perdure.labels import IGNORE, remap_table

nib = pytest.importorskip("nibabel")
h5py = pytest.importorskip("h5py")
Raw = Callable[..., Path]
Save = Callable[..., None]


def classes(source: Source) -> dict[int, str]:
    return {k: source.space.name(k) for k in source.space.ids}


def parts(source: Source) -> tuple[list[str], list[str]]:
    return list(source.names("train")), list(source.names("test"))


# nnU-Net
def test_a_raw_folder(raw: Raw) -> None:
    source = open_source("nnunet", raw(channels=2))
    assert (source.dims, source.modality, source.patients, source.kind) == (3, ("T1", "T2"), True, "segmentation")
    assert classes(source) == {1: "liver", 2: "spleen"}
    train, test = parts(source)
    assert (len(train), len(test)) == (4, 2) and train == sorted(train)
    case = source.read("train", train[0])
    assert case.image.shape == (2, 5, 6, 7) and case.label.shape == (5, 6, 7)
    assert str(case.image.dtype) == "torch.float32" and str(case.label.dtype) == "torch.int16"
    assert case.geometry.spacing == (2.0, 0.75, 0.5) and case.geometry.unit == "mm"
    assert (case.annotated, case.group) == (None, train[0])
    with pytest.raises(AbsentSplitError):
        source.names("val")
    assert not open_source("nnunet", source.root, {"patients": False}).patients
    again = pickle.loads(pickle.dumps(source))  # worker processes get a copy
    assert np.array_equal(again.read("train", train[0]).image, case.image)


def test_folds_are_those_of_nnunet(raw: Raw) -> None:
    crossval = pytest.importorskip("nnunetv2.utilities.crossval_split")
    root = raw(cases=13)
    names = sorted(f"case{k}" for k in range(13))
    for fold, expected in enumerate(crossval.generate_crossval_split(names)):
        assert parts(open_source("nnunet", root, {"fold": fold})) == (expected["train"], expected["val"])


def test_few_cases_make_few_folds(raw: Raw) -> None:
    root = raw(cases=3)
    tested = [parts(open_source("nnunet", root, {"fold": fold}))[1] for fold in range(3)]
    assert sorted(name for names in tested for name in names) == ["case0", "case1", "case2"]
    assert all(len(names) == 1 for names in tested)


def test_folds_of_a_file(raw: Raw) -> None:
    root = raw()
    folds = [{"train": ["case3", "case0"], "val": ["case5"]}, {"train": ["case1"], "val": ["case2"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    assert parts(open_source("nnunet", root)) == (["case0", "case3"], ["case5"])
    assert parts(open_source("nnunet", root, {"fold": 1})) == (["case1"], ["case2"])
    with pytest.raises(UsageError, match="has 2 folds"):
        open_source("nnunet", root, {"fold": 2})


def test_a_patient_is_never_divided(raw: Raw) -> None:
    root = raw(cases=12)
    patients = {f"case{k}": f"p{k % 6}" for k in range(12)}
    (root / "patients.json").write_text(json.dumps(patients))
    seen: Counter[str] = Counter()
    for fold in range(5):
        source = open_source("nnunet", root, {"fold": fold, "validation": 2})
        groups = [{source.group(split, name) for name in source.names(split)} for split in ("train", "val", "test")]
        assert groups[1] and not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
        assert source.read("val", source.names("val")[0]).group in groups[1]
        assert (source.dims, source.modality) == (3, ("T1",))
        seen.update(groups[2])
    assert seen == dict.fromkeys(set(patients.values()), 1)


def test_a_check_says_which_patients_it_found(raw: Raw) -> None:
    root = raw()

    def said(**options: object) -> list[str]:
        source = open_source("nnunet", root, options)
        assert isinstance(source, VolumeSource)
        assert not source.layout.problems
        return told_of_patients(source)

    assert said() == ["there is no patients.json: every case counts as a patient of its own"]
    assert said(patients=False) == []
    (root / "imagesTs").mkdir()  # a case without a mask may be listed
    shutil.copy(root / "imagesTr" / "case0_0000.nii.gz", root / "imagesTs" / "case9_0000.nii.gz")
    (root / "patients.json").write_text(json.dumps({f"case{k}": k // 2 for k in (*range(6), 9)}))
    assert said() == ["patients.json: 6 cases of 3 patients, at most 2 of one; none is divided"]


def test_labelled_test_cases_are_the_test_set(raw: Raw, cli: Any) -> None:
    root = raw()
    (root / "imagesTs").mkdir()
    (root / "labelsTs").mkdir()
    for name in ("case4", "case5"):
        shutil.move(root / "imagesTr" / f"{name}_0000.nii.gz", root / "imagesTs")
        shutil.move(root / "labelsTr" / f"{name}.nii.gz", root / ("labelsTs" if name == "case5" else "."))
    source = open_source("nnunet", root)
    assert parts(source) == ([f"case{k}" for k in range(4)], ["case5"])
    assert isinstance(source, VolumeSource)
    assert source.layout.told[0] == "imagesTs: 1 case has no mask in labelsTs and is left out"
    shutil.copy(root / "imagesTs/case4_0000.nii.gz", root / "imagesTs/case9_0000.nii.gz")
    told = " ".join(cli("check", "nnunet", root).out.split())
    assert "imagesTs: 2 cases have no mask in labelsTs and are left out" in told
    (root / "patients.json").write_text(json.dumps({f"case{k}": f"p{k % 5}" for k in (0, 1, 2, 3, 5)}))
    with pytest.raises(DataError, match=r"patient 'p0' \('case5'\) is in training and in testing"):
        open_source("nnunet", root)


def test_of_a_learned_set_the_test_cases_are_enough(raw: Raw) -> None:
    root = raw()
    (root / "imagesTr").rename(root / "imagesTs")
    (root / "labelsTr").rename(root / "labelsTs")
    assert parts(open_source("nnunet", root)) == ([], [f"case{k}" for k in range(6)])
    (root / "imagesTr").mkdir()  # half of it is a mistake
    with pytest.raises(DataError, match="labelsTr cannot be read"):
        open_source("nnunet", root)


def test_the_ignore_label_counts_nowhere(raw: Raw, save_volume: Save) -> None:
    root = raw(labels={"background": 0, "liver": 1, "ignore": 2})
    source = open_source("nnunet", root)
    assert classes(source) == {1: "liver"}
    assert set(np.unique(source.mask("train", source.names("train")[0]))) == {0, 1, IGNORE}
    report = inspect(source, threads=1).splits["train"]
    assert report.pixels[IGNORE] == 8 * report.samples


def test_regions_become_the_classes_of_their_order(raw: Raw, save_volume: Save) -> None:
    labels = {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    root = raw(labels=labels, regions_class_order=[1, 2, 3])
    mask = np.zeros((7, 6, 5), np.uint8)
    mask[:3], mask[1:3], mask[2] = 1, 2, 3
    for path in (root / "labelsTr").iterdir():
        save_volume(path, mask)
    source = open_source("nnunet", root)
    assert classes(source) == {1: "rest of whole tumour", 2: "rest of core", 3: "enhancing"}
    stored = source.mask("train", source.names("train")[0])
    np.testing.assert_array_equal(stored, mask.transpose(2, 1, 0))
    # numbers that no region tells apart are one class; the order gives its number
    text = json.loads((root / "dataset.json").read_text())
    text |= {"labels": {"background": 0, "organ": [1, 2, 3], "lesion": [2, 3]}, "regions_class_order": [5, 3]}
    (root / "dataset.json").write_text(json.dumps(text))
    source = open_source("nnunet", root)
    assert classes(source) == {3: "lesion", 5: "rest of organ"}
    expected = np.array([0, 5, 3, 3])[mask.transpose(2, 1, 0)]
    np.testing.assert_array_equal(source.mask("train", source.names("train")[0]), expected)


def test_regions_are_painted_as_by_nnunet(raw: Raw) -> None:
    handling = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling")
    labels: dict[str, Any] = {"background": 0, "a": [1, 2, 3, 4], "b": [2, 4], "c": 3}
    order = [7, 2, 3]
    source = open_source("nnunet", raw(labels=labels, regions_class_order=order))
    manager = handling.LabelManager(labels, order)
    for number in range(1, 5):
        inside = [
            number in (region if isinstance(region, tuple) else (region,)) for region in manager.foreground_regions
        ]
        painted = [order[k] for k, there in enumerate(inside) if there][-1]
        assert source.class_ids(Path("x"), np.full((1, 1, 1), number, np.uint8), "").item() == painted


def test_files_that_the_description_lists(raw: Raw) -> None:
    root = raw()
    plain = open_source("nnunet", root)
    (root / "elsewhere").mkdir()
    listed = {}
    for k in range(6):
        shutil.move(root / "imagesTr" / f"case{k}_0000.nii.gz", root / "elsewhere" / f"{k}.nii.gz")
        listed[f"case{k}"] = {"images": [f"elsewhere/{k}.nii.gz"], "label": f"labelsTr/case{k}.nii.gz"}
    told = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(told | {"dataset": listed}))
    assert parts(open_source("nnunet", root)) == parts(plain)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_in_the_layout_of_nnunet(tmp_path: Path, channels: int) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    for k in range(5):
        pixels = np.random.default_rng(k).integers(0, 255, (4, 6, 3)).astype(np.uint8)
        picture = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        picture.save(tmp_path / "imagesTr" / f"x{k}_0000.png")
        Image.fromarray((pixels[..., 0] > 99).astype(np.uint8)).save(tmp_path / "labelsTr" / f"x{k}.png")
    names = {str(k): "RGB"[k] for k in range(channels)}
    told = {"channel_names": names, "labels": {"background": 0, "cell": 1}, "file_ending": ".png"}
    (tmp_path / "dataset.json").write_text(json.dumps(told))
    source = open_source("nnunet", tmp_path)
    assert source.dims == 2 and inspect(source, threads=1).ok
    case = source.read("train", source.names("train")[0])
    assert case.image.shape == (channels, 4, 6) and str(case.image.dtype) == "torch.uint8"
    assert case.geometry.affine == () and case.label.max() == 1


def test_formats_of_itk_in_the_layout_of_nnunet(raw: Raw) -> None:
    sitk = pytest.importorskip("SimpleITK")
    root = raw()
    before = open_source("nnunet", root)
    cases = {name: before.read("train", name) for name in before.names("train")}
    for path in [*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir()]:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ".nrrd"))
        path.unlink()
    told = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(told | {"file_ending": ".nrrd"}))
    source = open_source("nnunet", root)
    for name, case in cases.items():
        again = source.read("train", name)
        assert np.array_equal(again.image, case.image) and np.array_equal(again.label, case.label)
        np.testing.assert_allclose(again.geometry.affine, case.geometry.affine, atol=1e-5)


def test_cases_may_annotate_some_classes_only(raw: Raw, save_volume: Save) -> None:
    root = raw()
    name = open_source("nnunet", root).names("train")[0]
    (root / "annotated.json").write_text(json.dumps({name: ["liver"]}))
    save_volume(root / "labelsTr" / f"{name}.nii.gz", np.ones((7, 6, 5), np.uint8))
    source = open_source("nnunet", root)
    assert source.read("train", name).annotated == frozenset({1})
    assert source.read("train", source.names("train")[1]).annotated is None
    assert inspect(source, threads=1).ok


def test_the_fingerprint_follows_masks_and_what_is_annotated(raw: Raw, save_volume: Save) -> None:
    root = raw()
    first, again = open_source("nnunet", root).fingerprint("train"), open_source("nnunet", root).fingerprint("train")
    name = open_source("nnunet", root).names("train")[0]
    (root / "annotated.json").write_text(json.dumps({name: ["liver", "spleen"]}))
    annotated = open_source("nnunet", root).fingerprint("train")
    save_volume(root / "labelsTr" / f"{name}.nii.gz", np.ones((7, 6, 5), np.uint8))
    (root / "annotated.json").unlink()
    masks = open_source("nnunet", root).fingerprint("train")
    assert first == again and len({first, annotated, masks}) == 3


def test_every_file_is_decoded_once(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    root = raw(channels=2)
    decoded: Counter[str] = Counter()
    proxy = nib.arrayproxy.ArrayProxy

    class Counting(proxy):  # type: ignore[misc, valid-type]
        def __init__(self, stream: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(stream, *arguments, **options)
            self.where = stream.name

        def __array__(self, *arguments: Any, **options: Any) -> Any:
            decoded[self.where] += 1
            return super().__array__(*arguments, **options)

    monkeypatch.setattr(nib.arrayproxy, "ArrayProxy", Counting)
    source = open_source("nnunet", root)
    found = survey(source, lambda _: lambda: None)
    assert not found.problems and len(decoded) == 18 and set(decoded.values()) == {1}
    survey(open_source("nnunet", root), lambda _: lambda: None)
    assert set(decoded.values()) == {1}, "sound files are remembered"
    inspect(source, threads=1)
    assert set(decoded.values()) == {2}


def test_content_and_tables_work_with_volumes(raw: Raw, save_volume: Save) -> None:
    root = raw()
    source = open_source("nnunet", root)

    def part() -> Dataset:
        table = remap_table((1,), 0)
        return Dataset(source, "train", tuple(source.names("train")), table, Preparation(dims=3, channels=1))

    before = content_fingerprint([part()])
    assert before == content_fingerprint([part()])
    case = part()[0]
    assert case.label.max() == 1 and case.image.shape == (1, 5, 6, 7)
    save_volume(root / "imagesTr" / f"{source.names('train')[0]}_0000.nii.gz", np.zeros((7, 6, 5), np.float32))
    assert content_fingerprint([part()]) != before


# Decathlon
def decathlon(root: Path, save_volume: Save, channels: int = 2, cases: int = 6) -> Path:
    training = []
    for k in range(cases):
        image = np.random.default_rng(k).normal(size=(7, 6, 5, channels)[: 4 if channels > 1 else 3])
        save_volume(root / "imagesTr" / f"brain_{k:03d}.nii.gz", image.astype(np.float32))
        mask = np.zeros((7, 6, 5), np.uint8)
        mask[2:4, 2:4], mask[0, 0, 0] = 1, 2
        save_volume(root / "labelsTr" / f"brain_{k:03d}.nii.gz", mask)
        training.append({"image": f"./imagesTr/brain_{k:03d}.nii.gz", "label": f"./labelsTr/brain_{k:03d}.nii.gz"})
    told = {
        "modality": {str(c): f"M{c}" for c in range(channels)},
        "labels": {"0": "background", "1": "edema", "2": "tumour"},
        "training": training,
        "test": ["./imagesTs/brain_100.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(told))
    return root


def test_decathlon_with_channels_last(tmp_path: Path, save_volume: Save) -> None:
    root = decathlon(tmp_path, save_volume)
    source = open_source("decathlon", root)
    assert (source.modality, classes(source)) == (("M0", "M1"), {1: "edema", 2: "tumour"})
    assert [len(names) for names in parts(source)] == [4, 2] and inspect(source, threads=1).ok
    name = source.names("train")[0]
    stored = np.asanyarray(nib.load(root / "imagesTr" / f"{name}.nii.gz").dataobj)
    np.testing.assert_array_equal(source.image("train", name), stored.transpose(3, 2, 1, 0))
    assert source.mask("train", name).shape == (5, 6, 7)


DECATHLON: dict[str, tuple[Callable[[Path, Save], Any], str]] = {
    "4D where 3D is declared": (
        lambda r, save: save(r / "imagesTr" / "brain_001.nii.gz", np.zeros((7, 6, 5, 3), np.float32)),
        "has 3 volumes (4 axes), and one volume (3 axes) expected",
    ),
    "a file is gone": (lambda r, save: (r / "labelsTr" / "brain_001.nii.gz").unlink(), "does not exist"),
    "a link to nowhere": (
        lambda r, save: (
            (r / "labelsTr" / "brain_001.nii.gz").unlink(),
            (r / "labelsTr" / "brain_001.nii.gz").symlink_to(r / "gone"),
        ),
        "is a link that leads nowhere",
    ),
}


@pytest.mark.parametrize("case", DECATHLON)
def test_bad_decathlon(tmp_path: Path, save_volume: Save, case: str) -> None:
    spoil, what = DECATHLON[case]
    root = decathlon(tmp_path, save_volume, channels=1)
    spoil(root, save_volume)
    found = inspect(open_source("decathlon", root), threads=1)
    assert [what in problem.what for problem in found.problems] == [True], found.problems
    assert sum(report.readable for report in found.splits.values()) == 5


@pytest.mark.parametrize(
    ("change", "what", "hint"),
    [
        ({"labels": ["background", "tumour"]}, "'labels' is ['background', 'tumour']", '"1": "liver"'),
        ({"labels": None}, "has no 'labels'", "the Decathlon has training, labels and modality"),
        ({"training": []}, "'training' is []", "imagesTr/a.nii.gz"),
        ({"modality": {"0": "MR\u202eI"}}, r"'MR\u202eI' holds a control character", "correct the name"),
    ],
    ids=["labels as a list", "no labels", "no cases", "a channel that turns the writing"],
)
def test_what_is_wrong_in_a_description_is_told_for_its_own_layout(
    tmp_path: Path, save_volume: Save, change: dict[str, Any], what: str, hint: str
) -> None:
    path = decathlon(tmp_path, save_volume, channels=1) / "dataset.json"
    told = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not None}
    path.write_text(json.dumps(told))
    with pytest.raises(DataError) as raised:
        open_source(detect(path.parent), path.parent)
    assert str(path) in raised.value.what and what in raised.value.what and hint in raised.value.hint


def test_descriptions_of_another_version_are_told(raw: Raw, tmp_path: Path, save_volume: Save) -> None:
    with pytest.raises(DataError, match="has no 'training'") as raised:
        open_source("decathlon", raw())
    assert "use the data set nnunet" in raised.value.hint
    with pytest.raises(DataError, match="has no 'channel_names'") as raised:
        open_source("nnunet", decathlon(tmp_path / "Task", save_volume))
    assert "use the data set decathlon" in raised.value.hint


# plain folders
def folders(root: Path, save_volume: Save, masks: str = "labels", channels: int = 1) -> Path:
    for k in range(6):
        for c in range(channels):
            name = f"p{k}" if channels == 1 else f"p{k}_{c:04d}"
            save_volume(root / "images" / f"{name}.nii.gz", np.random.default_rng(k).normal(size=(7, 6, 5)))
        mask = np.zeros((7, 6, 5), np.uint8)
        mask[2:4], mask[0] = 3, 255
        save_volume(root / masks / f"p{k}.nii.gz", mask)
    (root / "classes.txt").write_text("3 heart\n")
    return root


@pytest.mark.parametrize(("masks", "channels"), [("labels", 1), ("masks", 2)])
def test_plain_folders(tmp_path: Path, save_volume: Save, cli: Any, masks: str, channels: int) -> None:
    source = open_source("nifti_folders", folders(tmp_path, save_volume, masks, channels))
    assert classes(source) == {3: "heart"} and [len(names) for names in parts(source)] == [4, 2]
    case = source.read("train", source.names("train")[0])
    assert case.image.shape == (channels, 5, 6, 7)
    assert set(np.unique(case.label)) == {0, 3, IGNORE}
    assert inspect(source, threads=1).ok
    told = " ".join(cli("check", "nifti_folders", tmp_path).out.split())
    assert "255 is read as ignore in 6 images (14 % of voxels); if it is a class, list it in the class file" in told
    assert "values=" not in told and "voxel spacing 0.5×0.75×2 mm (x×y×z)" in told


def test_spacings_that_read_alike_are_told_once(tmp_path: Path, save_volume: Save) -> None:
    source = open_source("nifti_folders", folders(tmp_path, save_volume))
    assert isinstance(source, VolumeSource)
    image = tmp_path / "images" / "p0.nii.gz"
    for wide, told in ((0.5 + 1e-6, "0.5×0.75×2 mm"), (0.6, "0.5×0.75×2 to 0.6×0.75×2 mm")):
        save_volume(image, np.zeros((7, 6, 5)), np.diag([wide, 0.75, 2.0, 1.0]))
        assert told_of_volumes(source)[0] == f"voxel spacing {told} (x×y×z)"


def test_lists_of_plain_folders(tmp_path: Path, save_volume: Save) -> None:
    root = folders(tmp_path, save_volume)
    (root / "train.txt").write_text("p5\np1.nii.gz\n\n")
    (root / "test.txt").write_text("p0\n")
    assert parts(open_source("nifti_folders", root)) == (["p1", "p5"], ["p0"])
    (root / "val.txt").write_text("p2\n")
    assert open_source("nifti_folders", root).names("val") == ("p2",)
    for content, what in (("p1\n", "'p1' is in training"), ("p9\n", "line 1 names the case 'p9'"), ("\n", "is empty")):
        (root / "test.txt").write_text(content)
        with pytest.raises(DataError, match=what):
            open_source("nifti_folders", root)
    (root / "test.txt").write_text("p0\np0\n")
    with pytest.raises(DataError, match="line 2 lists 'p0' a second time"):
        open_source("nifti_folders", root)
    (root / "test.txt").unlink()
    with pytest.raises(DataError, match=r"has train.txt and no test.txt"):
        open_source("nifti_folders", root)


def test_mixed_counts_of_channels(tmp_path: Path, save_volume: Save) -> None:
    root = folders(tmp_path, save_volume, channels=2)
    (root / "images" / "p1_0001.nii.gz").unlink()
    shutil.copy(root / "images" / "p2_0001.nii.gz", root / "images" / "p2_0002.nii.gz")
    found = inspect(open_source("nifti_folders", root), threads=1)
    told = " ".join(problem.what for problem in found.problems)
    assert "case 'p1' has no file of channel 1" in told and "p2_0002.nii.gz is channel 2" in told
    assert len(found.problems) == 2


def test_plain_folders_without_a_class_file(tmp_path: Path, save_volume: Save) -> None:
    root = folders(tmp_path, save_volume)
    (root / "classes.txt").rename(tmp_path / "other.txt")
    with pytest.raises(DataError, match="has no class file"):
        open_source("nifti_folders", root)
    assert classes(open_source("nifti_folders", root, {"classes": str(tmp_path / "other.txt")})) == {3: "heart"}
    shutil.rmtree(root / "labels")
    with pytest.raises(DataError, match="lacks images/ or labels/"):
        open_source("nifti_folders", root)


# HDF5
def write_h5(path: Path, size: tuple[int, ...] = (7, 6, 5), spacing: Any = None, **extra: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"] = np.arange(np.prod(size), dtype=np.float64).reshape(size)
        label = np.zeros(size, np.uint8)
        label[2:4] = 1
        file["label"] = label
        if spacing is not None:
            file.attrs["spacing"] = spacing
        for key, values in extra.items():
            del file[key]
            if values is not None:
                file[key] = values


def test_h5_volumes(tmp_path: Path) -> None:
    for k in range(5):
        write_h5(tmp_path / "data" / f"v{k}.h5", spacing=(0.5, 0.6, 3.0))
    source = open_source("h5_volumes", tmp_path, {"classes": ["atrium"]})
    assert parts(source)[1] and inspect(source, threads=1).ok
    case = source.read("train", source.names("train")[0])
    assert case.image.shape == (1, 5, 6, 7) and str(case.image.dtype) == "torch.float32"
    assert (case.geometry.spacing, case.geometry.unit) == ((3.0, 0.6, 0.5), "mm")
    np.testing.assert_array_equal(case.image[0], np.arange(210.0).reshape(7, 6, 5).transpose(2, 1, 0))
    first = open_source("h5_volumes", tmp_path, {"classes": ["atrium"], "axes": "zyx", "spacing": [2, 1, 1]})
    case = first.read("train", first.names("train")[0])
    assert case.image.shape == (1, 7, 6, 5) and case.geometry.spacing == (2.0, 1.0, 1.0)
    assert source.fingerprint("train") != source.fingerprint("test")


H5: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no label": (lambda p: write_h5(p, label=None), "has no array 'label', only image"),
    "sizes differ": (lambda p: write_h5(p, label=np.zeros((7, 6, 4), np.uint8)), "image 7×6×5, label 7×6×4 voxels"),
    "a slice": (lambda p: write_h5(p, size=(7, 6)), "has the shape 7×6"),
    "zero spacing": (lambda p: write_h5(p, spacing=(1, 0, 1)), "voxel spacing of 1×0×1 mm"),
    "two numbers of spacing": (lambda p: write_h5(p, spacing=(1, 1)), "voxel spacing of 1×1 mm"),
    "fractions": (lambda p: write_h5(p, label=np.full((7, 6, 5), 0.5)), "holds 0.5 where a class number"),
    "unknown label": (lambda p: write_h5(p, label=np.full((7, 6, 5), 4)), "has label 4 (slice 0, row 0"),
    "NaN": (lambda p: write_h5(p, image=np.full((7, 6, 5), np.nan)), "NaN or infinite"),
    "texts": (lambda p: write_h5(p, image=np.full((7, 6, 5), b"x")), "one number per voxel is expected"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:900]), "is not a readable HDF5 file"),
    "text": (lambda p: p.write_text("hello"), "is not a readable HDF5 file"),
}


@pytest.mark.parametrize("case", H5)
def test_bad_h5_volumes(tmp_path: Path, case: str) -> None:
    for k in range(5):
        write_h5(tmp_path / f"v{k}.h5")
    spoil, what = H5[case]
    spoil(tmp_path / "v1.h5")
    found = inspect(open_source("h5_volumes", tmp_path, {"classes": ["atrium"]}), threads=1)
    assert [what in problem.what for problem in found.problems] == [True], found.problems
    assert sum(report.readable for report in found.splits.values()) == 4


def test_h5_folders_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not say which classes"):
        open_source("h5_volumes", tmp_path)
    with pytest.raises(DataError, match=r"holds no \.h5 file"):
        open_source("h5_volumes", tmp_path, {"classes": ["a"]})


@pytest.mark.real
def test_left_atrium(shared_data: Path) -> None:
    root = shared_data / "la_heart"
    source = open_source("h5_volumes", root, {"classes": ["left atrium"], "spacing": [0.625, 0.625, 0.625]})
    listed = [sorted((root / f"{split}.list").read_text().split()) for split in ("train", "test")]
    assert [*parts(source)] == listed and list(map(len, listed)) == [5, 2]
    found = inspect(source, threads=1)
    assert found.ok and all(report.images[1] == report.samples for report in found.splits.values())
    assert source.read("test", listed[1][0]).geometry.spacing == (0.625, 0.625, 0.625)


@pytest.mark.real
@pytest.mark.parametrize(
    ("folder", "cases"),
    [
        ("hippocampus/nnUNet_raw/Dataset004_Hippocampus", 29),
        ("prostate/nnUNet_raw/Dataset105_ProstateMR", 22),
        ("prostate/nnUNet_raw/Dataset106_ProstateTRUS", 22),
    ],
)
def test_real_raw_folders(shared_data: Path, folder: str, cases: int) -> None:
    found = inspect(open_source("nnunet", shared_data / folder), threads=1)
    assert found.ok and sum(report.readable for report in found.splits.values()) == cases
    assert not found.unused("train")
