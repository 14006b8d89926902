"""Slices of volumes and single images for 2D networks, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.data.case import Case
from perdure.data.volumes.options import VolumeOptions
from perdure.data.volumes.plan import plan_slices
from perdure.data.volumes.slices import Slices2D
from perdure.errors import DataError
from perdure.inference.case import predict_cases
from perdure.methods.prediction import Prediction

from .conftest import Volumes, ellipsoid

Maker = Callable[..., Volumes]


def exact(case: Case) -> Case:
    """A case whose intensities are its labels."""
    return replace(case, image=case.label.float()[None])


def by_value(plan: Slices2D) -> Callable[[Tensor], Prediction]:
    """The label that an intensity stands for, on slices and images alone: intensities are 0, 1/2 and 1 once cut."""

    def predict(images: Tensor) -> Prediction:
        assert images.ndim == 4 and images.shape[2:] == (plan.size, plan.size)
        value = images[:, 0] * plan.std[0] + plan.mean[0]
        return Prediction.dense(torch.stack([-(value - at).abs() for at in (0.0, 0.5, 1.0)], 1), [0, 1, 2])

    return predict


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [40, 96])
def test_labels_come_back_to_the_raw_grid(axis: int, size: int, phantoms: Maker) -> None:
    case = exact(ellipsoid(2, (20, 44, 36)))
    plan = plan_slices(Volumes([case]), VolumeOptions(view="slices", axis=axis, size=size, intensity=(0, 100)))
    ready = plan.test(case)
    assert ready.image.shape == (1, case.label.shape[axis], size, size) and ready.grid is not None
    found = predict_cases(by_value(plan), ready.image[None], plan, ready.grid).labels[0]
    assert found.shape == case.label.shape
    ours, true = found > 0, case.label > 0  # between 0 and 2 scaled intensities pass 1
    assert 2 * (ours & true).sum() / (ours.sum() + true.sum()) > 0.95


def test_nothing_is_lost_where_slices_fit() -> None:
    case = exact(ellipsoid(2, (12, 32, 24)))
    plan = plan_slices(Volumes([case]), VolumeOptions(size=32, intensity=(0, 100)))
    ready = plan.test(case)
    assert ready.grid is not None
    assert torch.equal(predict_cases(by_value(plan), ready.image[None], plan, ready.grid).labels[0].long(), ready.label)
    # 24 of 32 columns are the image, the others black
    assert (ready.image[..., :4] == plan.black).all() and (ready.image[..., -4:] == plan.black).all()
    centre_blend = plan.model_copy(update={"window": 20, "blend": "centre"})
    windows = predict_cases(windowed(plan), ready.image[None], centre_blend, ready.grid).labels[0]
    assert torch.equal(windows.long(), ready.label)


def windowed(plan: Slices2D) -> Callable[[Tensor], Prediction]:
    def predict(images: Tensor) -> Prediction:
        value = images[:, 0] * plan.std[0] + plan.mean[0]
        return Prediction.dense(torch.stack([-(value - at).abs() for at in (0.0, 0.5, 1.0)], 1), [0, 1, 2])

    return predict


def test_a_single_image_is_one_slice() -> None:
    case = exact(ellipsoid(1, (40, 28), (0.5, 0.5)))
    plan = plan_slices(Volumes([case], dims=2), VolumeOptions(size=40, intensity=(0, 100), augment="none"))
    ready = plan.test(case)
    assert ready.image.shape == (1, 40, 40) and ready.grid is not None and ready.grid.size == (40, 28)
    found = predict_cases(by_value(plan), ready.image[None], plan, ready.grid).labels[0]
    assert torch.equal(found.long(), ready.label) and ready.geometry.spacing == (0.5, 0.5)
    sample = plan.train(case)
    assert sample.image.shape == (1, 40, 40) and torch.equal(sample.label[:, 6:34], case.label.long())


def test_intensities_of_a_volume_are_cut_at_its_own_percentiles() -> None:
    case = ellipsoid(4)
    plan = plan_slices(Volumes([case]), VolumeOptions(size=26, intensity=(5, 95)))
    image = plan.show(case).image[..., :, 2:-2] * 0.25 + 0.5
    assert image.min() == 0 and image.max() == 1
    assert 0.04 < (image == 0).float().mean() < 0.06 and 0.04 < (image == 1).float().mean() < 0.06
    brighter = plan.show(replace(case, image=case.image * 7 - 300)).image
    assert torch.allclose(brighter, plan.show(case).image, atol=1e-4)
    flat = plan.show(replace(case, image=torch.full_like(case.image, 3.0))).image
    assert torch.isfinite(flat).all()


def test_one_channel_is_repeated_for_networks_of_photographs() -> None:
    case = ellipsoid(4)
    plan = plan_slices(Volumes([case]), VolumeOptions(size=26), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    image = plan.show(case).image
    assert plan.channels == 3 and image.shape == (3, 18, 26, 26)
    raw = image[:, :, :, 2:-2] * torch.tensor(plan.std).view(3, 1, 1, 1) + torch.tensor(plan.mean).view(3, 1, 1, 1)
    assert torch.allclose(raw[0], raw[1], atol=1e-5) and torch.allclose(raw[0], raw[2], atol=1e-5)


def test_places_are_slices_that_show_a_label() -> None:
    case = ellipsoid(0, (10, 20, 20))
    label = torch.zeros_like(case.label)
    label[3:5, 8:12, 8:12], label[7, 4:16, 4:16] = 1, 2
    plan = plan_slices(Volumes([case]), VolumeOptions(size=20, foreground=1.0, augment="none"))
    ready = plan.ready(replace(case, label=label))
    assert {key: at[:, 0].tolist() for key, at in ready.places.items()} == {1: [3, 4], 2: [7]}
    drawn = [int(plan.cut(ready, seed)[1].max()) for seed in range(40)]
    assert 10 < drawn.count(1) < 30 and drawn.count(1) + drawn.count(2) == 40
    anywhere = plan.model_copy(update={"foreground": 0.0})
    empty = sum(not plan_cut.any() for plan_cut in (anywhere.cut(ready, seed)[1] for seed in range(60)))
    assert 30 < empty < 55  # 7 of 10 slices show no label


@pytest.mark.parametrize(
    ("case", "means", "words"),
    [
        (ellipsoid(0, channels=2), (0.5,) * 3, "has 2 channels, and the network takes 3"),
        (ellipsoid(0), (0.5, 0.5), ""),
    ],
)
def test_channels_that_do_not_fit_are_told(case: Case, means: tuple[float, ...], words: str) -> None:
    make: Any = lambda: plan_slices(Volumes([case]), VolumeOptions(), means, (0.25,) * len(means))  # noqa: E731
    if not words:
        assert make().channels == len(means)
        return
    with pytest.raises(DataError, match=words):
        make()


def test_a_slice_is_scaled_in_proportion() -> None:
    case = exact(ellipsoid(5, (4, 60, 30)))
    plan = plan_slices(Volumes([case]), VolumeOptions(size=20, intensity=(0, 100)))
    ready = plan.ready(case)
    assert (np.asarray(ready.label)[:, :, :5] == -1).all() and (np.asarray(ready.label)[:, :, 15:] == -1).all()
    assert (np.asarray(ready.label)[:, :, 5:15] >= 0).all()
