"""The one way from a case to labels: windows, scores in parts, the running maximum, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perdure.data.case import Grid
from perdure.data.preparation import Photo2D, Preparation
from perdure.data.transforms import nearest
from perdure.data.volumes.preprocessing import Volume3D
from perdure.errors import UsageError
from perdure.inference import case
from perdure.inference.case import SLICES, predict_cases, starts
from perdure.methods.prediction import Prediction
from perdure.networks.residual_unet import residual_unet

AS_IS = Preparation()


def windows(side: int, overlap: float, blend: Literal["average", "centre"] = "average") -> Preparation:
    return Preparation(window=side, overlap=overlap, blend=blend)


def dense(score: Callable[[Tensor], Tensor], ids: Sequence[int]) -> Callable[[Tensor], Prediction]:
    """A model that computes all its scores at once."""
    return lambda images: Prediction.dense(score(images), ids)


def pointwise(images: Tensor) -> Tensor:
    """Scores that depend on each pixel alone."""
    return torch.stack([images[:, 0], images[:, 1] * 2, images.sum(1)], 1)


@pytest.mark.golden
@pytest.mark.parametrize(("length", "expected"), [(683, [0, 171]), (853, [0, 341]), (854, [0, 341, 342])])
def test_golden_starts(length: int, expected: list[int]) -> None:
    assert starts(length, 512, 341) == expected


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_cover_the_axis_and_end_at_its_border(size: int, stride: int) -> None:
    for length in range(1, 40):
        first = starts(length, size, stride)
        assert first == sorted(set(first)) and first[0] == 0
        assert first[-1] == max(0, length - size)
        if stride <= size:
            assert {i for at in first for i in range(at, min(at + size, length))} == set(range(length))


@pytest.mark.parametrize("shape", [(7, 9), (16, 16), (33, 17), (5, 40), (12, 11, 10)])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.8])
@pytest.mark.parametrize("at_once", [1, 1 << 20])
@pytest.mark.parametrize("blend", ["average", "centre"])
def test_a_pointwise_scorer_sees_neither_windows_nor_parts(
    shape: tuple[int, ...], overlap: float, at_once: int, blend: Literal["average", "centre"]
) -> None:
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    found = predict_cases(dense(pointwise, (0, 7, 300)), images, windows(8, overlap, blend), Grid(shape), at_once)
    best = pointwise(images).max(1)
    assert torch.equal(found.labels, torch.tensor([0, 7, 300], dtype=torch.int16)[best.indices])
    torch.testing.assert_close(found.confidence, best.values)


def test_overlapping_windows_are_averaged() -> None:
    calls: list[tuple[int, ...]] = []

    def score(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        return torch.full_like(images[:, :1], len(calls))

    found = predict_cases(dense(score, (3,)), torch.zeros(1, 3, 4, 6), windows(4, 0.5), Grid((4, 6)))
    assert calls == [(1, 3, 4, 4)] * 2
    assert found.confidence[0, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


@pytest.mark.parametrize("size", [(6, 5), (11, 17), (3, 2), (1, 9)])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_scores_come_back_to_the_raw_grid_before_the_best_wins(size: tuple[int, int], at_once: int) -> None:
    scores = torch.rand(1, 7, 6, 5, generator=torch.Generator().manual_seed(1))
    found = predict_cases(dense(lambda _: scores, range(7)), torch.zeros(1, 3, 6, 5), AS_IS, Grid(size), at_once)
    whole = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)
    assert torch.equal(found.labels.long(), whole.argmax(1))
    torch.testing.assert_close(found.confidence, whole.amax(1))


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_first_channel_wins_a_tie(at_once: int) -> None:
    flat = dense(lambda images: torch.full((1, 4, 2, 2), 0.5), (9, 1, 2, 3))
    assert predict_cases(flat, torch.zeros(1, 3, 2, 2), AS_IS, Grid((6, 6)), at_once).labels.unique().tolist() == [9]


def test_images_with_one_class_each() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    found = predict_cases(dense(lambda _: scores, (5, 2, 8)), torch.zeros(2, 3, 9, 9), AS_IS, Grid(()))
    assert found.labels.tolist() == [2, 5]
    torch.testing.assert_close(found.confidence, torch.tensor([0.7, 0.5]))


class Counting:
    """A model whose predictions count how often images are encoded and which channels are scored."""

    def __init__(self, groups: tuple[int, ...], held_bytes: int) -> None:
        self.groups, self.held_bytes = groups, held_bytes
        self.encoded = 0
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Prediction:
        self.encoded += 1

        def score(channels: Sequence[int]) -> Tensor:
            self.asked.append(tuple(channels))
            return torch.stack([images[:, 0] * (channel % 3 + 1) for channel in channels], 1)

        return Prediction(tuple(range(sum(self.groups))), score, self.groups, self.held_bytes)


def test_groups_are_not_cut_unless_one_alone_is_too_large() -> None:
    whole = Prediction(tuple(range(9)), lambda _: torch.zeros(1), groups=(2, 2, 5))
    assert whole.chunks(100) == [tuple(range(9))]
    assert whole.chunks(4) == [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    assert whole.chunks(3) == [(0, 1), (2, 3), (4, 5, 6), (7, 8)]
    assert [len(run) for run in whole.chunks(1)] == [1] * 9


@pytest.mark.parametrize(("held_bytes", "encoded"), [(1, 4), (1 << 40, 12)])
def test_windows_are_encoded_once_where_their_features_fit(held_bytes: int, encoded: int) -> None:
    model = Counting((2, 2, 2), held_bytes)
    images = torch.rand(1, 3, 6, 6)
    found = predict_cases(model, images, windows(4, 0.5), Grid((6, 6)), scores_at_once=2 * 36)
    assert model.encoded == encoded, "four windows, three groups"
    assert model.asked == [channels for channels in ((0, 1), (2, 3), (4, 5)) for _ in range(4)]
    assert found.labels.unique().tolist() == [2]


def test_all_scores_in_one_part_encode_each_window_once() -> None:
    model = Counting((2, 2, 2), 1 << 40)
    predict_cases(model, torch.rand(1, 3, 6, 6), windows(4, 0.5), Grid((6, 6)))
    assert model.encoded == 4


def test_each_pixel_comes_from_the_window_in_whose_middle_it_lies_most() -> None:
    """Six columns, windows of four from 0 and 2: they meet between columns 2 and 3."""
    calls: list[int] = []

    def score(images: Tensor) -> Tensor:
        calls.append(len(calls) + 1)
        return torch.full_like(images[:, :1], calls[-1])

    found = predict_cases(dense(score, (3,)), torch.zeros(1, 3, 4, 6), windows(4, 0.5, "centre"), Grid((4, 6)))
    assert found.confidence[0].tolist() == [[1, 1, 1, 2, 2, 2]] * 4


@pytest.mark.parametrize("blend", ["average", "centre"])
def test_windows_may_have_a_side_per_axis(blend: Literal["average", "centre"]) -> None:
    model, images = Counting((3,), 1), torch.rand(1, 3, 4, 9, 6)
    preparation = Preparation(dims=3, window=(4, 5, 3), overlap=0.5, blend=blend)
    found = predict_cases(model, images, preparation, Grid((4, 9, 6)))
    assert model.encoded == 1 * 3 * 3
    torch.testing.assert_close(found.confidence, images[:, 0] * 3)
    with pytest.raises(UsageError, match="a window of 2 axes cannot cut images of 3"):
        predict_cases(model, images, Preparation(dims=3, window=(4, 5)), Grid((4, 9, 6)))


def test_by_centre_every_window_is_encoded_once_however_many_classes() -> None:
    model = Counting((2,) * 20, 1 << 40)
    found = predict_cases(
        model, torch.rand(1, 3, 6, 6), windows(4, 0.5, "centre"), Grid((12, 3)), scores_at_once=2 * 16
    )
    assert model.encoded == 4 and len(model.asked) == 4 * 20
    assert found.labels.shape == found.confidence.shape == (1, 12, 3)


@pytest.mark.parametrize(("held_bytes", "at_a_time"), [(1, 2), (0, 20)])
def test_by_centre_few_classes_at_a_time_where_the_features_are_held(
    monkeypatch: pytest.MonkeyPatch, held_bytes: int, at_a_time: int
) -> None:
    """Without held features each part may run a network again: then as many classes as the general bound allows."""
    monkeypatch.setattr(case, "WINDOW_SCORES", 2 * 16)
    model = Counting((20,), held_bytes)
    predict_cases(model, torch.rand(1, 3, 6, 6), windows(4, 0.5, "centre"), Grid((6, 6)))
    assert model.encoded == 4 and {len(channels) for channels in model.asked} == {at_a_time}


@pytest.mark.parametrize(
    ("held_bytes", "at_once", "at_a_time", "encoded"),
    [(1, 100, 6, 4), (1, 3, 1, 4), (1 << 40, 3, 3, 8)],
    ids=["all scores fit", "features fit", "neither fits"],
)
def test_beside_held_features_lie_fewer_scores(
    monkeypatch: pytest.MonkeyPatch, held_bytes: int, at_once: int, at_a_time: int, encoded: int
) -> None:
    monkeypatch.setattr(case, "HELD_SCORES", 36)
    model, images = Counting((6,), held_bytes), torch.rand(1, 3, 6, 6)
    found = predict_cases(model, images, windows(4, 0.5), Grid((6, 6)), scores_at_once=at_once * 36)
    assert {len(channels) for channels in model.asked} == {at_a_time} and model.encoded == encoded
    whole = predict_cases(Counting((6,), 1), images, windows(4, 0.5), Grid((6, 6)))
    assert torch.equal(found.labels, whole.labels) and torch.equal(found.confidence, whole.confidence)


def test_labels_come_back_to_the_raw_grid_as_nearest_pixels() -> None:
    maps = torch.arange(12).view(1, 3, 4)
    expected = torch.nn.functional.interpolate(maps[None].float(), (7, 9), mode="nearest-exact")[0].long()
    assert torch.equal(nearest(maps, (7, 9)), expected)


@pytest.mark.parametrize("blend", ["average", "centre"])
def test_scores_in_memory_do_not_grow_with_the_classes(blend: Literal["average", "centre"]) -> None:
    """The largest tensor that is made while a case is predicted, by number of classes."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    sizes = []
    for classes in (20, 143):
        with Largest() as seen:
            predict_cases(
                Counting((1,) * classes, 1),
                torch.rand(1, 3, 32, 32),
                windows(16, 0.5, blend),
                Grid((32, 32)),
                4 * 32 * 32,
            )
        sizes.append(seen.numel)
    assert sizes[0] == sizes[1] <= 16 * 16 * 20


