from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.errors import DataError
from perdure.labels import IGNORE, label_space
from perdure.report import samples
from perdure.report.render import embed
from perdure.report.samples import (
    ERRORS,
    HATCH,
    Classes,
    Sample,
    file_name,
    paint,
    read_samples,
    sample_table,
    to_rgb,
    write_class_samples,
    write_samples,
)
from perdure.streams.description import read_stream

PALETTE = label_space(["a", "b"]).palette()


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_pictures_show_the_image_and_the_colours_of_the_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7), np.uint8)
    image = torch.from_numpy(pixels)
    truth = np.zeros((5, 7), np.int64)
    truth[0], truth[1] = 1, IGNORE
    prediction = np.full((5, 7), 2)
    paths = write_samples(tmp_path, "s", image, truth, prediction, PALETTE)
    assert [p.name for p in paths] == ["s.image.png", "s.truth.png", "s.pred.png", "s.error.png"]
    assert (read(paths[0]) == pixels.transpose(1, 2, 0)).all()
    assert (read(paths[1])[0] == [*PALETTE[1], 255]).all()
    assert (read(paths[1])[1] == [224, 224, 224, 255]).all()
    assert (read(paths[1])[2] == 0).all(), "background is clear"
    assert (read(paths[2]) == [*PALETTE[2], 255]).all()
    wrong, _, false_alarm, not_counted = ((*color, 255) for _, color in ERRORS)
    assert [tuple(row[0]) for row in read(paths[3]).tolist()] == [wrong, not_counted, *3 * [false_alarm]]
    stripes = {tuple(pixel) for pixel in read(paths[3])[1].tolist()}
    assert stripes == {not_counted, (*HATCH, 255)}, "hatched, for one grey could be background"
    first = [p.read_bytes() for p in paths]
    write_samples(tmp_path, "s", image, truth, prediction, PALETTE)
    assert [p.read_bytes() for p in paths] == first
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_volumes_show_their_middle_slice(tmp_path: Path) -> None:
    image = torch.zeros(1, 5, 4, 4)
    image[0, 2] = torch.linspace(-900, 300, 16).reshape(4, 4)
    truth = np.zeros((5, 4, 4), np.int64)
    truth[2] = 1
    paths = write_samples(tmp_path, "ct", image, truth, truth * 0, PALETTE)
    assert (read(paths[1])[..., :3] == PALETTE[1]).all()
    assert (read(paths[3])[..., :3] == ERRORS[1][1]).all(), "all of it was missed"
    grey = read(paths[0])
    assert (grey[..., 0] == grey[..., 1]).all()
    assert grey.min() == 0
    assert grey.max() == 255


def test_constant_and_many_channel_images_do_not_fail() -> None:
    assert to_rgb(np.full((1, 2, 2), 500.0)).shape == (2, 2, 3)
    assert (to_rgb(np.full((5, 2, 2), 0.5)) == 128).all()


def test_names_that_trouble_file_systems_stay_apart(tmp_path: Path) -> None:
    assert file_name("2007_000033") == "2007_000033"
    names = {file_name(n) for n in ("a/b", "a_b", "a b", "a:b", "../a")}
    assert len(names) == 5
    assert not any("/" in n or " " in n for n in names)


def test_reading_lists_complete_samples_only(tmp_path: Path) -> None:
    flat = np.zeros((2, 2), np.int64)
    for name in ("b", "a", "c"):
        write_samples(tmp_path, name, torch.zeros(3, 2, 2), flat, flat, PALETTE)
    (tmp_path / "c.pred.png").unlink()
    assert list(read_samples(tmp_path)) == ["a", "b"]
    assert read_samples(tmp_path / "nowhere") == {}


def test_samples_with_one_class(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 7)).astype(np.float32) / 255
    image = torch.from_numpy(pixels)
    paths = write_class_samples(tmp_path, "a/1", image, 3, 7)
    assert [p.name.split(".", 1)[1] for p in paths] == ["image.png", "class.json"]
    assert np.abs(read(paths[0])[..., 1].astype(int) - np.round(pixels[0] * 255)).max() <= 1
    assert json.loads(paths[1].read_text()) == {"truth": 3, "predicted": 7}
    name = file_name("a/1")
    assert read_samples(tmp_path) == {name: Sample(name, paths[0], classes=Classes(truth=3, predicted=7))}
    first = [p.read_bytes() for p in paths]
    write_class_samples(tmp_path, "a/1", image, 3, 7)
    assert [p.read_bytes() for p in paths] == first
    with pytest.raises(DataError, match="sample 'b'"):
        write_class_samples(tmp_path, "b", image[0], 3, 7)


@pytest.mark.parametrize("text", ["{}", "[]", '{"truth": 1}', '{"truth": 1, "predicted": "x"}', "{"])
def test_damaged_classes_of_a_sample_are_plain_errors(tmp_path: Path, text: str) -> None:
    (_, said) = write_class_samples(tmp_path, "s", torch.zeros(1, 2, 2), 1, 2)
    said.write_text(text)
    with pytest.raises(DataError, match=r"s\.class\.json"):
        read_samples(tmp_path)


def test_shapes_and_labels_that_do_not_fit_are_plain_errors(tmp_path: Path) -> None:
    flat = np.zeros((2, 2), np.int64)
    with pytest.raises(DataError, match="sample 's': image"):
        write_samples(tmp_path, "s", torch.zeros(3, 2, 3), flat, flat, PALETTE)
    with pytest.raises(DataError, match="labels run from 0 to 4095"):
        paint(flat - 1, PALETTE)
    assert not list(tmp_path.iterdir())


def test_pages_embed_exactly_the_bytes_of_a_picture(tmp_path: Path) -> None:
    """Not packed anew and not made smaller: the audit knows pictures by their hash."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 300, 400), np.uint8))
    path = write_class_samples(tmp_path, "s", pixels, 1, 2)[0]
    shown = embed(path)
    kind, _, packed = shown.address.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(packed) == path.read_bytes()
    assert (shown.own_width, shown.own_height) == (400, 300) and shown.width <= 100 and shown.height <= 75


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40), b"cut"])
def test_damaged_pictures_are_plain_errors(content: bytes, tmp_path: Path) -> None:
    (path, *_) = write_class_samples(tmp_path, "s", torch.zeros(1, 20, 20), 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
    with pytest.raises(DataError, match=r"s\.image\.png is no PNG picture"):
        embed(path)


def test_a_page_with_too_many_bytes_of_pictures_shows_fewer_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_run
) -> None:
    flat = np.zeros((8, 8), np.int64)
    for name in "abc":
        write_samples(tmp_path, name, torch.zeros(3, 8, 8), flat, flat, PALETTE)
    found = read_samples(tmp_path)
    stream = read_stream(make_run("../run") / "stream.json")
    shown = sample_table(list(found), [(stream, 3, found)])
    assert [row.name for row in shown.rows] == ["a", "b", "c"]
    one = sum(p.stat().st_size for p in tmp_path.glob("a.*"))
    for most, rows in ((2 * one, 2), (1, 1)):
        monkeypatch.setattr(samples, "MOST_BYTES", most)
        assert len(sample_table(list(found), [(stream, 3, found)]).rows) == rows
