"""The reader of MedMNIST's files: layout, checks, download on demand, and every way of being bad."""

from __future__ import annotations

import hashlib
import io
import logging
import multiprocessing
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.data.readers import medmnist, medmnist_official
from perdure.data.readers.medmnist import NpzImages, open_medmnist
from perdure.data.readers.medmnist_official import official_sets
from perdure.data.source import AbsentSplitError, Source
from perdure.errors import DataError, PerdureError, UsageError
from perdure.labels import IGNORE
from perdure.streams.lists import label_presence


def arrays(counts: tuple[int, ...] = (6, 3, 4), shape: tuple[int, ...] = (5, 4), classes: int = 2) -> dict:
    """Arrays of a small set; the first pixel of an image is its place."""
    made: dict[str, np.ndarray] = {}
    for split, count in zip(("train", "val", "test"), counts, strict=False):
        images = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count).reshape(-1, *[1] * (images.ndim - 3))
        made |= {f"{split}_images": images, f"{split}_labels": np.arange(count, dtype=np.uint8)[:, None] % classes}
    return made


def write(folder: Path, name: str = "own.npz", packed: bool = True, **content: np.ndarray) -> Path:
    (np.savez_compressed if packed else np.savez)(folder / name, **content)
    return folder


def test_the_table_holds_the_twelve_sets() -> None:
    sets = official_sets()
    assert len(sets) == 12
    assert [flag for flag, s in sets.items() if s.multilabel] == ["chestmnist"]
    assert [s.licence for flag, s in sets.items() if s.licence != "CC BY 4.0"] == ["CC BY-NC 4.0"]
    digests = [d for s in sets.values() for d in s.md5.values()]
    assert len(set(digests)) == 48 and {len(d) for d in digests} == {32}
    assert all(list(s.md5) == ["28", "64", "128", "224"] and s.channels in (1, 3) for s in sets.values())
    assert sets["bloodmnist"].counts == {"train": 11959, "val": 1712, "test": 3421}  # table of the paper's tasks
    assert sets["organamnist"].counts["train"] == 34561 and sets["tissuemnist"].counts["train"] == 165466
    classes = {"bloodmnist": 8, "pathmnist": 9, "organamnist": 11, "tissuemnist": 8, "pneumoniamnist": 2}
    assert {flag: len(sets[flag].classes) for flag in classes} == classes
    assert all(len(set(s.classes)) == len(s.classes) for s in sets.values())


def test_the_table_agrees_with_the_authors_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the package makes a folder there when it is imported
    info = pytest.importorskip("medmnist").INFO
    for flag, facts in official_sets().items():
        theirs = info[flag]
        assert facts.counts == theirs["n_samples"] and facts.channels == theirs["n_channels"]
        assert facts.licence == theirs["license"] and len(facts.classes) == len(theirs["label"])
        assert list(facts.md5.values()) == [theirs[k] for k in ("MD5", "MD5_64", "MD5_128", "MD5_224")]
        same = [name == theirs["label"][str(k)] for k, name in enumerate(facts.classes)]
        assert sum(same) >= {"retinamnist": 0}.get(flag, len(same) - 1)


@pytest.mark.parametrize("packed", [True, False])
def test_grey_images_in_place_with_their_classes(tmp_path: Path, packed: bool) -> None:
    content = arrays()
    source = open_medmnist(write(tmp_path, packed=packed, **content), file="own.npz", classes=["cell", "clot"])
    assert isinstance(source, Source)
    assert (source.name, source.kind, source.patients, source.other_label) == ("own", "classification", True, 0)
    assert [(c.id, c.name) for c in source.space.classes] == [(1, "cell"), (2, "clot")]
    assert source.space.background is None
    assert source.names("val") == ("00000", "00001", "00002")
    for split in ("train", "val", "test"):
        for row, name in enumerate(source.names(split)):
            image, label = source.image(split, name), source.mask(split, name)
            np.testing.assert_array_equal(image, content[f"{split}_images"][row][None])
            assert (label.shape, label.dtype, int(label)) == ((), np.int16, row % 2 + 1)
    image[:] = 0  # what a reader does with its image must not reach the data
    assert source.image("test", "00003").any()