def test_a_part_of_a_turned_volume_comes_back_to_its_place() -> None:
    """Raw (z, y, x) = (5, 6, 7); the network sees x first, then z, then y, of rows 1 to 4 and columns 2 to 5."""
    raw = torch.arange(5 * 6 * 7).view(5, 6, 7) % 3
    grid = Grid((5, 6, 7), ((0, 5), (1, 5), (2, 6)), (2, 0, 1))
    seen = raw[:, 1:5, 2:6].permute(2, 0, 1)
    scores = torch.nn.functional.one_hot(seen, 3).movedim(-1, 0)[None].float()
    found = predict_cases(dense(lambda _: scores, (0, 4, 9)), torch.zeros(1, 1, *seen.shape), Preparation(dims=3), grid)
    expected = torch.zeros(5, 6, 7, dtype=torch.int16)
    expected[:, 1:5, 2:6] = torch.tensor([0, 4, 9], dtype=torch.int16)[raw[:, 1:5, 2:6]]
    assert torch.equal(found.labels[0], expected)
    assert (found.confidence == 1).all()


def test_a_network_for_images_sees_a_volume_slice_by_slice() -> None:
    """Slices along raw axis 1; more of them than go through the network at once."""
    volumes = torch.rand(2, 3, SLICES + 3, 5, 6, generator=torch.Generator().manual_seed(2))
    grid = Grid((5, SLICES + 3, 6), axes=(1, 0, 2))
    found = predict_cases(dense(pointwise, (0, 7, 300)), volumes, AS_IS, grid)
    best = pointwise(volumes).max(1)
    expected = torch.tensor([0, 7, 300], dtype=torch.int16)[best.indices].transpose(1, 2)
    assert torch.equal(found.labels, expected)
    torch.testing.assert_close(found.confidence, best.values.transpose(1, 2))


