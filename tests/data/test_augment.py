"""Crops of scaled images and colours as CLIP-CISS has them (specification 1.4), and its scaled evaluation."""

from __future__ import annotations

import colorsys

import pytest
import torch

from perdure.data import augment
from perdure.data.augment import filled, jitter_colors, scaled_crop, shorter_within
from perdure.data.case import Case
from perdure.data.preparation import Photo2D
from perdure.labels import IGNORE

EDGES = (256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024)


def case(height: int, width: int) -> Case:
    """Rows and columns can be told from the pixels; the label is the row."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    return Case(torch.stack([rows, columns, rows]), rows.to(torch.int16), "one")


@pytest.mark.parametrize(
    ("size", "short", "wanted"),
    [((375, 500), 512, (512, 683)), ((500, 375), 256, (341, 256)), ((100, 900), 512, (228, 2048)), ((7, 7), 9, (9, 9))],
)
def test_the_shorter_side_within_the_longest(size, short, wanted):
    assert shorter_within(short, *size) == wanted


def test_a_crop_is_cut_where_it_fits_and_a_small_image_is_kept():
    torch.manual_seed(0)
    one = case(40, 60)
    found = [scaled_crop(one.image, one.label, (32, 32), (40,)) for _ in range(50)]
    assert {tuple(image.shape) for image, _ in found} == {(3, 32, 32)}
    tops, lefts = ({int(image[k].min()) for image, _ in found} for k in (0, 1))
    assert {min(tops), max(tops)} == {0, 8} and min(lefts) < 4 and max(lefts) > 24
    assert all(torch.equal(image[0].long(), label.long()) for image, label in found)
    image, label = scaled_crop(one.image, one.label, (128, 128), (20,))
    assert image.shape[1:] == label.shape == (20, 30)


def test_edges_are_drawn_alike():
    torch.manual_seed(0)
    one = case(40, 40)
    sides = [scaled_crop(one.image, one.label, (64, 64), (16, 24, 32))[1].shape[0] for _ in range(120)]
    assert {side: sides.count(side) > 20 for side in sides} == {16: True, 24: True, 32: True}


@pytest.mark.parametrize(("dtype", "grey"), [(torch.uint8, 128), (torch.float32, 128 / 255)])
def test_what_is_missing_is_filled_with_grey_and_ignored_pixels(dtype, grey):
    image, label = filled(torch.zeros(3, 2, 3, dtype=dtype), torch.zeros(2, 3, dtype=torch.int16), (4, 4))
    assert image.dtype == dtype and not image[:, :2, :3].any() and not label[:2, :3].any()
    assert torch.all(image[:, 2:] == grey) and torch.all(image[:, :, 3] == grey)
    assert torch.all(label[2:] == IGNORE) and torch.all(label[:, 3] == IGNORE)


def test_a_training_sample_is_mirrored_before_it_is_filled():
    photo = Photo2D(patch=(32, 32), short_edges=(16,), flip=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    made = photo.train(case(16, 24))
    assert made.image.shape == (3, 32, 32) and made.label.dtype == torch.int64
    assert torch.all(made.label[:, 24:] == IGNORE) and made.image[1, 0, 0] > made.image[1, 0, 23]
    assert float(made.image[0, 31, 31]) == pytest.approx(128 / 255 * 2 - 1, abs=1e-6)


def test_saturation_is_that_of_hsv():
    torch.manual_seed(0)
    pixels = torch.rand(3, 40)
    for factor in (0.5, 0.9, 1.5):
        found = augment._saturated(pixels, factor)
        for k in range(40):
            h, s, v = colorsys.rgb_to_hsv(*pixels[:, k].tolist())
            assert found[:, k].tolist() == pytest.approx(colorsys.hsv_to_rgb(h, min(1.0, s * factor), v), abs=1e-5)
    assert torch.equal(augment._saturated(torch.full((3, 4), 0.3), 1.4), torch.full((3, 4), 0.3))


def test_colors_are_changed_half_of_the_time_each_and_follow_from_the_seed():
    image = torch.randint(40, 200, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    made = [jitter_colors(image) for _ in range(200)]
    same = sum(torch.equal(one, image) for one in made)
    assert 3 <= same <= 30, "all four are left out one time in sixteen"
    assert all(one.dtype == torch.uint8 for one in made)
    torch.manual_seed(0)
    assert all(torch.equal(jitter_colors(image), one) for one in made[:20])
    grey = jitter_colors(torch.rand(1, 8, 8))
    assert grey.shape == (1, 8, 8) and float(grey.min()) >= 0 and float(grey.max()) <= 1


def test_scaled_evaluation_measures_the_scaled_mask():
    photo = Photo2D(patch=(16, 16), size=32, protocol="scaled")
    ready = photo.test(case(64, 100))
    assert ready.image.shape == (3, 32, 50) and ready.label.shape == (32, 50)
    assert ready.grid is not None and ready.grid.size == (32, 50)
    whole = photo.model_copy(update={"protocol": "whole"}).test(case(64, 100))
    assert whole.label.shape == (64, 100) and whole.grid is not None and whole.grid.size == (64, 100)
