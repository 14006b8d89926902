from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.errors import DataError
from perdure.labels import IGNORE, label_space
from perdure.report.samples import (
    ClassSample,
    file_name,
    paint,
    read_samples,
    to_rgb,
    write_class_samples,
    write_samples,
)

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
    assert [p.name for p in paths] == ["s.image.png", "s.truth.png", "s.pred.png"]
    assert (read(paths[0]) == pixels.transpose(1, 2, 0)).all()
    assert (read(paths[1])[0] == PALETTE[1]).all()
    assert (read(paths[1])[1] == 224).all()
    assert (read(paths[1])[2] == 0).all()
    assert (read(paths[2]) == PALETTE[2]).all()
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
    assert (read(paths[1]) == PALETTE[1]).all()
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
    assert read_samples(tmp_path) == {name: ClassSample(name, paths[0], 3, 7)}
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