def test_colour_images_flat_labels_and_no_names(tmp_path: Path) -> None:
    content = arrays(shape=(4, 6, 3), classes=3)
    content["train_labels"] = content["train_labels"][:, 0].astype(np.int64)
    source = open_medmnist(write(tmp_path, **content), file="own.npz", patients=False)
    assert [c.name for c in source.space.classes] == ["class 0", "class 1", "class 2"] and not source.patients
    image = source.image("train", "00005")
    assert image.shape == (3, 4, 6) and image.flags.c_contiguous
    np.testing.assert_array_equal(image, content["train_images"][5].transpose(2, 0, 1))
    last = open_medmnist(write(tmp_path, **arrays(shape=(4, 6, 1))), file="own.npz")
    assert last.image("train", "00000").shape == (1, 4, 6)


def test_long_lists_have_longer_names(tmp_path: Path) -> None:
    source = open_medmnist(write(tmp_path, **arrays((100_001,), (1, 1))), file="own.npz")
    assert source.names("train")[::50_000] == ("000000", "050000", "100000")
    assert int(source.mask("train", "100000")) == 1
    found = label_presence(source, "train")
    assert found.sum() == 100_001 and found[:, 1].sum() == 50_001 and found[:, 2].sum() == 50_000


def test_absent_splits_and_unknown_samples(tmp_path: Path) -> None:
    source = open_medmnist(write(tmp_path, **arrays((3,))), file="own.npz")
    with pytest.raises(AbsentSplitError, match="split 'test' is absent"):
        source.names("test")
    for name in ("00003", "0", "x", "-0001", "000000"):
        with pytest.raises(DataError, match="no sample"):
            source.image("train", name)


def test_fingerprint_changes_with_labels_names_and_images(tmp_path: Path) -> None:
    base = arrays()
    variants = [base, arrays(shape=(4, 5))]
    variants.append(base | {"train_labels": 1 - base["train_labels"]})
    variants.append(base | {"train_images": 255 - base["train_images"]})
    opened = [open_medmnist(write(tmp_path, f"{k}.npz", **v), file=f"{k}.npz") for k, v in enumerate(variants)]
    opened.append(open_medmnist(tmp_path, file="0.npz", classes=["a", "b"]))
    prints = [s.fingerprint("train") for s in opened]
    assert len(set(prints)) == 5
    assert (
        opened[0].fingerprint("train")
        == open_medmnist(tmp_path, file="0.npz").fingerprint("train")
        != (opened[0].fingerprint("val"))
    )


def test_images_are_read_once_a_split_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    inner = medmnist.read_array
    monkeypatch.setattr(medmnist, "read_array", lambda path, key: read.append(key) or inner(path, key))
    source = open_medmnist(write(tmp_path, **arrays()), file="own.npz")
    source.fingerprint("train"), source.names("train"), source.mask("train", "00001"), label_presence(source, "train")
    assert not any(key.endswith("images") for key in read)
    assert inspect(source, threads=4).ok
    assert sorted(key for key in read if key.endswith("images")) == ["test_images", "train_images", "val_images"]
    assert len(pickle.dumps(source)) < 4000
    assert pickle.loads(pickle.dumps(source)).image("train", "00002").shape == (1, 5, 4)


def _first_pixel(source: NpzImages, name: str, box) -> None:
    box.put(int(source.image("train", name)[0, 0, 0]))


def test_forked_processes_read_for_themselves(tmp_path: Path) -> None:
    source = open_medmnist(write(tmp_path, **arrays()), file="own.npz")
    context = multiprocessing.get_context("fork")
    box = context.Queue()
    workers = [context.Process(target=_first_pixel, args=(source, f"0000{k}", box)) for k in range(2)]
    for worker in workers:
        worker.start()
    assert sorted(box.get(timeout=60) for _ in workers) == [0, 1]
    for worker in workers:
        worker.join()


