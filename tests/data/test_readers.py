"""Readers on tiny files in the official layouts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import DATASETS, open_source
from perdure.data.readers.ade20k import ade20k_space, open_ade20k
from perdure.data.readers.camvid import open_camvid
from perdure.data.readers.cityscapes import open_cityscapes
from perdure.data.readers.classfile import read_class_file
from perdure.data.readers.folders import open_folders
from perdure.data.readers.imagefiles import read_index_mask
from perdure.data.readers.voc import CLASSES, open_voc, voc_color
from perdure.data.source import AbsentSplitError, Source, distinct
from perdure.errors import DataError
from perdure.labels import IGNORE, TABLE_SIZE
from perdure.streams.lists import label_presence


def image(path: Path, size: tuple[int, int] = (6, 4), color: tuple[int, int, int] = (10, 200, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def mask(path: Path, values: list[int], size: tuple[int, int] = (6, 4), palette: bool = False) -> None:
    """A mask whose first pixels hold ``values`` and the others the last of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size[0] * size[1], values[-1], np.uint8)
    pixels[: len(values)] = values
    picture = Image.fromarray(pixels.reshape(size[1], size[0]), "L")
    if palette:
        picture = Image.fromarray(pixels.reshape(size[1], size[0])).convert("P")
        picture.putpalette([c for k in range(256) for c in voc_color(k)])
        picture.putdata(pixels.tolist())
    picture.save(path)


def voc(base: Path, train: str = "a\nb\n", val: str = "c\n") -> Path:
    for name, values in (("a", [0, 1]), ("b", [255, 20]), ("c", [5, 0])):
        image(base / "JPEGImages" / f"{name}.jpg")
        mask(base / "SegmentationClass" / f"{name}.png", values, palette=True)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text(train)
    (lists / "val.txt").write_text(val)
    return base


def camvid(root: Path, prefixed: bool) -> Path:
    suffix = "png" if prefixed else "jpg"
    for split in ("train", "val", "test"):
        image(root / split / f"{split}1.{suffix}")
        mask(root / f"{split}annot" / f"{split}1.png", [0, 10, 11, 255, 3])
        line = (
            f"/SegNet/CamVid/{split}/{split}1.png /SegNet/CamVid/{split}annot/{split}1.png" if prefixed else f"{split}1"
        )
        (root / f"{split}.txt").write_text(line + "\n")
    return root


def folder(root: Path) -> Path:
    for k in range(6):
        image(root / "images" / f"s{k}.jpg")
        mask(root / "masks" / f"s{k}.png", [0, 1 + k % 2])
    (root / "classes.txt").write_text("1 cell wall\n2 nucleus\n")
    return root


def no_validation(source: Source) -> None:
    """The test images do not stand in for validation images, and the error says what to do."""
    with pytest.raises(AbsentSplitError, match="has no validation set") as told:
        source.names("val")
    assert "validation=10" in told.value.hint


@pytest.mark.parametrize("inside", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_found_from_each_of_its_folders(tmp_path: Path, inside: str) -> None:
    voc(tmp_path / inside)
    source = open_voc(tmp_path)
    assert isinstance(source, Source)
    assert source.names("train") == ("a", "b")
    assert source.names("test") == ("c",)
    no_validation(source)
    assert [c.name for c in source.space.classes] == list(CLASSES)
    assert (source.other_label, source.patients) == (0, False)
    np.testing.assert_array_equal(np.unique(source.mask("train", "b")), [20, IGNORE])
    picture = source.image("train", "a")
    assert picture.shape == (3, 4, 6)
    assert picture.dtype == np.uint8
    assert abs(int(picture[1].mean()) - 200) < 4  # channel 1 is green


def test_voc_palette_is_that_of_the_development_kit() -> None:
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {k: voc_color(k) for k in known} == known


def test_voc_takes_the_augmented_list_and_its_masks(tmp_path: Path) -> None:
    voc(tmp_path)
    for name in ("a", "c"):
        mask(tmp_path / "SegmentationClassAug" / f"{name}.png", [7])
    lists = tmp_path / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").write_text(
        "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/c.jpg /SegmentationClassAug/c.png\n"
    )
    source = open_voc(tmp_path)
    assert source.names("train") == ("a", "c")
    assert source.mask("train", "c").max() == 7
    assert source.mask("test", "c")[0, 0] == 5  # the val list keeps the official mask of the same image
    assert open_voc(tmp_path, train_list="train").names("train") == ("a", "b")
    (lists / "train_aug.txt").write_text("c\n")  # the list of names alone
    assert open_voc(tmp_path).mask("train", "c").max() == 7


