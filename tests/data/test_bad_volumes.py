"""Bad volumes: each is a plain error that names the file or the case and says what to do, and the rest is read."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.errors import DataError, PerdureError, UsageError

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

Spoil = Callable[[Path], Any]
AFFINE = np.diag([0.5, 0.75, 2.0, 1.0])
AFFINE[:3, 3] = -10.25, 3.5, 20.125


def image(root: Path, case: int = 1) -> Path:
    return root / "imagesTr" / f"case{case}_0000.nii.gz"


def mask(root: Path, case: int = 1) -> Path:
    return root / "labelsTr" / f"case{case}.nii.gz"


def rewrite(which: Callable[[Path], Path], values: Callable[[np.ndarray], np.ndarray], affine: Any = None) -> Spoil:
    """Write a file anew with other values, or elsewhere."""

    def spoil(root: Path) -> None:
        path = which(root)
        stored = nib.load(path)
        place = stored.affine if affine is None else affine(stored.affine.copy())
        nib.save(nib.Nifti1Image(values(np.asanyarray(stored.dataobj)), place), path)

    return spoil


def same(values: np.ndarray) -> np.ndarray:
    return values


def with_value(value: float, dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    def changed(values: np.ndarray) -> np.ndarray:
        values = values.astype(dtype)
        values[2, 3, 1] = value
        return values

    return changed


def moved(**change: Any) -> Callable[[np.ndarray], np.ndarray]:
    """An affine with another spacing (``scale``), origin (``shift``), sense of x (``mirror``) or a shear."""

    def other(affine: np.ndarray) -> np.ndarray:
        affine[:3, 2] *= change.get("scale", 1)
        affine[0, 3] += change.get("shift", 0)
        affine[:3, 0] *= -1 if change.get("mirror") else 1
        affine[0, 2] += change.get("shear", 0)
        angle = np.radians(change.get("turn", 0))
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        affine[:3, :3] = turn @ affine[:3, :3]
        return affine

    return other


def header(which: Callable[[Path], Path], place: int, content: bytes) -> Spoil:
    """Overwrite bytes of a header."""

    def spoil(root: Path) -> None:
        raw = bytearray(gzip.decompress(which(root).read_bytes()))
        raw[place : place + len(content)] = content
        which(root).write_bytes(gzip.compress(bytes(raw)))

    return spoil


def described(**change: Any) -> Spoil:
    """Change dataset.json; ``None`` takes a key away."""

    def spoil(root: Path) -> None:
        path = root / "dataset.json"
        told = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))

    return spoil


def text(name: str, content: str) -> Spoil:
    return lambda root: (root / name).write_text(content)


def patients(**change: object) -> Spoil:
    """Write patients.json with a patient per case, but for some."""
    listed = {f"case{k}": f"p{k}" for k in range(6)} | change
    return lambda root: (root / "patients.json").write_text(json.dumps(listed))


def cut(which: Callable[[Path], Path], keep: float = 0.6) -> Spoil:
    def spoil(root: Path) -> None:
        content = which(root).read_bytes()
        which(root).write_bytes(content[: int(len(content) * keep)])

    return spoil


def link(root: Path) -> None:
    image(root).unlink()
    image(root).symlink_to(root / "gone.nii.gz")


def huge(root: Path) -> None:
    """A header that asks for 30,000³ voxels."""
    for path in (image(root), mask(root)):
        header(lambda _, path=path: path, 40, struct.pack("<4h", 3, 30000, 30000, 30000))(root)


def rename(old: str, new: str) -> Spoil:
    return lambda root: (root / old).rename(root / new)


def twin(root: Path) -> None:
    """A case whose name differs from another's in capital letters only."""
    shutil.copy(image(root), root / "imagesTr" / "CASE1_0000.nii.gz")
    shutil.copy(mask(root), root / "labelsTr" / "CASE1.nii.gz")


class Bad(NamedTuple):
    """What is done to a sound folder; what the error names, explains and advises."""

    spoil: Spoil
    named: str
    what: str
    remedy: str


