"""Augmentation and evaluation geometry against torchvision, PIL and the numbers of STAR's description."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from perdure.data.case import Case, Grid
from perdure.data.preparation import ClassImage, Photo2D, Preparation, read_preparation
from perdure.data.transforms import fit_square, normalise, resize
from perdure.errors import DataError
from perdure.labels import IGNORE
from perdure.seeds import seeded

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


Both = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def of(show: Callable[[Case], Case]) -> Both:
    """A preparation's way of showing cases, on an image and a label."""

    def both(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        case = show(Case(image, label, "x"))
        return case.image, case.label

    return both


def train_transform(crop: int, area: tuple[float, float] = (0.5, 2.0), flip: float = 0.5, **plain: Any) -> Both:
    return of(Photo2D(patch=(crop, crop), area=area, flip=flip, **plain).train)


def crop_transform(size: int | None, **plain: Any) -> Both:
    return of(Photo2D(patch=(16, 16), size=size, protocol="centre_crop", **plain).test)


def class_image(side: int, mean: Sequence[float], std: Sequence[float], flip: float = 0.0) -> ClassImage:
    return ClassImage(channels=len(mean), patch=(side, side), mean=tuple(mean), std=tuple(std), flip=flip)


def picture(height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    image = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")[0]
    label = torch.randint(0, 21, (height, width), generator=generator, dtype=torch.uint8)
    return (image * 255).to(torch.uint8), label


def test_train_agrees_with_torchvisions_random_resized_crop() -> None:
    image, label = picture(75, 100)
    for seed in range(8):
        with seeded(seed):
            got, _ = train_transform(32, (0.5, 1.0), 0.0, **PLAIN)(image, label)
        with seeded(seed):
            want = v2.RandomResizedCrop(32, (0.5, 1.0), antialias=True)(image)
        torch.testing.assert_close(got * 255, want.float(), atol=0.01, rtol=0)


def test_train_moves_image_and_label_together() -> None:
    rows = torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 96)
    columns = torch.arange(96, dtype=torch.uint8)[None].expand(64, 96)
    image = torch.stack([rows, columns, columns]).contiguous()
    for seed in range(12):
        with seeded(seed):
            got, label = train_transform(48, flip=0.5, **PLAIN)(image, columns.contiguous())
        assert (got.dtype, label.dtype) == (torch.float32, torch.int64)
        assert (got.shape, label.shape) == ((3, 48, 48), (48, 48))
        assert (got[1] * 255 - label).abs()[2:-2, 2:-2].max() <= 2  # columns seen in the image are those of the label


def test_flip_happens_half_of_the_time() -> None:
    image = torch.arange(32, dtype=torch.uint8).expand(3, 32, 32).contiguous()
    transform = train_transform(32, (1.0, 1.0), 0.5, **PLAIN)
    flipped = 0
    for seed in range(300):
        with seeded(seed):
            got, label = transform(image, image[0])
        turned = bool(got[0, 0, 0] > got[0, 0, -1])
        assert turned == bool(label[0, 0] > label[0, -1])
        flipped += turned
    assert 120 < flipped < 180


@pytest.mark.parametrize(("size", "rate"), [((375, 500), 0.14), ((333, 500), 0.28), ((1024, 2048), 0.76)])
def test_share_of_whole_image_fallbacks_is_the_published_one(size: tuple[int, int], rate: float) -> None:
    """A crop is the fallback exactly if it is the largest centred box of allowed aspect."""
    height, width = size
    w = min(width, round(height * 4 / 3))
    label = torch.zeros(height, width, dtype=torch.uint8)
    left = (width - w) // 2
    label[:, left : left + w] = 1  # all ones at the output: the box lies in the central one
    label[0], label[-1] = 2, 3  # and with the first and last row in it, it is as high as the image
    image = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, height, width)
    from torchvision.transforms import RandomResizedCrop

    with seeded(1):
        boxes = [RandomResizedCrop.get_params(image, [0.5, 2.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    fallback = np.mean([box == (0, left, height, w) for box in boxes])
    assert abs(fallback - rate) < 0.03


def test_eval_scales_the_shorter_side_and_takes_the_centre() -> None:
    image, label = picture(80, 120)
    got, mask = crop_transform(40, **PLAIN)(image, label)
    assert got.shape == (3, 40, 40)
    want = F.center_crop(F.resize(image, [40], antialias=True), [40, 40])
    torch.testing.assert_close(got * 255, want.float(), atol=0.01, rtol=0)
    small = np.asarray(Image.fromarray(label.numpy()).resize((60, 40), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(mask.numpy(), small[:, 10:50])  # PIL's nearest, not torch's shifted one


def test_eval_is_close_to_pils_antialiased_bilinear() -> None:
    image, label = picture(150, 200)
    got, _ = crop_transform(64, **PLAIN)(image, label)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((85, 64), Image.Resampling.BILINEAR)
    want = torch.from_numpy(np.asarray(pil).copy()).permute(2, 0, 1)[:, :, 10:74].float()
    assert (got * 255 - want).abs().max() <= 1.01


def test_eval_without_a_size_keeps_the_image() -> None:
    image, label = picture(24, 40)
    got, mask = crop_transform(None)(image, label)
    torch.testing.assert_close(mask, label.long())
    want = F.normalize(image.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(got, want)


def test_void_and_float_images_survive() -> None:
    image, label = picture(40, 40)
    label = torch.full_like(label, IGNORE, dtype=torch.int16)
    with seeded(0):
        got, mask = train_transform(16, **PLAIN)(image.float() / 255, label)
    assert set(mask.unique().tolist()) == {IGNORE}
    assert 0 <= got.min() <= got.max() <= 1


def test_normalise_refuses_other_channel_counts_and_takes_batches() -> None:
    with pytest.raises(DataError, match="1 channels"):
        normalise(torch.zeros(1, 4, 4))
    assert normalise(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).shape == (2, 3, 4, 4)


def test_transforms_can_be_sent_to_workers() -> None:
    image, label = picture(40, 40)
    for preparation in (Photo2D(patch=(16, 16)), Photo2D(patch=(16, 16), size=16, protocol="centre_crop")):
        with seeded(5):
            here = of(preparation.train)(image, label)
        with seeded(5):
            there = of(pickle.loads(pickle.dumps(preparation)).train)(image, label)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.golden
def test_class_transform_of_a_white_medmnist_image() -> None:
    white = torch.full((3, 28, 28), 255, dtype=torch.uint8)
    image, label = of(class_image(32, **PLAIN).test)(white, torch.tensor(7, dtype=torch.uint8))
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert image.sum().item() == 2352 == image[:, 2:30, 2:30].sum().item()
    assert not image[:, 0].any()
    assert (label.shape, label.dtype, label.item()) == ((), torch.int64, 7)


def test_fit_square_pads_as_torchvision_does() -> None:
    image, _ = picture(24, 24)
    pipeline = v2.Compose([v2.Pad(4), v2.CenterCrop(28)])
    torch.testing.assert_close(fit_square(image, 28), pipeline(image), atol=0, rtol=0)
    odd = fit_square(image[:, :21], 24)
    torch.testing.assert_close(odd[:, 1:22], image[:, :21])
    assert not odd[:, :1].any() and not odd[:, 22:].any()
    assert fit_square(image, 24) is image


def test_fit_square_scales_what_does_not_fit_by_its_shorter_side() -> None:
    for height, width in ((48, 64), (64, 48), (16, 64), (32, 40), (64, 64)):
        image, _ = picture(height, width)
        got = fit_square(image, 32)
        scale = 32 / min(height, width)
        scaled = resize(image, int(height * scale), int(width * scale))
        torch.testing.assert_close(got, F.center_crop(scaled, [32, 32]), atol=0, rtol=0)
        assert got.dtype == torch.uint8
    batch = torch.stack([picture(64, 48, seed)[0] for seed in range(2)])
    torch.testing.assert_close(fit_square(batch, 32)[1], fit_square(batch[1], 32), atol=0, rtol=0)


def test_class_transform_normalises_after_padding_and_flips() -> None:
    image = torch.arange(4, dtype=torch.uint8).expand(1, 2, 4).contiguous()
    label = torch.tensor(1, dtype=torch.uint8)
    got, _ = of(class_image(4, (0.5,), (0.25,)).train)(image, label)
    assert got[0, 0].tolist() == [-2.0] * 4  # a border of black, not of the mean
    torch.testing.assert_close(got[0, 1], (torch.arange(4) / 255 - 0.5) / 0.25)
    turned = [of(class_image(4, (0.0,), (1.0,), flip).train)(image, label)[0][0, 1] * 255 for flip in (0.0, 1.0)]
    torch.testing.assert_close(turned[0], torch.arange(4.0))
    torch.testing.assert_close(turned[1], torch.arange(4.0).flip(0))
    with seeded(0):
        flips = sum(bool(of(class_image(4, (0.0,), (1.0,), 0.5).train)(image, label)[0][0, 1, 0]) for _ in range(200))
    assert 70 < flips < 130
    with pytest.raises(DataError, match="1 channels"):
        of(class_image(4, (0.0,) * 3, (1.0,) * 3).train)(image, label)
    assert pickle.loads(pickle.dumps(class_image(4, [0.0], [1.0]))) == class_image(4, (0.0,), (1.0,))


def test_whole_images_keep_their_labels_and_scores_come_back_to_their_size() -> None:
    image, label = picture(80, 120)
    photo = Photo2D(patch=(16, 16), size=40, **PLAIN)
    case = photo.test(Case(image, label, "x"))
    assert case.image.shape == (3, 40, 60) and torch.equal(case.image, photo.normalised(image))
    assert torch.equal(case.label, label.long()) and case.grid == Grid((80, 120))
    scores = torch.linspace(0, 1, 60).expand(1, 2, 40, 60)
    back = photo.restore(scores, Grid(case.size))
    assert back.shape == (1, 2, 80, 120)
    torch.testing.assert_close(back[0, 0, 0, 2:-2], torch.linspace(0, 1, 120)[2:-2], atol=0.01, rtol=0)
    assert photo.restore(torch.zeros(4, 3), Grid(())).shape == (4, 3)


@pytest.mark.parametrize(
    "preparation",
    [Photo2D(patch=(16, 16), size=40, protocol="centre_crop"), class_image(32, (0.5,), (0.5,)), Preparation(dims=3)],
)
def test_a_preparation_survives_as_plain_data(preparation: Preparation) -> None:
    plain = json.loads(json.dumps(preparation.model_dump(mode="json")))
    assert read_preparation(plain, "task") == preparation


@pytest.mark.parametrize("change", [{"kind": "photo3d"}, {"flip": "often"}, {"unknown": 1}, {"mean": [0.5]}])
def test_a_damaged_preparation_is_told(change: dict[str, object]) -> None:
    plain = Photo2D(patch=(16, 16)).model_dump(mode="json") | change
    with pytest.raises(DataError, match=r"stream\.json: the preparation of a task is damaged"):
        read_preparation(plain, "stream.json")