def test_voc_layout_with_its_own_classes(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "classes.txt").write_text("0 null\n1 red hat\n5 shoe\n20 bag\n")
    (tmp_path / "ImageSets" / "Segmentation" / "test.txt").write_text("b\n")
    source = open_voc(tmp_path)
    assert source.space.ids == (1, 5, 20)
    assert source.space.name(1) == "red hat"
    assert source.space.name(0) == "null"
    assert (source.names("val"), source.names("test")) == (("c",), ("b",))
    (tmp_path / "ImageSets" / "Segmentation" / "test.txt").unlink()
    source = open_voc(tmp_path)
    assert source.names("test") == ("c",)
    no_validation(source)


def test_voc_class_file_with_vocs_own_names_changes_nothing(tmp_path: Path) -> None:
    voc(tmp_path)
    names = ["_background_", *CLASSES[:15], "potted plant", *CLASSES[16:19], "tv/monitor"]
    (tmp_path / "class_names.txt").write_text("\n".join(names))
    assert open_voc(tmp_path).space == open_voc(tmp_path).space
    assert open_voc(tmp_path).space.id_of("tvmonitor") == 20
    assert open_voc(tmp_path).space[16].color == (0, 64, 0)


def test_ade20k(tmp_path: Path) -> None:
    base = tmp_path / "ADEChallengeData2016"
    for name in ("ADE_val_00000002", "ADE_val_00000001"):
        image(base / "images" / "validation" / f"{name}.jpg")
        mask(base / "annotations" / "validation" / f"{name}.png", [0, 1, 150])
    source = open_ade20k(tmp_path)
    assert source.names("test") == ("ADE_val_00000001", "ADE_val_00000002")
    no_validation(source)
    np.testing.assert_array_equal(np.unique(source.mask("test", "ADE_val_00000001")), [0, 1, 150])
    assert source.other_label == IGNORE
    with pytest.raises(AbsentSplitError, match="training"):
        source.names("train")


def test_ade20k_table() -> None:
    space = ade20k_space()
    assert space.ids == tuple(range(1, 151))
    assert (space.name(0), space.name(1), space.name(13), space.name(150)) == ("other", "wall", "person", "flag")
    assert sum(c.kind == "stuff" for c in space.classes) == 50


def test_cityscapes_maps_raw_labels(tmp_path: Path) -> None:
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        image(tmp_path / "leftImg8bit" / split / city / f"{city}_000000_000019_leftImg8bit.png")
        stem = tmp_path / "gtFine" / split / city / f"{city}_000000_000019_gtFine"
        mask(Path(f"{stem}_labelIds.png"), [7, 8, 11, 33, 31, 28, 0, 6, 29, 255, 24])
        mask(Path(f"{stem}_instanceIds.png"), [1])
    source = open_cityscapes(tmp_path)
    assert source.names("train") == ("aachen_000000_000019", "bochum_000000_000019")
    assert source.names("test") == ("lindau_000000_000019",)
    no_validation(source)
    found = source.mask("test", "lindau_000000_000019").ravel()[:11]
    np.testing.assert_array_equal(found, [1, 2, 3, 19, 17, 16, 0, 0, 0, 0, 12])
    assert (source.space.name(12), source.space.name(19), len(source.space)) == ("person", "bicycle", 19)


