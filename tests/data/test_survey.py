"""The check of every file before a run: what it finds, what it remembers, what it never writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import open_source
from perdure.data.readers import imagefiles
from perdure.data.readers.pairs import PairSource
from perdure.data.source import AbsentSplitError, Split
from perdure.data.survey import Survey, survey, told
from perdure.data.validation import HeldOut
from perdure.errors import DataError, UsageError
from perdure.files import cache_dir, cache_secret
from perdure.streams.lists import cached_presence

NAMES = tuple("abcdef")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six photographs of 8 x 6 with masks of classes 1 and 2; four are for training."""
    draw = np.random.Generator(np.random.PCG64(0))
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for k, name in enumerate(NAMES):
        Image.fromarray(draw.integers(0, 255, (6, 8, 3), np.uint8)).save(tmp_path / f"data/images/{name}.png")
        Image.fromarray(np.full((6, 8), 1 + k % 2, np.uint8)).save(tmp_path / f"data/masks/{name}.png")
    (tmp_path / "data/classes.txt").write_text("1 cat\n2 dog\n")
    (tmp_path / "data/train.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "data/test.txt").write_text("e\nf\n")
    return tmp_path / "data"


def look(root: Path, name: str = "folders", **options: object) -> tuple[Survey, int]:
    """What is found, and how many samples were read for it."""
    read = [0]

    def begin(total: int) -> Callable[[], None]:
        return lambda: read.__setitem__(0, read[0] + 1)

    return survey(open_source(name, root, options), begin), read[0]


def test_files_are_read_once(root: Path) -> None:
    assert look(root) == (Survey([], {}), 6)
    assert look(root) == (Survey([], {}), 0)
    Image.new("RGB", (8, 6), (1, 2, 3)).save(root / "images" / "e.png")
    assert look(root) == (Survey([], {}), 1)  # the one that changed
    with (root / "masks" / "b.png").open("ab") as stream:
        stream.write(b"\0")
    assert look(root)[1] == 1
    os.utime(root / "images" / "a.png", ns=(1, 1))
    assert look(root)[1] == 1
    assert look(root, validation=2)[1] == 2  # the two that belong to another split now
    assert look(root, values={1: 1, 2: 2})[1] == 6  # numbers in masks mean something else


def test_problems_are_not_remembered(root: Path) -> None:
    content = (root / "images" / "f.png").read_bytes()
    (root / "images" / "f.png").write_bytes(content[:-30])
    for _ in range(2):
        found, read = look(root)
        assert [(p.split, p.name) for p in found.problems] == [("test", "f")]
        assert "f.png is not a readable image" in found.problems[0].what
    assert read == 1
    (root / "images" / "f.png").write_bytes(content)
    assert look(root) == (Survey([], {}), 1)


def test_the_memory_holds_no_pixels_and_no_names(root: Path) -> None:
    look(root)
    files = list((cache_dir() / "sound").iterdir())
    assert len(files) == 2
    assert sorted(path.stat().st_size for path in files) == [16 + 2 * 32, 16 + 4 * 32]
    assert not any(name.encode() + b".png" in path.read_bytes() for path in files for name in NAMES)


def test_a_damaged_memory_is_no_memory(root: Path) -> None:
    look(root)
    for path in (cache_dir() / "sound").iterdir():
        content = bytearray(path.read_bytes())
        content[20] ^= 1
        path.write_bytes(content)
    assert look(root) == (Survey([], {}), 6)


def test_a_cache_that_cannot_be_written_costs_only_time(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "file").write_text("")
    monkeypatch.setenv("PERDURE_CACHE", str(root / "file"))
    assert look(root) == (Survey([], {}), 6)
    assert "checked files are not remembered" in caplog.text


def test_images_in_two_splits_are_found_by_their_pixels(root: Path) -> None:
    with Image.open(root / "images" / "b.png") as picture:
        picture.load()
    (root / "images" / "f.png").unlink()
    picture.save(root / "images" / "f.bmp")  # another name and another format
    picture.resize((9, 7)).save(root / "images" / "e.png")
    Image.new("L", (9, 7), 1).save(root / "masks" / "e.png")
    for _ in range(2):  # read, then remembered
        found = look(root)[0]
        assert found.shared == {"train, test": {"f": "b"}}
        assert told(found.shared) == [
            "1 image of test is also in train, pixel for pixel (f = train b): figures become too good"
        ]


def test_class_folders_and_archives_are_remembered_too(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "own" / split / label).mkdir(parents=True)
            Image.effect_noise((9, 9), 40 + 9 * len(split + label)).save(tmp_path / "own" / split / label / "x.png")
    assert (look(tmp_path / "own", "class_folders")[1], look(tmp_path / "own", "class_folders")[1]) == (4, 0)
    assert look(tmp_path / "own", "class_folders", channels=1)[1] == 4
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 255, (4, 5, 5), np.uint8)
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=[0, 1, 0, 1], test_images=images[:2],
             test_labels=[0, 1])  # fmt: skip
    for read in (6, 0):
        found = look(tmp_path, "medmnist", file="own.npz")
        assert (found[0].shared, found[1]) == ({"train, test": {"00000": "00000", "00001": "00001"}}, read)


