"""Bad data: each case is a plain error that names the file and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.data.source import Source
from perdure.errors import DataError, UsageError

NAMES = ("a", "b", "c")


def sound(root: Path) -> None:
    """A folder data set without a fault: three images of 8×6, classes 1 and 2, lists."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for k, name in enumerate(NAMES):
        Image.effect_noise((8, 6), 90).convert("RGB").save(root / "images" / f"{name}.jpg")
        label(root, name, [[0, 1, 2, 255][k : k + 2]])
    (root / "classes.txt").write_text("1 cat\n2 dog\n")
    (root / "train.txt").write_text("a\nb\n")
    (root / "test.txt").write_text("c\n")


def label(root: Path, name: str, values: list[list[int]]) -> None:
    tile = np.tile(np.asarray(values, np.uint8), (6, 4))
    Image.fromarray(tile).save(root / "masks" / f"{name}.png")


def cut(path: Path, keep: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 6
    content[middle] ^= 0xFF
    path.write_bytes(bytes(content))


def pool(root: Path) -> None:
    (root / "train.txt").unlink()
    (root / "test.txt").unlink()


def touch_alpha(root: Path) -> None:
    (root / "images" / "a.jpg").unlink()
    Image.new("RGBA", (8, 6), (1, 2, 3, 40)).save(root / "images" / "a.png")


def sixteen_bit(root: Path) -> None:
    (root / "images" / "a.jpg").unlink()
    Image.fromarray(np.full((6, 8), 4000, np.uint16)).save(root / "images" / "a.png")


def wide_mask(path: Path) -> None:
    Image.fromarray(np.full((6, 8), 300, np.uint16)).save(path)


# what is done to a sound folder -> (file or thing named, part of the explanation, word of the remedy)
FILES: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "corrupt mask": (lambda r: flip_bits(r / "masks" / "a.png"), "a.png", "not a readable image", "copy it again"),
    "truncated mask": (lambda r: cut(r / "masks" / "a.png"), "a.png", "not a readable image", "copy it again"),
    "truncated image": (lambda r: cut(r / "images" / "a.jpg"), "a.jpg", "not a readable image", "copy it again"),
    "text as image": (lambda r: (r / "images" / "a.jpg").write_text("hello"), "a.jpg", "not a readable image", "copy"),
    "empty file": (lambda r: (r / "masks" / "b.png").write_bytes(b""), "b.png", "not a readable image", "copy"),
    "size mismatch": (lambda r: Image.new("L", (8, 5)).save(r / "masks" / "a.png"), "'a'", "a.jpg 8×6, mask", "size"),
    "unknown label": (lambda r: label(r, "a", [[0, 7]]), "a.png", "label 7 (row 0, column 1; 24 pixels", "class"),
    "colour mask": (lambda r: Image.new("RGB", (8, 6)).save(r / "masks" / "a.png"), "a.png", "colour image", "palette"),
    "wide mask": (lambda r: wide_mask(r / "masks" / "a.png"), "a.png", "label 300 (row 0, column 0; 48", "class"),
    "transparent image": (touch_alpha, "a.png", "transparent", "alpha"),
    "16-bit image": (sixteen_bit, "a.png", "8 bits", "convert"),
    "image gone": (lambda r: (r / "images" / "b.jpg").unlink(), "train.txt line 2", "missing image", "remove the line"),
    "mask gone": (lambda r: (r / "masks" / "a.png").unlink(), "train.txt line 1", "missing mask", "remove the line"),
    "wrong name": (lambda r: (r / "train.txt").write_text("a\nx\nb\n"), "train.txt line 2", "missing image", "remove"),
    "empty list": (lambda r: (r / "train.txt").write_text("\n \n"), "train.txt", "is empty", "sample name per line"),
    "listed twice": (lambda r: (r / "train.txt").write_text("a\nb\na\n"), "train.txt line 3", "second time", "remove"),
    "binary list": (lambda r: (r / "train.txt").write_bytes(b"\xff\xfe\x80"), "train.txt", "cannot be read", "text"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_check_tells_the_fault(tmp_path: Path, case: str) -> None:
    spoil, named, what, remedy = FILES[case]
    sound(tmp_path)
    spoil(tmp_path)
    found = inspect(open_source("folders", tmp_path), ("train", "test"), threads=2)
    assert not found.ok
    assert len(found.problems) == 1, found.problems
    problem = found.problems[0]
    assert problem.split == "train"
    assert named in problem.what
    assert what in problem.what
    assert remedy in problem.hint
    assert found.splits["test"].readable == 1  # the rest is read all the same


def test_a_sound_folder_is_sound(tmp_path: Path) -> None:
    sound(tmp_path)
    assert inspect(open_source("folders", tmp_path), ("train", "test")).ok


def test_two_images_of_one_name(tmp_path: Path) -> None:
    sound(tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match=r"holds both a\.jpg and a\.png"):
        open_source("folders", tmp_path).names("train")


def test_unlisted_files_must_match(tmp_path: Path) -> None:
    sound(tmp_path)
    pool(tmp_path)
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(DataError, match=r"image without mask: .*b\.jpg"):
        open_source("folders", tmp_path, {"holdout": 2}).names("train")
    label(tmp_path, "b", [[1]])
    label(tmp_path, "z", [[1]])
    with pytest.raises(DataError, match=r"mask without image: .*z\.png"):
        open_source("folders", tmp_path, {"holdout": 2}).names("train")


def test_a_folder_without_splits_is_not_split_by_guess(tmp_path: Path) -> None:
    sound(tmp_path)
    pool(tmp_path)
    with pytest.raises(DataError) as failure:
        open_source("folders", tmp_path).names("train")
    assert "holdout=5" in failure.value.hint


CLASS_FILES = {
    "": "is empty",
    "1 cat\n1 dog\n": "gives id 1 twice: 'cat' and 'dog'",
    "1 cat\n2 cat\n": "gives the name 'cat' twice",
    "cat\ncat\n": "gives the name 'cat' twice",
    "1 cat\ndog\n": "line 2 has no class number",
    "4095 cat\n": "id 4095 of 'cat' is out of range",
    "0 nothing\n": "lists no class",
}


@pytest.mark.parametrize("text", CLASS_FILES)
def test_bad_class_files(tmp_path: Path, text: str) -> None:
    sound(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError) as failure:
        open_source("folders", tmp_path)
    assert "classes.txt" in failure.value.what
    assert CLASS_FILES[text] in failure.value.what
    assert failure.value.hint


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"1": "cat", "1": "dog"}', "key '1' twice"),
        ("{", "not valid JSON"),
        ("3", "not a class list"),
        ('[{"id": 1, "nme": "cat"}]', "unknown key 'nme'"),
        ('[{"id": "1", "name": "cat"}]', "integer 'id'"),
        ('[{"id": 1, "name": "cat", "kind": "beast"}]', "unknown kind 'beast'"),
        ('[{"id": 1, "name": "cat", "color": [1, 2]}]', "colour of class 'cat'"),
    ],
)
def test_bad_json_class_files(tmp_path: Path, text: str, what: str) -> None:
    sound(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DataError) as failure:
        open_source("folders", tmp_path)
    assert what in failure.value.what


