"""Copies among generated images are found, whatever small change was made to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perdure.data.tensors import tensor_view
from perdure.labels import label_space
from perdure.methods.cgr.copies import SAME, RealImages, all_grey, low_pass, variants

ENDS = ((-2.0,), (2.0,))


def blobs(number: int, seed: int) -> Tensor:
    """Images of a few smooth bright spots, from -2 to 2."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images = torch.full((number, 1, 32, 32), -1.5)
    for image in images:
        for _ in range(5):
            top, left, size, bright = (torch.rand(4, generator=draw) * torch.tensor([24, 24, 5, 3.0])).tolist()
            spot = torch.exp(-((y - top - 4).square() + (x - left - 4).square()) / (2 * (size + 2) ** 2))
            image[0] += bright * spot
    return images.clamp(-2, 2)


def corners(images: Tensor) -> Tensor:
    """A stand-in for features: means of the quarters."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) + 3


@pytest.fixture(scope="module")
def real() -> RealImages:
    images = blobs(40, 1)
    samples = tensor_view(images, torch.zeros(40, 32, 32, dtype=torch.int64), label_space(["a"]))
    return RealImages(samples, ENDS, corners)


def test_planted_copies_are_caught(real: RealImages) -> None:
    images = blobs(40, 1)[5:9]
    torch.manual_seed(0)
    planted = {
        "as it is": images,
        "with noise": images + 0.1 * torch.randn_like(images),
        "moved": torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")[..., 1:33, 4:36],
        "mirrored": images.flip(3),
        "mirrored twice": images.flip((2, 3)),
        "rounded": (images * 8).round() / 8,
    }
    for name, copy in planted.items():
        assert real.check(copy).copies.all(), name


def test_shifted_copies_of_small_images_are_caught() -> None:
    """A pixel of 16 is a cell: the strip that a shift brings in must not count."""
    images = blobs(40, 1)[..., 8:24, 8:24]
    real = RealImages(
        tensor_view(images, torch.zeros(40, 16, 16, dtype=torch.int64), label_space(["a"])), ENDS, corners
    )
    wider = blobs(40, 1)
    for down, right in ((1, 0), (0, -1), (1, 1), (2, 0), (-2, 2)):
        moved = wider[5:15, :, 8 + down : 24 + down, 8 + right : 24 + right]
        assert real.check(moved).copies.float().mean() >= 0.9, (down, right)


def test_other_images_are_none(real: RealImages) -> None:
    found = real.check(blobs(30, 2))
    assert found.copies.sum() <= 2
    assert found.distances.shape == (30, 2) and (found.distances >= -1e-6).all()
    assert (real.limits > 0).all()


def volumes(blank: int, twice: bool = False) -> list[tuple[Tensor, str]]:
    """Eight patients of six slices; the first ``blank`` of them begin with empty slices, two may be the same."""
    images = blobs(48, 1).view(8, 6, 1, 32, 32)
    for volume in images[:blank]:
        volume[:2] = -2
    if twice:
        images[1] = images[0]
    return [(volume, f"patient {number}") for number, volume in enumerate(images)]


@pytest.mark.parametrize(("blank", "twice"), [(0, False), (2, False), (8, False), (0, True), (8, True)])
def test_empty_slices_and_a_patient_twice_do_not_switch_the_check_off(
    blank: int, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = volumes(blank, twice)
    monkeypatch.setattr("perdure.methods.cgr.copies.whole_images", lambda samples: iter(samples))
    real = RealImages(cases, ENDS, corners)  # type: ignore[arg-type]
    torch.manual_seed(0)
    copies = torch.stack([images[3] for images, _ in cases])
    assert real.check(copies).copies.all()
    assert real.check(copies + 0.1 * torch.randn_like(copies)).copies.all()
    assert real.check(blobs(30, 2)).copies.sum() <= 6  # by features of four numbers, which say little
    assert float(real.limits[0]) > 0.02 and float(real.limits[1]) > 0


def test_grey_is_told_from_images_as_they_are_shown() -> None:
    grey = blobs(4, 1).expand(-1, 3, -1, -1).clone()
    labels = torch.zeros(4, 32, 32, dtype=torch.int64)
    assert all_grey(tensor_view(grey, labels, label_space(["a"])))
    grey[2, 1] += 0.1
    assert not all_grey(tensor_view(grey, labels, label_space(["a"])))


def test_images_of_one_patient_say_nothing_about_how_alike_patients_are() -> None:
    two = tensor_view(blobs(2, 1), torch.zeros(2, 32, 32, dtype=torch.int64), label_space(["a"]))
    real = RealImages(two, ENDS, corners)
    assert real.limits.tolist() == [pytest.approx(SAME), 0]
    assert real.check(blobs(2, 1)).copies.all()  # but what is the same is a copy
    assert not real.check(blobs(2, 1) + 0.1).copies.any()


def test_low_pass_and_variants() -> None:
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    assert low_pass(images).shape == (2, 256)
    assert low_pass(torch.full((1, 1, 8, 8), 1.0)).tolist() == [[1.0] * 64]
    made, inside = zip(*variants(images), strict=True)
    # two rows of half cells are lost at most, of one of the two cells at the border
    assert all(part.shape == (256,) and 15 * 15 <= int(part.sum()) <= 256 for part in inside)
    assert len(made) == 100 and all(one.shape == images.shape for one in made)
    assert any(torch.equal(one, images) for one in made)
    assert any(torch.equal(one, images.flip((2, 3))) for one in made)