def test_every_nth_training_image_is_for_validation(root: Path) -> None:
    plain, source = open_source("folders", root), open_source("folders", root, {"validation": 3})
    assert isinstance(source, HeldOut)
    assert [source.names(split) for split in ("train", "val", "test")] == [("b", "c"), ("a", "d"), ("e", "f")]
    (root / "train.txt").write_text("d\nc\nb\na\n")  # the rule is one of sorted names, whatever the order of the list
    again = open_source("folders", root, {"validation": 3})
    assert [again.names(split) for split in ("train", "val")] == [("c", "b"), ("d", "a")]
    np.testing.assert_array_equal(source.image("val", "a"), plain.image("train", "a"))
    np.testing.assert_array_equal(source.mask("val", "d"), plain.mask("train", "d"))
    assert source.read("val", "d").label.max() == 2
    assert source.read("val", "d").name == "d"
    assert len({source.fingerprint(split) for split in ("train", "val", "test")}) == 3
    assert cached_presence(source, "val").shape[0] == 2
    with pytest.raises(AbsentSplitError):
        plain.names("val")
    (root / "val.txt").write_text("f\n")
    with pytest.raises(UsageError, match="has 1 validation images of its own"):
        open_source("folders", root, {"validation": 3})


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    stored = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    exif = Image.Exif()
    exif[imagefiles.ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "p.png", exif=exif)
    # what the EXIF standard says of each number, as NumPy does it
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    np.testing.assert_array_equal(imagefiles.read_image(tmp_path / "p.png"), upright.transpose(2, 0, 1))


def test_a_photograph_of_a_phone_with_a_second_picture_is_one_photograph(tmp_path: Path) -> None:
    first, second = (Image.effect_noise((8, 8), 30).convert("RGB") for _ in range(2))
    first.save(tmp_path / "p.jpg", "MPO", save_all=True, append_images=[second])
    assert imagefiles.read_image(tmp_path / "p.jpg").shape == (3, 8, 8)
    first.save(tmp_path / "p.webp", save_all=True, append_images=[second])
    with pytest.raises(DataError, match="holds 2 pictures, and one is expected"):
        imagefiles.read_image(tmp_path / "p.webp")


def test_a_file_that_changes_while_it_is_read_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = PairSource.image

    def changing(self: PairSource, split: Split, name: str) -> np.ndarray:
        content = read(self, split, name)
        if name == "a":
            os.utime(root / "images" / "a.png", ns=(1, 1))
        return content

    with monkeypatch.context() as patch:
        patch.setattr(PairSource, "image", changing)
        look(root)
    assert look(root)[1] == 1
    assert look(root)[1] == 0


def test_digests_in_the_cache_are_those_of_this_machine(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[dict[str, bytes]] = []
    for machine in ("one", "two"):
        monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / machine))
        assert look(root)[1] == 6
        assert look(root)[1] == 0  # its own are known again
        cached_presence(open_source("folders", root, {}), "train")
        caches.append({p.name: p.read_bytes() for p in (tmp_path / machine).rglob("*") if p.is_file()})
        secret = tmp_path / machine / "secret"
        assert secret.read_bytes() == cache_secret() and secret.stat().st_mode & 0o777 == 0o600
    one, two = caches
    assert set(one) & set(two) == {"secret"} and one["secret"] != two["secret"]
    images = [np.moveaxis(np.asarray(Image.open(root / f"images/{name}.png")), -1, 0) for name in NAMES]
    for image in images:  # what anybody could compute
        plain = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16)
        plain.update(repr(image.shape).encode())
        assert not any(plain.digest() in content for content in (*one.values(), *two.values()))


def test_a_cache_that_cannot_be_written_still_finds_repeats(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "blocked").write_text("")
    monkeypatch.setenv("PERDURE_CACHE", str(root / "blocked"))
    Image.open(root / "images/a.png").save(root / "images/e.png", compress_level=0)
    assert look(root)[0].shared == {"train, test": {"e": "a"}}