class Framing(Preparation):
    """As volumes are shown: in the middle of a window of zeros where they are smaller."""

    fills_window: ClassVar[bool] = True


@pytest.mark.parametrize("blend", ["average", "centre"])
@pytest.mark.parametrize("shape", [(3, 11, 8), (8, 8, 5), (2, 1, 19)])
def test_a_volume_smaller_than_the_window_is_shown_in_the_middle_of_zeros(
    shape: tuple[int, ...], blend: Literal["average", "centre"]
) -> None:
    """As nnU-Net pads it, and what the network says of the border is cut off again."""
    pad = pytest.importorskip("acvl_utils.cropping_and_padding.padding").pad_nd_image
    images, seen = torch.rand(1, 2, *shape), []

    def score(shown: Tensor) -> Tensor:
        seen.append(shown)
        return shown + torch.arange(shown.shape[-1])  # differs by place, so that a shift would be found

    preparation = Framing(dims=3, window=(8, 8, 8), overlap=0.5, blend=blend)
    found = predict_cases(dense(score, (3, 5)), images, preparation, Grid(shape))
    padded, cut = pad(images, (8, 8, 8), "constant", {"value": 0}, return_slicer=True)
    assert torch.equal(seen[0], padded[:, :, :8, :8, :8])
    assert all(shown.shape[2:] == (8, 8, 8) for shown in seen)
    whole = predict_cases(
        dense(score, (3, 5)), padded, Preparation(dims=3, window=(8, 8, 8), overlap=0.5, blend=blend),
        Grid(tuple(padded.shape[2:])),
    )  # fmt: skip
    inside = (cut[0], *cut[2:])
    assert torch.equal(found.labels, whole.labels[inside])
    torch.testing.assert_close(found.confidence, whole.confidence[inside])


