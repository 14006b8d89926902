from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.data.case import Geometry
from perdure.errors import DataError
from perdure.labels import IGNORE, label_space
from perdure.report import samples
from perdure.report.render import embed
from perdure.report.samples import (
    ERRORS,
    HATCH,
    Classes,
    Sample,
    chosen_samples,
    file_name,
    paint,
    read_samples,
    sample_table,
    to_rgb,
    write_class_samples,
    write_samples,
)
from perdure.report.slices import grey_range, square_pixels
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


def torso(spacing: tuple[float, ...] = (5.0, 2.0, 1.0), placed: bool = True) -> tuple[torch.Tensor, Geometry]:
    """A dark volume ``(1, 9, 4, 6)`` that is bright at the front and the left of the patient."""
    image = torch.full((1, 9, 4, 6), -900.0)
    image[0, :, 3, 0] = 300  # rows run from posterior to anterior, columns from left to right
    affine = tuple(map(float, np.diag([*spacing[::-1], 1.0]).ravel())) if placed else ()
    return image, Geometry(spacing, "mm", affine, ((2, False), (1, False), (0, False)) if placed else ())


def test_volumes_show_the_middle_of_what_is_labelled_and_the_worst_slice(tmp_path: Path) -> None:
    image, geometry = torso()
    truth = np.zeros((9, 4, 6), np.int64)
    truth[1:6, 1, 1] = 1
    prediction = truth.copy()
    prediction[5, 1:] = 2
    paths = write_samples(tmp_path, "ct", image, truth, prediction, PALETTE, geometry=geometry)
    parts = [
        f"ct-{which}.{part}.png" for which in ("mid", "worst-s005") for part in ("image", "truth", "pred", "error")
    ]
    assert [p.name for p in paths] == parts
    # pixels are 2 mm high and 1 mm wide: every row is shown twice
    assert {read(p).shape[:2] for p in paths} == {(8, 6)}
    grey = read(paths[0])[..., 0]
    assert (grey == grey.max()).nonzero()[0].max() < 3, "anterior is up"
    assert int(grey[0].argmax()) == 5, "the patient's left is on the right side"
    shown = read(paths[1])[..., :3] == PALETTE[1]
    assert sorted(set(zip(*shown.all(-1).nonzero(), strict=True))) == [(4, 4), (5, 4)]
    assert not read(paths[3]).any(), "nothing is wrong in the middle"
    assert (read(paths[7])[:6, :, 3] == 255).all(), "all three rows of the worst slice are"


def test_the_worst_slice_is_left_out_where_it_is_the_middle_or_nothing_is_wrong(tmp_path: Path) -> None:
    image, geometry = torso(placed=False)
    truth = np.zeros((9, 4, 6), np.int64)
    truth[4] = 1
    for prediction in (truth, truth * 0):
        paths = write_samples(tmp_path, "ct", image, truth, prediction, PALETTE, geometry=geometry)
        assert {p.name.partition(".")[0] for p in paths} == {"ct-mid"}
    grey = read(paths[0])[..., 0]
    assert int(grey[-1].argmax()) == 0, "of an unknown place as it is stored"
    assert (read(paths[3])[..., :3] == ERRORS[1][1]).all(), "all of it was missed"


def test_classes_that_a_case_does_not_annotate_are_no_false_alarms(tmp_path: Path) -> None:
    truth = np.zeros((4, 4), np.int64)
    truth[0] = 1
    prediction = np.full((4, 4), 2)
    paths = write_samples(tmp_path, "s", torch.zeros(3, 4, 4), truth, prediction, PALETTE, annotated={1})
    wrong, _, _, not_counted = ((*color, 255) for _, color in ERRORS)
    errors = read(paths[3])
    assert {tuple(pixel) for pixel in errors[0].tolist()} == {wrong}
    assert {tuple(pixel) for pixel in errors[1:].reshape(-1, 4).tolist()} == {not_counted, (*HATCH, 255)}
    assert not read(paths[1])[1:].any(), "the truth shows background all the same"


def test_greys_are_those_of_what_is_labelled(tmp_path: Path) -> None:
    values = np.linspace(-1000, 1000, 2001, dtype=np.float32).reshape(1, 3, 667)
    labelled = (values >= 0) & (values <= 100)
    low, high = grey_range(values, labelled)
    assert -55 < low < -45 and 145 < high < 155
    assert grey_range(values, labelled & False) == pytest.approx((-990, 990))


def test_large_slices_are_made_smaller() -> None:
    assert square_pixels((2000, 1000), (3.0, 0.5, 0.5)) == (640, 320)
    assert square_pixels((10, 20), ()) == (10, 20)


def test_a_page_shows_as_many_samples_of_every_test_set() -> None:
    names = [f"{part}-{k:05d}-{which}" for part in ("a-b", "c") for k in range(4) for which in ("mid", "worst-s001")]
    assert chosen_samples(names, 6) == [*names[:3], *names[8:11]]
    assert chosen_samples(["00000", "00001", "00002"], 2) == ["00000", "00001"]


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