@pytest.mark.parametrize("prefixed", [False, True])
def test_camvid_in_both_layouts(tmp_path: Path, prefixed: bool) -> None:
    source = open_camvid(camvid(tmp_path, prefixed))
    for split in ("train", "val", "test"):
        assert source.names(split) == (f"{split}1",)
        np.testing.assert_array_equal(source.mask(split, f"{split}1").ravel()[:5], [1, 11, IGNORE, IGNORE, 4])
        assert source.image(split, f"{split}1").shape == (3, 4, 6)
    assert source.space.background is None
    assert (source.space.name(1), source.space.name(11)) == ("sky", "bicyclist")


def test_folders_with_lists(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "train.txt").write_text("s3\ns0.jpg\n\n")
    (root / "test.txt").write_text("s1\n")
    source = open_folders(root, patients=True)
    assert source.names("train") == ("s3", "s0")  # the list's order; a suffix in the list does no harm
    assert source.names("test") == ("s1",)
    no_validation(source)
    (root / "val.txt").write_text("s2\n")
    assert (open_folders(root).names("val"), open_folders(root).names("test")) == (("s2",), ("s1",))
    assert source.patients
    assert source.space.name(1) == "cell wall"


def test_folders_with_split_folders_and_holdout(tmp_path: Path) -> None:
    root = folder(tmp_path / "pool")
    held = open_folders(root, holdout=3)
    assert held.names("test") == ("s0", "s3")
    assert held.names("train") == ("s1", "s2", "s4", "s5")
    no_validation(held)
    split = tmp_path / "split"
    for part in ("train", "val"):
        image(split / part / "images" / "x.png")
        mask(split / part / "masks" / "x.png", [2])
    (split / "classes.json").write_text(json.dumps({"1": "cat", "2": "dog"}))
    source = open_folders(split)
    assert source.names("train") == source.names("test") == ("x",)
    assert source.pairs("test")["x"].mask == split / "val" / "masks" / "x.png"
    no_validation(source)


def test_folders_with_other_values_in_the_masks(tmp_path: Path) -> None:
    root = folder(tmp_path)
    mask(root / "masks" / "s0.png", [0, 128, 255])
    source = open_folders(root, values={128: 1, 255: 2}, holdout=2, every_pixel=True)
    np.testing.assert_array_equal(source.mask("test", "s0").ravel()[:3], [0, 1, 2])
    assert source.space.background is None