def fake_official(monkeypatch: pytest.MonkeyPatch, folder: Path, **content: np.ndarray) -> bytes:
    """Let ``bloodmnist`` of 28 pixels be a small file; returns its bytes."""
    write(folder, "official.npz", **content)
    data = (folder / "official.npz").read_bytes()
    facts = official_sets()["bloodmnist"]
    counts = {s: len(content[f"{s}_labels"]) for s in ("train", "val", "test")}
    digests = dict(facts.md5) | {"28": hashlib.md5(data).hexdigest()}
    monkeypatch.setitem(official_sets(), "bloodmnist", facts._replace(counts=counts, md5=digests))
    return data


@pytest.fixture
def blood() -> dict[str, np.ndarray]:
    return arrays(shape=(28, 28, 3), classes=8)


def test_the_official_file_is_recognised(tmp_path: Path, monkeypatch, caplog, blood) -> None:
    data = fake_official(monkeypatch, tmp_path, **blood)
    (tmp_path / "bloodmnist.npz").write_bytes(data)
    source = open_medmnist(tmp_path, "bloodmnist", verify="strict")
    assert source.name == "bloodmnist" and source.space.name(8) == "platelet" and not caplog.records
    official_class = open_medmnist(tmp_path, "bloodmnist", file="official.npz", verify="strict").space
    assert official_class == source.space


def test_another_file_is_told_apart_in_plain_words(tmp_path: Path, monkeypatch, caplog, blood) -> None:
    fake_official(monkeypatch, tmp_path, **blood)
    write(tmp_path, "bloodmnist.npz", **{k: v[::-1] for k, v in blood.items()})
    with caplog.at_level(logging.WARNING):
        open_medmnist(tmp_path, "bloodmnist")
    assert "is not the official file (MD5" in caplog.text
    assert "numbers, size and channels of its images are the official ones" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_medmnist(tmp_path, "bloodmnist", verify="off")
    assert not caplog.records
    with pytest.raises(DataError, match="is not the official file"):
        open_medmnist(tmp_path, "bloodmnist", verify="strict")
    write(tmp_path, "bloodmnist.npz", **arrays((5, 3), (27, 28)))
    with pytest.raises(DataError) as error:
        open_medmnist(tmp_path, "bloodmnist", verify="strict")
    assert "train has 5 images, officially 6; test has 0 images, officially 4; " in error.value.what
    assert "images are 27×28 with 1 channels, officially 28×28 with 3" in error.value.what


def fake_package(monkeypatch: pytest.MonkeyPatch, data: bytes | None) -> list[dict]:
    """A package ``medmnist`` that writes these bytes, or fails as the real one does without network."""
    calls: list[dict] = []

    class BloodMNIST:
        def __init__(self, **given) -> None:
            calls.append(given)
            sys.stdout.write("Downloading\n")
            if data is None:
                raise RuntimeError("Automatic download failed!")
            (Path(given["root"]) / "bloodmnist.npz").write_bytes(data)

    package = types.ModuleType("medmnist")
    package.INFO = {"bloodmnist": {"python_class": "BloodMNIST", "url": "https://example.org/bloodmnist.npz"}}
    package.BloodMNIST = BloodMNIST
    monkeypatch.setitem(sys.modules, "medmnist", package)
    return calls


def test_download_only_when_asked_and_only_once(tmp_path: Path, monkeypatch, blood, capsys) -> None:
    (tmp_path / "in").mkdir()
    calls = fake_package(monkeypatch, fake_official(monkeypatch, tmp_path, **blood))
    with pytest.raises(DataError, match=r"bloodmnist\.npz does not exist") as error:
        open_medmnist(tmp_path / "in", "bloodmnist")
    assert "download=true" in error.value.hint and not calls
    for _ in range(2):
        source = open_medmnist(tmp_path / "in", "bloodmnist", download=True, verify="strict")
    assert len(calls) == 1 and calls[0]["size"] == 28 and calls[0]["download"] is True
    assert len(source.names("train")) == 6
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["bloodmnist.npz"]
    assert capsys.readouterr().out == ""  # standard output belongs to the command