def test_a_volume_of_a_few_voxels_reaches_a_network_that_cannot_normalise_one() -> None:
    network = residual_unet(3, 1, (4, 8, 8, 8))
    network.grow(2)
    network.eval()
    plan = Volume3D(
        channels=1, patch=(16, 16, 16), window=(16, 16, 16), spacing=(1.0, 1.0, 1.0), schemes=("NoNormalization",),
        masked=(False,), intensities=(None,),
    )  # fmt: skip
    small = torch.rand(1, 1, 6, 8, 5)

    def model(images: Tensor) -> Prediction:
        return Prediction.dense(network.full_logits(images).softmax(1), (0, 4))

    with torch.no_grad(), pytest.raises(UsageError, match="input too small"):
        model(small)  # an axis of at most 8 voxels is one voxel at the deepest level
    found = predict_cases(model, small, plan, Grid((6, 8, 5)))
    assert found.labels.shape == (1, 6, 8, 5) and found.confidence.isfinite().all()


def test_a_photograph_smaller_than_the_window_keeps_its_size() -> None:
    seen: list[tuple[int, ...]] = []

    def score(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[2:]))
        return images

    photo = Photo2D(patch=(8, 8), window=32)
    predict_cases(dense(score, (0, 1, 2)), torch.rand(1, 3, 7, 40), photo, Grid((7, 40)))
    assert set(seen) == {(7, 32)}