# problems of one case: found by a check, the other cases are read
CASES: dict[str, Bad] = {
    "shape": Bad(rewrite(mask, lambda v: v[:, :, :-1]), "'case1'", "size: image 7×6×5, mask 7×6×4 voxels", "grid"),
    "spacing": Bad(rewrite(mask, same, moved(scale=2)), "'case1'", "spacing: image 0.5×0.75×2 mm, mask", "--fix"),
    "orientation": Bad(rewrite(mask, same, moved(mirror=True)), "'case1'", "image RAS, mask LAS", "--fix"),
    "slant": Bad(rewrite(mask, same, moved(turn=10)), "'case1'", "10 degrees apart", "--fix"),
    "position": Bad(rewrite(mask, same, moved(shift=5)), "'case1'", "5 mm apart", "--fix"),
    "NaN": Bad(rewrite(image, with_value(np.nan, np.float32)), "case1_0000", "NaN or infinite voxels: 1 of 210", "MR"),
    "infinite": Bad(rewrite(image, with_value(-np.inf, np.float32)), "case1_0000", "slice 1, row 3, column 2", "CT"),
    "beyond float32": Bad(rewrite(image, with_value(1e300, np.float64)), "case1_0000", "NaN or infinite", "replace"),
    "undeclared label": Bad(rewrite(mask, with_value(7, np.uint8)), "case1.nii.gz", "label 7 (slice 1, row 3, ", "add"),
    "negative label": Bad(rewrite(mask, with_value(-1, np.int16)), "case1.nii.gz", "has label -1", "correct the mask"),
    "beyond int16": Bad(rewrite(mask, with_value(70000, np.int32)), "case1.nii.gz", "has label 70000", "add the label"),
    "fractions": Bad(rewrite(mask, with_value(1.5, np.float32)), "case1.nii.gz", "holds 1.5 where a class", "nearest"),
    "NaN in the mask": Bad(rewrite(mask, with_value(np.nan, np.float32)), "case1.nii.gz", "holds nan where", "nearest"),
    "image as mask": Bad(
        lambda r: nib.save(nib.Nifti1Image(np.arange(210, dtype=np.int16).reshape(7, 6, 5), AFFINE), mask(r)),
        "case1.nii.gz", "210 different numbers from 0 to 209", "looks like an image",
    ),
    "4D image": Bad(rewrite(image, lambda v: np.stack([v, v], -1)), "case1_0000", "2 volumes (4 axes)", "of its own"),
    "4D mask": Bad(rewrite(mask, lambda v: np.stack([v, v], -1)), "case1.nii.gz", "2 volumes (4 axes)", "of its own"),
    "2D image": Bad(rewrite(image, lambda v: v[:, :, 0]), "case1_0000", "three axes are expected", "of its own"),
    "shear": Bad(rewrite(image, same, moved(shear=0.4)), "case1_0000", "right angles (78.69 degrees)", "resample"),
    "zero spacing": Bad(header(image, 80, struct.pack("<3f", 1, 0, 1)), "case1_0000", "spacing of 1×0×1", "above 0"),
    "negative spacing": Bad(header(image, 80, struct.pack("<3f", 1, 1, -2)), "case1_0000", "1×1×-2 mm", "above 0"),
    "flat affine": Bad(header(image, 280, b"\0" * 16), "case1_0000", "spans no volume: spacing 0×", "correct"),
    "voxels of kilometres": Bad(
        lambda r: [rewrite(which, same, moved(scale=3000))(r) for which in (image, mask)],
        "case1_0000", "voxels of 0.5×0.75×6000 mm", "at most 1000 mm",
    ),
    "truncated gzip": Bad(cut(image), "case1_0000", "not a readable volume", "copy it again"),
    "truncated mask": Bad(cut(mask, 0.7), "case1.nii.gz", "not a readable volume", "copy it again"),
    "empty file": Bad(lambda r: mask(r).write_bytes(b""), "case1.nii.gz", "is no NIfTI file", "copy it again"),
    "text as volume": Bad(lambda r: image(r).write_text("hello"), "case1_0000", "not a readable volume", "copy"),
    "no NIfTI": Bad(lambda r: image(r).write_bytes(gzip.compress(b"x" * 999)), "case1_0000", "no NIfTI file", "copy"),
    "too short": Bad(
        lambda r: image(r).write_bytes(gzip.compress(gzip.decompress(image(r).read_bytes())[:500])),
        "case1_0000", "not a readable volume", "copy it again",
    ),
    "colour image": Bad(
        rewrite(image, lambda v: np.zeros(v.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "case1_0000", "one number per voxel", "grey values",
    ),
    "complex mask": Bad(rewrite(mask, lambda v: v.astype(np.complex64)), "case1.nii.gz", "complex64", "whole numbers"),
    "larger than memory": Bad(huge, "case1_0000", "(30000×30000×30000 voxels), and", "crop or resample"),
    "no voxels": Bad(header(image, 40, struct.pack("<4h", 3, 7, 0, 5)), "case1_0000", "shape 7×0×5", "of its own"),
    "one voxel": Bad(
        lambda r: [nib.save(nib.Nifti1Image(np.ones((1, 1, 1), "u1"), AFFINE), which(r)) for which in (image, mask)],
        "case1_0000", "1×1×1 voxels", "remove the case",
    ),
    "not annotated": Bad(text("annotated.json", '{"case1": ["liver"]}'), "case1.nii.gz", "shows 'spleen'", "add"),
}  # fmt: skip

# problems of files: told by a check, and a run is refused
FILES: dict[str, Bad] = {
    "mask gone": Bad(lambda r: mask(r).unlink(), "case1_0000", "image without mask", "add the mask"),
    "image gone": Bad(lambda r: image(r).unlink(), "case1.nii.gz", "mask without image", "add the image"),
    "link to nowhere": Bad(link, "case1_0000", "gone.nii.gz, which does not exist", "remove the link"),
    "capital letters": Bad(twin, "'CASE1' and 'case1'", "capital letters only", "rename"),
    "no channel number": Bad(
        rename("imagesTr/case1_0000.nii.gz", "imagesTr/case1.nii.gz"), "case1.nii.gz", "no number", "case1_0000.nii.gz"
    ),
    "extra channel": Bad(
        lambda r: shutil.copy(image(r), r / "imagesTr" / "case1_0001.nii.gz"), "case1_0001", "is channel 1", "remove it"
    ),
    "missing channel": Bad(
        described(channel_names={"0": "T1", "1": "T2"}), "'case0'", "no file of channel 1 (T2)", "add case0_0001"
    ),
    "a folder as image": Bad(
        lambda r: (image(r).unlink(), image(r).mkdir()), "case1_0000", "is a folder, and a file", "put the file"
    ),
    "another format": Bad(rename("labelsTr/case1.nii.gz", "labelsTr/case1.mha"), "case1.mha", "not end in", "ending"),
    "control characters": Bad(
        lambda r: shutil.copy(mask(r), r / "labelsTr" / "a\nb.nii.gz"), "b.nii.gz", "not plain UTF-8", "rename"
    ),
    "unknown case annotated": Bad(text("annotated.json", '{"case9": []}'), "'case9'", "is not there", "did you mean"),
    "unknown class annotated": Bad(text("annotated.json", '{"case1": ["livr"]}'), "'livr'", "no class", "'liver'?"),
    "annotated by number": Bad(text("annotated.json", '{"case1": [1]}'), "'case1'", "no list of class names", "write"),
    "patient missing": Bad(text("patients.json", '{"case0": "p"}'), "'case1'", "does not name the patient", "list"),
    "patient of an unknown case": Bad(patients(kase1="p"), "'kase1'", "is not there", "did you mean 'case1'?"),
    "patient is a list": Bad(patients(case1=["p"]), "'case1'", 'is ["p"], which is no name', "one name or number"),
    "patient is nothing": Bad(patients(case1=""), "'case1'", 'is "", which is no name', "one name or number"),
    "patient is a truth value": Bad(patients(case1=True), "'case1'", "is true, which is no name", "one name"),
}  # fmt: skip

# what is wrong with the description is told when the folder is opened
OPENING: dict[str, Bad] = {
    "no description": Bad(lambda r: (r / "dataset.json").unlink(), "Dataset001", "no dataset.json", "nnUNet_raw"),
    "patients are a list": Bad(text("patients.json", '["p"]'), "patients.json", "no mapping of cases", "{"),
    "patients are no JSON": Bad(text("patients.json", "{"), "patients.json", "not valid JSON", ""),
    "no JSON": Bad(text("dataset.json", "{"), "dataset.json", "not valid JSON", ""),
    "a list": Bad(text("dataset.json", "[]"), "dataset.json", "no description", "channel_names"),
    "no labels": Bad(described(labels=None), "dataset.json", "has no 'labels'", "nnU-Net v2 needs"),
    "the Decathlon": Bad(
        described(channel_names=None, modality={"0": "MRI"}, training=[]), "dataset.json", "channel_names", "decathlon"
    ),
    "unknown ending": Bad(described(file_ending=".npy"), "dataset.json", "end in '.npy' are not read", ".nii.gz"),
    "wrong ending": Bad(described(file_ending=".nrrd"), "case0.nii.gz", "not end in .nrrd", "file_ending"),
    "channels misnumbered": Bad(described(channel_names={"1": "T1"}), "dataset.json", "channel_names is", "number"),
    "no background": Bad(described(labels={"liver": 1}), "dataset.json", "do not give 0", "background"),
    "labels are a list": Bad(
        described(labels=["background", "liver"]), "dataset.json", "labels are a list", '{"background": 0, "liver": 1}'
    ),
    "labels of the Decathlon": Bad(
        described(labels={"0": "background", "1": "liver"}), "dataset.json", "give names to numbers", '"liver": 1'
    ),
    "channel that turns the writing": Bad(
        described(channel_names={"0": "T1\u202eTC"}), "dataset.json", "'T1\\u202eTC' holds a control", "correct"
    ),
    "class that is not seen": Bad(
        described(labels={"background": 0, "liver": 1, "liver\u200b": 2}), "dataset.json", "\\u200b", "correct the name"
    ),
    "class that is a path": Bad(
        described(labels={"background": 0, "../../etc": 1}), "dataset.json", "'../../etc' looks like a path", "correct"
    ),
    "label as text": Bad(described(labels={"background": 0, "liver": "1"}), "dataset.json", "'liver' is 1", "run from"),
    "one number twice": Bad(
        described(labels={"background": 0, "a": 1, "b": 1}), "dataset.json", "'a' and 'b' both", "number each"
    ),
    "label out of range": Bad(described(labels={"background": 0, "a": 5000}), "dataset.json", "5000", "1 to 4094"),
    "only background": Bad(described(labels={"background": 0}), "dataset.json", "names no class", "liver"),
    "ignore is a class": Bad(
        described(labels={"background": 0, "a": 1, "ignore": 1}), "dataset.json", "'ignore' is 1", "of its own"
    ),
    "regions without order": Bad(
        described(labels={"background": 0, "all": [1, 2], "core": [2]}), "dataset.json", "regions_class_order is None",
        "one number per region",
    ),
    "region wholly covered": Bad(
        described(labels={"background": 0, "core": [2], "all": [1, 2]}, regions_class_order=[2, 1]), "dataset.json",
        "'core' is covered wholly", "large regions before",
    ),
    "folds divide a patient": Bad(
        lambda r: (
            (r / "patients.json").write_text(json.dumps({f"case{k}": "p" if k < 2 else f"q{k}" for k in range(6)})),
            (r / "splits_final.json").write_text(json.dumps([{"train": ["case0", "case2"], "val": ["case1"]}])),
        ), "patient 'p'", "in training and in testing", "move it",
    ),
    "a case in both": Bad(
        text("splits_final.json", '[{"train": ["case0", "case1"], "val": ["case1"]}]'), "'case1'", "in training and in",
        "move it",
    ),
    "folds of other cases": Bad(
        text("splits_final.json", '[{"train": ["case0"], "val": ["case11"]}]'), "'case11'", "not there", "did you mean"
    ),
    "folds are no list": Bad(text("splits_final.json", "{}"), "splits_final.json", "no list of folds", "expected"),
    "empty fold": Bad(text("splits_final.json", '[{"train": ["case0"], "val": []}]'), "fold 0", "lacks cases", "each"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_case_is_told_and_the_others_are_read(raw: Callable[..., Path], case: str) -> None:
    spoil, named, what, remedy = CASES[case]
    root = raw()
    spoil(root)
    found = inspect(open_source("nnunet", root), threads=1)
    assert not found.ok
    assert len(found.problems) == 1, found.problems
    (problem,) = found.problems
    assert named in problem.what and what in problem.what and remedy in problem.hint, (problem.what, problem.hint)
    assert "\n" not in problem.what + problem.hint
    assert sum(report.readable for report in found.splits.values()) == 5


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_told_and_a_run_is_refused(raw: Callable[..., Path], case: str) -> None:
    spoil, named, what, remedy = FILES[case]
    root = raw()
    spoil(root)
    source = open_source("nnunet", root)
    found = inspect(source, threads=1)
    assert not found.ok
    told = [problem for problem in found.problems if named in problem.what and what in problem.what]
    assert told and remedy in told[0].hint, found.problems
    with pytest.raises(DataError):
        source.names("train")


@pytest.mark.parametrize("case", OPENING)
def test_a_bad_description_is_told_at_once(raw: Callable[..., Path], case: str) -> None:
    spoil, named, what, remedy = OPENING[case]
    root = raw()
    spoil(root)
    with pytest.raises(DataError) as raised:
        open_source("nnunet", root).names("train")
    error = raised.value
    assert named in error.what and what in error.what and remedy in error.hint, (error.what, error.hint)


def test_one_case_cannot_be_divided(raw: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="has one case only") as raised:
        open_source("nnunet", raw(cases=1))
    assert raised.value.hint == "add further cases"


def test_one_patient_cannot_be_divided(raw: Callable[..., Path]) -> None:
    root = raw(cases=3)
    (root / "patients.json").write_text('{"case0": "p", "case1": "p", "case2": "p"}')
    with pytest.raises(DataError, match="has one patient only"):
        open_source("nnunet", root)


def test_options_that_cannot_be(raw: Callable[..., Path]) -> None:
    root = raw(cases=3)
    with pytest.raises(UsageError, match=r"fold=3, but .* has 3 folds") as raised:
        open_source("nnunet", root, {"fold": 3})
    assert raised.value.hint == "give 0 to 2"
    for part, name in (("images", "case0_0000"), ("labels", "case0")):
        (root / f"{part}Ts").mkdir()
        shutil.move(root / f"{part}Tr" / f"{name}.nii.gz", root / f"{part}Ts" / f"{name}.nii.gz")
    with pytest.raises(UsageError, match=r"fold=1, but .* has test cases in labelsTs"):
        open_source("nnunet", root, {"fold": 1})
    assert open_source("nnunet", root).names("test") == ("case0",)


@pytest.mark.parametrize("case", ["shape", "spacing", "NaN", "undeclared label", "truncated gzip", "no description"])
def test_the_command_line_says_it_in_plain_lines(raw: Callable[..., Path], cli: Callable[..., Any], case: str) -> None:
    bad = (CASES | OPENING)[case]
    root = raw()
    bad.spoil(root)
    done = cli("check", "nnunet", root)
    told = " ".join((done.out + done.err).split())
    assert done.code == 1 and bad.what in told and bad.remedy in told
    assert "Traceback" not in told and "this is a bug" not in told


# sound, though it may look odd
def test_whole_numbers_stored_as_fractions_are_labels(raw: Callable[..., Path]) -> None:
    root = raw()
    source = open_source("nnunet", root)
    name = source.names("train")[0]
    before = source.mask("train", name)
    rewrite(lambda r: r / "labelsTr" / f"{name}.nii.gz", lambda v: v.astype(np.float64))(root)
    after = open_source("nnunet", root).mask("train", name)
    assert after.dtype == np.int16 and after.max() == 2 and np.array_equal(before, after)


def test_what_differs_by_rounding_is_the_same(raw: Callable[..., Path]) -> None:
    root = raw()
    rewrite(mask, same, moved(shift=8e-4, scale=1 + 5e-4, turn=0.02))(root)
    assert inspect(open_source("nnunet", root), threads=1).ok


def test_mixed_orientations_are_read_alike(raw: Callable[..., Path]) -> None:
    root = raw()
    plain = {
        name: open_source("nnunet", root).read("train", name) for name in open_source("nnunet", root).names("train")
    }
    for k, path in enumerate(sorted((root / "labelsTr").iterdir())):
        stored = nib.load(path)
        ornt = nib.orientations.axcodes2ornt(("LPS", "SAR", "RAS")[k % 3])
        turned = stored.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(stored.affine), ornt))
        nib.save(nib.Nifti1Image(np.asanyarray(turned.dataobj), turned.affine), path)
    source = open_source("nnunet", root)
    assert inspect(source, threads=1).ok
    for name, case in plain.items():
        assert np.array_equal(source.read("train", name).label, case.label)


def test_a_declared_class_that_never_occurs_and_empty_masks_are_told(raw: Callable[..., Path]) -> None:
    root = raw(labels={"background": 0, "liver": 1, "spleen": 2, "kidney": 3})
    rewrite(mask, np.zeros_like)(root)
    found = inspect(open_source("nnunet", root), threads=1)
    assert found.ok and found.unused("train") == ("kidney",)
    assert [name for report in found.splits.values() for name in report.empty] == ["case1"]


def test_all_masks_empty_is_a_problem(raw: Callable[..., Path]) -> None:
    root = raw()
    for k in range(6):
        rewrite(lambda r, k=k: mask(r, k), np.zeros_like)(root)
    found = inspect(open_source("nnunet", root), threads=1)
    assert [problem.what for problem in found.problems] == ["no training mask shows a class, only background"]


def test_the_same_case_in_training_and_testing_is_told(raw: Callable[..., Path]) -> None:
    root = raw()
    source = open_source("nnunet", root)
    test, train = source.names("test")[0], source.names("train")[0]
    shutil.copy(root / "imagesTr" / f"{train}_0000.nii.gz", root / "imagesTr" / f"{test}_0000.nii.gz")
    assert inspect(open_source("nnunet", root), threads=1).shared == {"train, test": {test: train}}


def test_long_and_thin_volumes_are_read_and_told(raw: Callable[..., Path], save_volume: Any, cli: Any) -> None:
    root = raw()
    long = np.diag([200.0, 1.0, 1.0, 1.0])
    save_volume(image(root), np.ones((200, 1, 1), np.float32), long)
    save_volume(mask(root), np.ones((200, 1, 1), np.uint8), long)
    done = cli("check", "nnunet", root)
    told = " ".join(done.out.split())
    assert done.code == 0, done.out
    assert "'case1' has voxels of 200×1×1 mm: is that its spacing?" in told
    assert "1 case is one voxel thick (first: 'case1')" in told
    assert "images / voxels" in told and "test cases are those of fold 0 (of 0 to 4, divided as nnU-Net does)" in told
    assert "200×1×1" in told


TOLD: dict[str, tuple[Spoil, str]] = {
    "half a copy": (described(numTraining=500), "dataset.json says numTraining 500, and 6 cases are there"),
    "metres instead of millimetres": (
        lambda r: [rewrite(which, same, lambda _: np.diag([5e-4, 5e-4, 5e-4, 1]))(r) for which in (image, mask)],
        "'case1' has voxels of 0.0005×0.0005×0.0005 mm: is that its spacing?",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_can_be_used_and_looks_odd_is_told(raw: Callable[..., Path], cli: Any, case: str) -> None:
    spoil, what = TOLD[case]
    root = raw()
    assert what not in " ".join(cli("check", "nnunet", root).out.split())
    spoil(root)
    done = cli("check", "nnunet", root)
    assert done.code == 0 and what in " ".join(done.out.split()), done.out


def replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


ITK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "is not a readable volume: it has"),
    "zero spacing": (lambda p: replace(p, b"= 1 1 1\nDimSize", b"= 1 0 1\nDimSize"), "1×0×1 mm"),
    "negative spacing": (lambda p: replace(p, b"= 1 1 1\nDimSize", b"= 1 -2 1\nDimSize"), "1×-2×1 mm"),
    "negative number of axes": (lambda p: replace(p, b"NDims = 3", b"NDims =-3"), "the number of axes"),
    "sizes of two axes": (lambda p: replace(p, b"DimSize = 5 4 3", b"DimSize = 5 43"), "the number of axes"),
    "two numbers per voxel": (
        lambda p: sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5, 2), np.int16), isVector=True), str(p)),
        "2 numbers per voxel",
    ),
    "a picture": (lambda p: sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.int16)), str(p)), "2 axes"),
    "text": (lambda p: p.write_text("hello"), "is not a readable volume"),
    "empty": (lambda p: p.write_bytes(b""), "is not a readable volume"),
}  # fmt: skip


@pytest.mark.parametrize("case", ITK)
def test_bad_files_of_itk(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    from perdure.data.volumes.files import read_header, read_voxels

    path = tmp_path / "x.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5)), str(path))
    spoil, what = ITK[case]
    spoil(path)
    with pytest.raises(DataError) as raised:
        read_voxels(read_header(path))
    assert what in raised.value.what and str(path) in raised.value.what and "\n" not in raised.value.what
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_a_plain_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perdure.data.volumes.extra import need

    with pytest.raises(PerdureError) as raised:
        need("no_such_package")
    assert str(raised.value) == "reading volumes needs the extra 'volumes'\npip install 'perdure[volumes]'"