@pytest.mark.parametrize(
    ("name", "text", "ids", "names"),
    [
        ("c.txt", "# mine\n3 a b\n1\tc\n", (3, 1), ("a b", "c")),
        ("c.txt", "background\ncat\n", (1,), ("cat",)),
        ("c.txt", "cat\ndog\n", (1, 2), ("cat", "dog")),
        ("c.json", '{"cat": 4, "background": 0}', (4,), ("cat",)),
        ("c.json", '["_background_", "cat"]', (1,), ("cat",)),
        ("c.json", '[{"id": 9, "name": "liver", "kind": "organ", "color": [1, 2, 3]}]', (9,), ("liver",)),
    ],
)
def test_class_files(tmp_path: Path, name: str, text: str, ids: tuple[int, ...], names: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(text)
    space = read_class_file(tmp_path / name)
    assert space.ids == ids
    assert tuple(c.name for c in space.classes) == names
    if "liver" in names:
        assert (space[9].kind, space[9].color) == ("organ", (1, 2, 3))


def test_fingerprint_follows_masks_names_and_order(tmp_path: Path) -> None:
    voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    before = open_voc(tmp_path).fingerprint("train")
    assert before == open_voc(tmp_path).fingerprint("train")
    assert before != open_voc(tmp_path).fingerprint("test")
    (lists / "train.txt").write_text("b\na\n")
    swapped = open_voc(tmp_path).fingerprint("train")
    mask(tmp_path / "SegmentationClass" / "a.png", [3])
    assert len({before, swapped, open_voc(tmp_path).fingerprint("train")}) == 3


def test_presence_and_pickling(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(open_voc(voc(tmp_path))))
    found = label_presence(source, "train")
    assert (found.shape, found.dtype) == ((2, TABLE_SIZE), np.bool_)
    assert [np.flatnonzero(row).tolist() for row in found] == [[0, 1], [20, IGNORE]]
    assert set(source.distinct_labels("train", "b").tolist()) == {20, IGNORE}


def test_catalog_opens_what_it_lists(tmp_path: Path) -> None:
    assert set(DATASETS) == {
        "voc",
        "ade20k",
        "cityscapes",
        "camvid",
        "folders",
        "digits",
        "single_digits",
        "phantoms",
        "medmnist",
        "class_folders",
        "nnunet",
        "decathlon",
        "nifti_folders",
        "h5_volumes",
        "mnms",
        "fundus_sites",
        "prostate_sites",
    }
    assert open_source("camvid", camvid(tmp_path / "c", False)).name == "camvid"
    source = open_source(
        "folders", folder(tmp_path / "f"), {"holdout": 2, "classes": str(tmp_path / "f" / "classes.txt")}
    )
    assert len(source.names("train")) == 3
    assert len(open_source("digits", None, {"per_scene": [1, 2], "train": 3}).names("train")) == 3


def test_sixteen_bit_masks_and_a_class_255(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "classes.txt").write_text("1 cat\n255 dog\n300 hen\n4094 ox\n")
    stored = np.tile(np.asarray([0, 1, 255, 300, 4094], np.uint16), (8, 1))
    Image.fromarray(stored).save(root / "masks" / "s0.png")
    np.testing.assert_array_equal(open_folders(root, holdout=2).mask("test", "s0"), stored)  # 255 is no ignore here
    source = open_folders(root, values={1: 1, 255: "ignore", 300: 255, 4094: 300, 65535: 4094}, holdout=2)
    stored[:, 0] = 65535
    Image.fromarray(stored).save(root / "masks" / "s0.png")
    assert source.mask("test", "s0")[0].tolist() == [4094, 1, IGNORE, 255, 300]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (7, 9), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_distinct_values_of_runs_are_all_values(shape: tuple[int, ...], dtype: type) -> None:
    for seed in range(5):
        values = np.random.default_rng(seed).integers(0, 4, shape).astype(dtype)
        found = distinct(values)
        assert (found.dtype, set(found.tolist())) == (dtype, set(np.unique(values).tolist()))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_are_found_without_decoding_every_pixel(tmp_path: Path, dtype: type) -> None:
    root = folder(tmp_path)
    pixels = np.asarray([[0, 1, 1, 2, 255, 0]] * 4, dtype)
    Image.fromarray(pixels).save(root / "masks" / "s0.png")
    source = open_folders(root, holdout=2)
    assert set(source.distinct_labels("test", "s0").tolist()) == {0, 1, 2, IGNORE}
    assert set(source.distinct_labels("test", "s0").tolist()) == set(source.mask("test", "s0").ravel().tolist())
    pixels[2, 3] = 7
    Image.fromarray(pixels).save(root / "masks" / "s0.png")
    for read in (source.distinct_labels, source.mask):
        with pytest.raises(DataError, match=r"label 7 \(row 2, column 3; 1 pixels"):
            read("test", "s0")


def test_masks_of_every_width_and_byte_order_are_read_alike(tmp_path: Path) -> None:
    values = np.asarray([[0, 255, 256, 65535]], np.uint16)
    for dtype in (">u2", "<u2", "<i4"):
        Image.fromarray(values.astype(dtype)).save(tmp_path / "m.tif")
        found = read_index_mask(tmp_path / "m.tif")
        assert (found.dtype, found.tolist()) == (np.dtype(np.uint16), values.tolist())
    Image.fromarray(np.asarray([[0, 65536]], np.int32)).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match="holds label 65536; labels run from 0 to 65535"):
        read_index_mask(tmp_path / "m.tif")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match="an image of fractions"):
        read_index_mask(tmp_path / "m.tif")