def test_failed_downloads(tmp_path: Path, monkeypatch, blood) -> None:
    fake_official(monkeypatch, tmp_path, **blood)
    (tmp_path / "in").mkdir()
    fake_package(monkeypatch, b"half a file")
    with pytest.raises(DataError, match=r"has MD5 \w+, not"):
        open_medmnist(tmp_path / "in", "bloodmnist", download=True)
    fake_package(monkeypatch, None)
    with pytest.raises(DataError, match=r"bloodmnist\.npz could not be fetched") as error:
        open_medmnist(tmp_path / "in", "bloodmnist", download=True)
    assert "https://example.org/bloodmnist.npz" in error.value.hint
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(PerdureError, match="not installed") as missing:
        open_medmnist(tmp_path / "in", "bloodmnist", download=True)
    assert "pip install 'perdure[medmnist]'" in missing.value.hint
    assert not list((tmp_path / "in").iterdir())


def test_the_file_of_a_larger_size_is_looked_for_by_its_name(tmp_path: Path) -> None:
    assert medmnist_official.file_name("bloodmnist", 28) == "bloodmnist.npz"
    with pytest.raises(DataError, match=r"bloodmnist_128\.npz does not exist") as error:
        open_medmnist(write(tmp_path, **arrays()), "bloodmnist", size=128)
    assert "holds own.npz" in error.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "which set is wanted"),
        ({"flag": "bloodmist"}, "unknown flag 'bloodmist'"),
        ({"flag": "nodulemnist3d"}, "unknown flag"),
        ({"flag": "chestmnist"}, "marks any number of its 14 findings"),
        ({"flag": "bloodmnist", "classes": ["a"]}, "classes of 'bloodmnist' are known"),
        ({"flag": "bloodmnist", "file": "own.npz", "download": True}, "exclude each other"),
        ({"file": "own.npz", "download": True}, "download needs a flag"),
        ({"file": "own.npz", "classes": []}, "0 classes"),
        ({"flag": "bloodmnist", "size": 32}, "option 'size'"),
        ({"flag": "bloodmnist", "verify": "maybe"}, "option 'verify'"),
        ({"file": "own.npz", "classes": "ab"}, "option 'classes'"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source("medmnist", write(tmp_path, **arrays()), options)


def variant(**changes: object) -> dict[str, np.ndarray]:
    content = arrays() | changes
    return {k: v for k, v in content.items() if v is not None}


FLOATS = np.full((6, 5, 4), np.nan, np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (variant(train_labels=None), "has no train_labels"),
        (variant(test_images=None), "has no test_images"),
        ({"x": np.zeros(3), "y": np.zeros(3)}, "not in MedMNIST's layout: it holds x, y"),
        (variant(train_images=FLOATS), "train_images in .* has type float32"),
        (variant(val_images=np.zeros((3, 5, 4), np.uint16)), "val_images in .* has type uint16"),
        (variant(train_images=np.zeros((6, 5), np.uint8)), "train_images in .* has shape 6×5"),
        (variant(train_images=np.zeros((6, 5, 5, 5), np.uint8)), "has shape 6×5×5×5"),
        (variant(train_images=np.zeros((0, 5, 5), np.uint8)), "has shape 0×5×5"),
        (variant(train_images=np.array([None] * 6)), "has type object"),
        (variant(train_labels=np.array([None] * 6)), "not a readable .npz file"),
        (variant(train_images=np.zeros((6, 5, 4, 3), np.uint8)), "grey images .* and colour images"),
        (variant(train_labels=np.zeros((6, 14), np.uint8)), "has 14 labels per image"),
        (variant(train_labels=np.zeros((6, 1), np.float32)), "train_labels in .* has type float32"),
        (variant(train_labels=np.zeros((6, 1, 1), np.uint8)), "has type uint8 and shape 6×1×1"),
        (variant(train_labels=np.zeros((5, 1), np.uint8)), "has 6 images but 5 labels in train_labels"),
        (variant(test_labels=np.array([0, 1, 2, 9])), r"test_labels in .* holds 2 \(image 2; 2 labels are outside 0"),
        (variant(val_labels=np.array([0, -1, 1])), r"val_labels in .* holds -1 \(image 1"),
    ],
)
def test_wrong_content(tmp_path: Path, content: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        open_medmnist(write(tmp_path, **content), file="own.npz", classes=["a", "b"])
    assert "\n" not in error.value.what


def test_more_classes_than_labels(tmp_path: Path) -> None:
    content = arrays() | {"train_labels": np.array([0, 1, 2, 3, 4, IGNORE - 1])}
    with pytest.raises(DataError, match="holds 4094"):
        open_medmnist(write(tmp_path, **content), file="own.npz")


def test_damaged_files(tmp_path: Path) -> None:
    whole = (write(tmp_path, **arrays((600, 3, 4), (28, 28))) / "own.npz").read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("weights/data.pkl", b"cnumpy\n")
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    pickled = pickle.dumps({"train_images": [1]})
    for bad in (b"", whole[:1000], whole[:-30], b"\x89PNG" + whole, other.getvalue(), array.getvalue(), pickled):
        (tmp_path / "own.npz").write_bytes(bad if bad[:4] != b"\x89PNG" else bad[:200])
        with pytest.raises(DataError, match=r"own\.npz (is not a readable|holds no NumPy)"):
            open_medmnist(tmp_path, file="own.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match=r"folder\.npz does not exist"):
        open_medmnist(tmp_path, file="folder.npz")


def test_images_damaged_in_the_middle_are_a_plain_error(tmp_path: Path, monkeypatch) -> None:
    tries: list[str] = []
    inner = medmnist.read_array
    monkeypatch.setattr(medmnist, "read_array", lambda path, key: tries.append(key) or inner(path, key))
    content = arrays((600, 3, 4), (28, 28))
    for packed in (True, False):
        whole = bytearray((write(tmp_path, packed=packed, **content) / "own.npz").read_bytes())
        whole[len(whole) // 3 : len(whole) // 3 + 40] = bytes(40)
        (tmp_path / "own.npz").write_bytes(whole)
        source = open_medmnist(tmp_path, file="own.npz")
        with pytest.raises(DataError, match=r"not a readable \.npz file"):
            source.image("train", "00000")
        found = inspect(source, ("train", "val"), limit=2)
        assert not found.ok and found.hidden == 598 and found.splits["val"].readable == 3
    assert tries.count("train_images") == 2  # once a file, not once an image


def test_an_array_that_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    write(tmp_path, **arrays())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**4, 10**4)}
    )
    with zipfile.ZipFile(tmp_path / "own.npz", "w") as archive:
        archive.writestr("train_images.npy", header.getvalue() + b"tiny")
    with pytest.raises(DataError, match=r"array 'train_images\.npy' should have 1\d+ bytes and has 1\d\d"):
        open_medmnist(tmp_path, file="own.npz")