def test_class_file_missing_or_doubled(tmp_path: Path) -> None:
    sound(tmp_path)
    (tmp_path / "classes.json").write_text('["cat"]')
    with pytest.raises(DataError, match="two class files"):
        open_source("folders", tmp_path)
    (tmp_path / "classes.json").unlink()
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match="has no class file"):
        open_source("folders", tmp_path)


@pytest.mark.parametrize("name", ["voc", "ade20k", "cityscapes", "camvid", "folders"])
def test_wrong_root_says_what_was_expected(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as failure:
        open_source(name, tmp_path)
    assert str(tmp_path) in failure.value.what
    assert "expected" in failure.value.hint
    with pytest.raises(DataError, match="does not exist"):
        open_source(name, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        open_source(name, tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "root", "options", "what", "hint"),
    [
        ("camvit", None, {}, "unknown data set 'camvit'", "'camvid'"),
        ("camvid", None, {}, "needs a folder", "annot"),
        ("digits", ".", {}, "reads no folder", "leave"),
        ("digits", None, {"sise": 32}, "no option 'sise'", "'size'"),
        ("digits", None, {"size": "big"}, "option 'size'", ""),
        ("digits", None, {"size": 8}, "size is 8", "32"),
        ("digits", None, {"per_scene": [4, 2]}, "per_scene", "fewest"),
        ("digits", None, {"train": -1}, "train is -1", "scenes"),
    ],
)  # fmt: skip
def test_wrong_requests(name: str, root: str | None, options: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(UsageError) as failure:
        open_source(name, Path(root) if root else None, options)
    assert what in failure.value.what
    assert hint in failure.value.hint


def test_wrong_options_of_folders(tmp_path: Path) -> None:
    sound(tmp_path)
    for options, what in (
        ({"holdout": 1}, "holdout is 1"),
        ({"values": {65536: 1}}, "65536 cannot occur"),
        ({"values": {3: 9}}, "means class 9"),
    ):
        with pytest.raises(UsageError, match=what):
            open_source("folders", tmp_path, options)
    with pytest.raises(UsageError, match="means class 255") as failure:
        open_source("folders", tmp_path, {"values": {128: 255}})
    assert "128: ignore" in failure.value.hint


def test_ade20k_with_other_classes_is_refused(tmp_path: Path) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\tcar, auto\n")
    with pytest.raises(DataError, match="names class 1 'car', ADE20K names it 'wall'"):
        open_source("ade20k", tmp_path)


def test_an_unknown_sample_is_named(tmp_path: Path) -> None:
    sound(tmp_path)
    for source in (open_source("folders", tmp_path), open_source("digits", None)):
        with pytest.raises(DataError, match="no sample 'zz'"):
            source.mask("train", "zz")


class Broken(Source):
    """A source whose samples all fail, to see that problems are counted and told up to the limit."""

    def __init__(self, inner: Source) -> None:
        self.name, self.kind, self.space, self.patients, self.other_label = "broken", inner.kind, inner.space, False, 0

    def names(self, split: str) -> tuple[str, ...]:
        return tuple(str(k) for k in range(30))

    def image(self, split: str, name: str) -> Any:
        raise DataError(f"bad {name}", "hint")

    mask = image

    def fingerprint(self, split: str) -> str:
        return ""


def test_problems_are_counted_beyond_the_limit() -> None:
    ticks: list[int] = []
    found = inspect(
        Broken(open_source("digits", None)), ("train",), limit=4, threads=2, advance=lambda: ticks.append(1)
    )
    assert [p.name for p in found.problems] == ["0", "1", "2", "3"]
    assert found.hidden == 26
    assert len(ticks) == 30
    assert found.splits["train"].readable == 0
