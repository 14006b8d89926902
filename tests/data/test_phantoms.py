"""Built-in look-alikes of medical images."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perdure.cli.phantoms import KINDS
from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.data.phantoms.drawing import Scene
from perdure.data.phantoms.raw_folders import FOLDERS, PLACES, write_raw_folders
from perdure.data.phantoms.torso import CLASSES, LESION, LIVER, SETS
from perdure.data.readers import phantoms
from perdure.data.readers.phantoms import Phantoms, open_phantoms
from perdure.data.source import AbsentSplitError, Source, Split
from perdure.errors import DataError, PerdureError, UsageError
from perdure.files import TEMPORARY

KINDS_AND_SETS: list[dict[str, Any]] = [
    *({"kind": "torso", "set": name} for name in SETS),
    *({"kind": kind} for kind in ("cardiac", "fundus", "prostate")),
]
SPLITS: tuple[Split, ...] = ("train", "test")
every_kind = pytest.mark.parametrize("options", KINDS_AND_SETS, ids=lambda o: o.get("set") or o["kind"])


def cases(source: Phantoms, split: Split = "train") -> list[tuple[np.ndarray, np.ndarray]]:
    return [(source.image(split, name), source.mask(split, name)) for name in source.names(split)]


@every_kind
def test_cases_are_a_function_of_the_options(options: dict[str, Any]) -> None:
    first = cases(open_phantoms(**options, train=3, test=1))
    source = open_phantoms(**options, train=5, test=2)
    backwards = [(source.image("train", n), source.mask("train", n)) for n in reversed(source.names("train"))]
    for (image, mask), (again, mask_again) in zip(first, backwards[::-1], strict=False):
        np.testing.assert_array_equal(image, again)  # more cases and another order keep the first ones
        np.testing.assert_array_equal(mask, mask_again)
    other = cases(open_phantoms(**options, train=3, seed=1)), cases(open_phantoms(**options, train=3, source=1))
    pixels = [image.tobytes() for found in (first, *other, cases(source, "test")) for image, _ in found]
    assert len(set(pixels)) == 3 * 3 + 2  # no two are equal, whatever differs


@every_kind
def test_every_case_shows_every_class_with_labels_that_say_where(options: dict[str, Any]) -> None:
    source = open_phantoms(**options, train=5, test=2)
    for split in SPLITS:
        for image, mask in cases(source, split):
            assert (image.dtype, mask.dtype) == (np.float32 if source.dims == 3 else np.uint8, np.int16)
            assert image.shape == (1, *mask.shape) == ((1, 48, 64, 64) if source.dims == 3 else (1, 64, 64))
            assert set(np.unique(mask)) == {0, *source.space.ids}
            assert np.isfinite(image).all()
    found = inspect(source)
    assert found.ok and list(found.absent) == ["val"] and not found.shared


def test_sets_of_the_torso_label_their_own_parts_of_one_anatomy() -> None:
    assert len(CLASSES) == 8
    for part, names in SETS.items():
        own = open_phantoms(set=part, train=2, test=1)
        complete = open_phantoms(set=part, train=2, test=1, labels="all")
        assert tuple(c.name for c in own.space.classes) == names
        assert tuple(c.name for c in complete.space.classes) == CLASSES
        for (image, mask), (same, every) in zip(cases(own), cases(complete), strict=True):
            np.testing.assert_array_equal(image, same)
            assert set(np.unique(every)) == set(range(9))
            for name in names:
                np.testing.assert_array_equal(mask == own.space.id_of(name), every == complete.space.id_of(name))
        assert own.fingerprint("train") != complete.fingerprint("train")


def test_a_torso_has_the_numbers_of_computed_tomography() -> None:
    """The middle of each structure, which no edge and little noise disturbs."""
    from scipy.ndimage import binary_erosion, label

    source = open_phantoms(labels="all", train=6)
    values: dict[str, list[float]] = {name: [] for name in CLASSES}
    for image, mask in cases(source):
        assert np.array_equal(image, np.rint(image)) and -1024 <= image.min() < -950
        assert np.median(image[0, :, 0, 0]) == pytest.approx(-1000, abs=8)
        for number, name in enumerate(CLASSES, 1):
            inside = binary_erosion(mask == number)
            values[name].append(float(np.median(image[0][inside if inside.any() else mask == number])))
        lesions, count = label(mask == LESION)
        assert count >= 1
        largest = np.bincount(lesions.ravel())[1:].argmax() + 1
        assert all(np.ptp(axis) + 1 >= 4 for axis in np.nonzero(lesions == largest))
    for name, (low, high) in {
        "lungs": (-850, -700), "liver": (70, 110), "spleen": (90, 140), "kidneys": (145, 210), "aorta": (105, 150),
        "vena_cava": (90, 140), "vertebrae": (200, 700),
    }.items():  # fmt: skip
        assert all(low < value < high for value in values[name]), (name, values[name])
    darker = np.subtract(values["liver"], values["liver_lesion"])
    assert (darker > 25).all() and (darker < 60).all()


def test_boxes_save_time_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = cases(open_phantoms(labels="all", train=6))
    monkeypatch.setattr(Scene, "box", lambda self, *_: self.whole)
    for (image, mask), (whole, every) in zip(drawn, cases(open_phantoms(labels="all", train=6)), strict=True):
        np.testing.assert_array_equal(mask, every)
        np.testing.assert_array_equal(image, whole)


def test_anatomy_spacing_and_side_vary_as_in_patients() -> None:
    source = open_phantoms(labels="all", train=8, test=1)
    read = [source.read("train", name) for name in source.names("train")]
    spacings = {case.geometry.spacing for case in read}
    assert len(spacings) > 3
    for depth, height, width in spacings:
        assert 5 <= depth <= 7.5 and 4.5 <= height == width <= 6
        assert all(4 * step == int(4 * step) for step in (depth, height, width))
    for case in read:
        centre = [float(axis.mean()) for axis in np.nonzero(np.isin(case.label, (LIVER, LESION)))]
        spleen = [float(axis.mean()) for axis in np.nonzero(case.label.numpy() == CLASSES.index("spleen") + 1)]
        lungs = [float(axis.mean()) for axis in np.nonzero(case.label.numpy() == CLASSES.index("lungs") + 1)]
        spine = [float(axis.mean()) for axis in np.nonzero(case.label.numpy() == CLASSES.index("vertebrae") + 1)]
        assert centre[2] > spleen[2] + 15  # the liver is on the right, and the last axis runs from left to right
        assert centre[0] < lungs[0] - 8  # the first from below to above
        assert spine[1] < centre[1] - 8  # the second from back to front
    livers = [float((np.asarray(case.label) == LIVER).sum() * np.prod(case.geometry.spacing)) / 1e6 for case in read]
    assert max(livers) > 1.15 * min(livers) and 0.8 < np.mean(livers) < 2.2  # litres


def test_another_source_looks_different() -> None:
    ordinary, other = (open_phantoms(labels="all", train=4, source=k) for k in (0, 1))
    blood = [
        np.mean([np.median(image[0][mask == CLASSES.index("aorta") + 1]) for image, mask in cases(source)])
        for source in (ordinary, other)
    ]
    noise = [np.mean([image[0, :, :4, :4].std() for image, _ in cases(source)]) for source in (ordinary, other)]
    assert blood[0] > blood[1] + 25
    assert set(ordinary.names("train")).isdisjoint(other.names("train"))
    assert noise[1] > 1.1 * noise[0]
    for kind in ("cardiac", "fundus", "prostate"):
        pairs = [cases(open_phantoms(kind=kind, train=8, source=k)) for k in (0, 1)]
        spread = [np.mean([image.std() for image, _ in pair]) for pair in pairs]
        assert spread[1] < 0.9 * spread[0], kind


def test_one_case_in_one_place() -> None:
    source = open_phantoms(train=1, test=1)
    source.image("train", "organs_000")[:] = 0
    source.mask("train", "organs_000")[:] = 0
    assert source.image("train", "organs_000").any() and source.mask("train", "organs_000").any()
    copy = pickle.loads(pickle.dumps(source))
    assert source._cases and not copy._cases
    np.testing.assert_array_equal(copy.image("train", "organs_000"), source.image("train", "organs_000"))
    for split, name in itertools.product(
        SPLITS, ("organs_001", "organs_0000", "organs_test_001", "organs_-01", "000", "organs_²")
    ):
        with pytest.raises(DataError, match="phantoms has no case"):
            source.image(split, name)
    with pytest.raises(DataError, match="no case 'organs_000' in split 'test'"):
        source.image("test", "organs_000")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_phantoms("cardiac", train=20)
    monkeypatch.setattr(phantoms, "_CACHE_BYTES", 5 * 2 * 64 * 64)
    first = source.image("train", "cardiac_000")
    for name in source.names("train"):
        source.image("train", name)
        assert 1 <= len(source._cases) <= 5
    np.testing.assert_array_equal(source.image("train", "cardiac_000"), first)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"set": "organ"}, "unknown set 'organ'\ndid you mean 'organs'"),
        ({"kind": "fundus", "set": "organs"}, "set is 'organs', but fundus has no sets"),
        ({"size": 31}, "size is 31\n32 to 256"),
        ({"size": 257}, "size is 257\n32 to 256"),
        ({"kind": "cardiac", "size": 1025}, "size is 1025\n32 to 1024"),
        ({"train": -1}, "train is -1\n0 to 9999"),
        ({"test": 10_000}, "test is 10000"),
        ({"source": -1}, "source is -1"),
        ({"kind": "leg"}, "option 'kind' of data set 'phantoms' is 'leg'"),
        ({"labels": "some"}, "option 'labels' of data set 'phantoms' is 'some'"),
        ({"sets": "organs"}, "has no option 'sets'\ndid you mean 'set'"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as told:
        open_source("phantoms", None, options)
    assert says in str(told.value)


def test_defaults_splits_and_other_sizes() -> None:
    source = open_source("phantoms", None)
    assert isinstance(source, Source)
    assert (len(source.names("train")), len(source.names("test")), source.patients) == (24, 8, False)
    assert len(open_phantoms("fundus").names("train")) == 120
    with pytest.raises(AbsentSplitError, match="validation=10"):
        source.names("val")
    with pytest.raises(AbsentSplitError, match="set test above 0"):
        open_phantoms(test=0).names("test")
    assert len(open_source("phantoms", None, {"train": 6, "validation": 3}).names("val")) == 2
    for size in (32, 96):
        made = open_phantoms(size=size, train=1, labels="all")
        assert made.image("train", "organs_000").shape == (1, size * 3 // 4, size, size)
        assert set(np.unique(made.mask("train", "organs_000"))) == set(range(9))
    prints = {open_phantoms(**o).fingerprint(s) for o in (*KINDS_AND_SETS, {"seed": 1}, {"train": 3}) for s in SPLITS}
    assert len(prints) == 2 * 8 - 1  # another number of training cases leaves the test cases what they are


def written(what: str, folder: Path, **options: int | None) -> list[Path]:
    return write_raw_folders(what, folder, options, lambda total: lambda: None)


def test_volumes_read_back_as_they_were_drawn(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    reader = pytest.importorskip("nnunetv2.imageio.nibabel_reader_writer").NibabelIOWithReorient()
    folders = written("torso", tmp_path, train=2, test=1)
    assert [path.name for path in folders] == list(FOLDERS["torso"])
    for folder, options in zip(folders, FOLDERS["torso"].values(), strict=True):
        source = open_phantoms(set=options["set"], train=2, test=1)
        described = json.loads((folder / "dataset.json").read_text())
        assert described["labels"] == {"background": 0} | {c.name: c.id for c in source.space.classes}
        assert (described["channel_names"], described["file_ending"]) == ({"0": "CT"}, ".nii.gz")
        assert described["numTraining"] == 2
        for split in SPLITS:
            images, labels = (folder / place for place in PLACES[split])
            assert sorted(p.name for p in images.iterdir()) == [f"{n}_0000.nii.gz" for n in source.names(split)]
            assert sorted(p.name for p in labels.iterdir()) == [f"{n}.nii.gz" for n in source.names(split)]
            for name in source.names(split):
                case = source.read(split, name)
                path = images / f"{name}_0000.nii.gz"
                image, properties = reader.read_images([str(path)])
                label, _ = reader.read_seg(str(labels / f"{name}.nii.gz"))
                np.testing.assert_array_equal(image, case.image.numpy())
                np.testing.assert_array_equal(label[0], case.label.numpy())
                assert tuple(properties["spacing"]) == case.geometry.spacing
                stored = nibabel.load(path)
                assert stored.get_data_dtype() == np.int16 and nibabel.aff2axcodes(stored.affine) == ("R", "A", "S")
                assert tuple(stored.affine.ravel()) == case.geometry.affine
                assert (case.geometry.axes, case.geometry.unit) == (((2, False), (1, False), (0, False)), "mm")


def test_slices_read_back_as_they_were_drawn(tmp_path: Path) -> None:
    reader = pytest.importorskip("nnunetv2.imageio.natural_image_reader_writer").NaturalImage2DIO()
    for folder, options in zip(written("slices", tmp_path, train=2, test=2), FOLDERS["slices"].values(), strict=True):
        source = open_phantoms(options["kind"], train=2, test=2)  # type: ignore[arg-type]
        for split in SPLITS:
            images, labels = (folder / place for place in PLACES[split])
            for name in source.names(split):
                image, _ = reader.read_images([str(images / f"{name}_0000.png")])
                label, _ = reader.read_seg(str(labels / f"{name}.png"))
                np.testing.assert_array_equal(image[:, 0], source.image(split, name))
                np.testing.assert_array_equal(label[0, 0], source.mask(split, name))


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    for what in FOLDERS:
        for place in ("a", "b"):
            written(what, tmp_path / place, train=1, test=1, size=32)
    one, two = (
        {p.relative_to(tmp_path / place): p.read_bytes() for p in (tmp_path / place).rglob("*") if p.is_file()}
        for place in ("a", "b")
    )
    assert len(one) == 6 * 5 and one == two


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("perdure.data.phantoms.raw_folders.write_json", full)
    with pytest.raises(PerdureError, match="the disk is full"):
        written("slices", tmp_path, train=1, test=0, size=32)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "Dataset012_Fundus").mkdir()
    with pytest.raises(UsageError, match="Dataset012_Fundus is there already"):
        written("slices", tmp_path, train=1, test=0, size=32)
    with pytest.raises(UsageError, match="needs training cases"):
        written("torso", tmp_path / "new", train=0, test=1, size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["Dataset012_Fundus"]
    folders = written("slices", tmp_path / "c", train=1, test=0, size=32)
    assert sorted(p.name for p in folders[0].iterdir()) == ["dataset.json", "imagesTr", "labelsTr"]
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(PerdureError, match=r"needs the extra 'volumes'\npip install 'perdure\[volumes\]'"):
        written("torso", tmp_path, train=1, test=0, size=32)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_names_what_can_be_written() -> None:
    assert tuple(FOLDERS) == KINDS