@pytest.mark.real
def test_pneumoniamnist_as_it_lies_here(shared_data: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        source = open_source("medmnist", shared_data / "medmnist", {"flag": "pneumoniamnist"})
    assert "order, packing or pixels differ" in caplog.text  # its training images are in another order
    assert [len(source.names(s)) for s in ("train", "val", "test")] == [4708, 524, 624]
    assert source.image("test", "00623").shape == (1, 28, 28)
    found = inspect(source)
    assert found.ok and found.kind == "classification"
    assert found.splits["train"].images == {1: 1214, 2: 3494}


@pytest.mark.real
def test_mednist(shared_data: Path) -> None:
    names = ["AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"]
    source = open_source("medmnist", shared_data / "medmnist_format", {"file": "mednist6_28.npz", "classes": names})
    assert source.name == "mednist6_28" and [c.name for c in source.space.classes] == names
    found = inspect(source)
    assert found.ok
    assert found.splits["train"].images == dict.fromkeys(range(1, 7), 1067)
    assert {k: len(v) for k, v in found.shared.items()} == {"train, val": 2} and found.splits[
        "train"
    ].repeated == 22  # as its description says


def test_a_file_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, **arrays())
    (tmp_path / "sub").mkdir()
    shutil.move(tmp_path / "own.npz", tmp_path / "sub" / "own.npz")
    assert open_medmnist(tmp_path, file="sub/own.npz").name == "own"
