"""How a raw case becomes what a network sees, and how its scores come back to the raw grid.

A preparation is plain data: it is written beside the weights of the task that learned with it, so that a case is
shown to the model in the same way in training, in evaluation and in prediction. It also says what the rest of the
program asks of the data: dimensions, channels, the size of training samples, and the window for prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from perdure.data.augment import filled, jitter_colors, scaled_crop, shorter_within
from perdure.data.case import Case, Geometry, Grid
from perdure.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    centre,
    fit_square,
    nearest,
    normalise,
    random_resized_crop,
    resize,
    resize_label,
    scale_scores,
    shorter_to,
)
from perdure.errors import DataError

LARGEST_SIDE: Final = 1 << 16
"""Bound on sides in pixels: a description of a run that was damaged must not ask for all memory of a machine."""
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]


class Preparation(BaseModel):
    """What all preparations have; the default leaves images as they are (made by a method, or already prepared).

    Attributes:
        dims: Spatial dimensions.
        channels: Channels of the prepared image.
        patch: Spatial size of training samples; ``()`` where it is that of the images.
        needs_working_files: True where whole cases are prepared before training, into
            :class:`~perdure.data.volumes.working.WorkingFiles`, and samples are cut from those.
        fills_window: True where an image that is shorter than the window along an axis is predicted in the middle of a
            window of zeros.
        window: Side of the windows in which larger images are predicted, also one per axis; ``None`` for whole images.
        overlap: Share of a window that its neighbour covers again.
        blend: What happens there: scores are averaged, or each pixel takes the class from the window in whose middle it
            lies most, which needs far less memory and time where there are many classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    needs_working_files: ClassVar[bool] = False
    fills_window: ClassVar[bool] = False

    kind: Literal["as_is", "photo2d", "class_image", "volume3d", "slices2d"] = "as_is"
    dims: Literal[2, 3] = 2
    channels: int = Field(3, ge=1, le=LARGEST_SIDE)
    patch: tuple[Side, ...] = ()
    window: Side | tuple[Side, ...] | None = None
    overlap: float = Field(1 / 3, ge=0, le=0.95)
    blend: Literal["average", "centre"] = "average"

    @property
    def ends(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What black and white are in a prepared image, by channel; -1 and 1 where nothing is known of its range."""
        return (-1.0,) * self.channels, (1.0,) * self.channels

    @property
    def mirrors(self) -> tuple[int, ...]:
        """Spatial axes along which training samples are mirrored."""
        return ()

    def train(self, case: Case) -> Case:
        """A training sample: augmented, float32 image ``(C, *patch)``; draws from torch's generator only."""
        return self.test(case)

    def test(self, case: Case) -> Case:
        """The whole case for evaluation: the prepared image, and the label on the raw grid, int64."""
        return replace(self.show(case), label=case.label.long())

    def show(self, case: Case) -> Case:
        """A whole raw case as the network sees it in prediction: float32 image ``(C, *s)`` and its ``grid``.

        The label is left as it is.
        """
        return replace(case, image=self.normalised(case.image), grid=Grid(case.size))

    def normalised(self, image: Tensor) -> Tensor:
        """A whole raw image ``(C, *S)`` as numbers that the network is used to, float32 ``(C, *s)``."""
        return image.float()

    def restore(self, scores: Tensor, grid: Grid) -> Tensor:
        """Scores ``(N, k, *s)`` of a prepared image on the raw grid, ``(N, k, *grid.inside)``; ``(N, k)`` stay."""
        return grid.back(scale_scores(scores, grid.turned))

    def restore_labels(self, maps: Tensor, grid: Grid) -> Tensor:
        """Maps ``(N, *s)`` of labels or confidence on the raw grid, each pixel from the one that it lies in."""
        return grid.back(nearest(maps, grid.turned))


def ends_of(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What 0 and 1 become where each channel is normalised with these numbers."""
    pairs = list(zip(mean, std, strict=True))
    return tuple(-m / s for m, s in pairs), tuple((1 - m) / s for m, s in pairs)


class _Pictures(Preparation):
    """Images with a mean and a standard deviation per channel."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    flip: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _one_number_per_channel(self) -> _Pictures:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{self.channels} channels need as many means and standard deviations")
        if min(self.std) <= 0:
            raise ValueError("a standard deviation is not above 0")
        if len(self.patch) != 2:
            raise ValueError("the patch of a picture has a height and a width")
        return self

    @property
    def ends(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Black and white after the normalisation."""
        return ends_of(self.mean, self.std)

    @property
    def mirrors(self) -> tuple[int, ...]:
        """The width, where samples are mirrored at all."""
        return (1,) if self.flip > 0 else ()

    def finish(self, case: Case, image: Tensor, label: Tensor) -> Case:
        """A training sample: mirrored with probability ``flip``, then normalised.

        Where nothing is ever mirrored nothing is drawn, so that the setting leaves all other draws alone.
        """
        if self.flip > 0 and torch.rand(()).item() < self.flip:
            image, label = image.flip(-1), label.flip(-1) if label.ndim else label
        if label.ndim:
            image, label = filled(image, label, self.patch)
        # the flip comes before the normalisation because bytes are moved four times as fast as floats
        return replace(case, image=normalise(image, self.mean, self.std), label=label.long())


class Photo2D(_Pictures):
    """Photographs with masks (STAR, spec 1.5).

    Training samples are random resized crops, or, with ``short_edges``, crops of fixed size from an image whose shorter
    side has one of these lengths (CLIP-CISS, spec 1.4). For evaluation and prediction an image keeps its size, or its
    shorter side is scaled to ``size``; scores are scaled back and the label map has the size of the raw image. Two
    published protocols of evaluation measure on scaled masks: only the centre ``size`` × ``size`` (``centre_crop``,
    STAR), or all of them (``scaled``, CLIP-CISS).
    """

    kind: Literal["photo2d"] = "photo2d"
    area: tuple[float, float] = (0.5, 2.0)
    short_edges: tuple[Side, ...] = ()
    jitter: bool = False
    size: Side | None = None
    protocol: Literal["whole", "centre_crop", "scaled"] = "whole"
    window: Side | tuple[Side, ...] | None = 1024

    def train(self, case: Case) -> Case:
        """Crop, colours, flip, normalisation."""
        if self.short_edges:
            image, label = scaled_crop(case.image, case.label, self.patch, self.short_edges)
        else:
            image, label = random_resized_crop(case.image, case.label, self.patch, self.area)
        return self.finish(case, jitter_colors(image) if self.jitter else image, label)

    def test(self, case: Case) -> Case:
        """The whole image and its mask as they are, or scaled, or the centre of both."""
        if self.protocol == "whole" or self.size is None:
            return super().test(case)
        if self.protocol == "scaled":
            height, width = shorter_within(self.size, *case.label.shape)
            image, label = resize(case.image, height, width), resize_label(case.label, height, width)
        else:
            height, width = shorter_to(self.size, *case.label.shape)
            image = centre(resize(case.image, height, width), self.size)
            label = centre(resize_label(case.label, height, width), self.size)
        grid = Grid(tuple(label.shape))
        image = normalise(image, self.mean, self.std)
        # the spacing is that of the raw image, and this one was scaled
        return replace(case, image=image, label=label.long(), grid=grid, geometry=Geometry())

    def normalised(self, image: Tensor) -> Tensor:
        """Shorter side scaled to ``size`` where there is one, then normalised."""
        if self.size is not None:
            image = resize(image, *shorter_to(self.size, *image.shape[1:]))
        return normalise(image, self.mean, self.std)


class ClassImage(_Pictures):
    """Images with one class each (CCSI, spec 1.2): padded or scaled to a square of ``patch``.

    With mean 0 and standard deviation 1 values are in [0, 1] and the padded border is 0.
    """

    kind: Literal["class_image"] = "class_image"

    def train(self, case: Case) -> Case:
        """Square, flip, normalisation."""
        return self.finish(case, fit_square(case.image, self.patch[0]), case.label)

    def normalised(self, image: Tensor) -> Tensor:
        """Square and normalised, without a flip."""
        return normalise(fit_square(image, self.patch[0]), self.mean, self.std)


class _Tag(BaseModel):
    kind: Literal["as_is", "photo2d", "class_image", "volume3d", "slices2d"]


def _preparation_class(kind: str) -> type[Preparation]:
    if kind == "volume3d":  # both are loaded where a run has volumes
        from perdure.data.volumes.preprocessing import Volume3D

        return Volume3D
    if kind == "slices2d":
        from perdure.data.volumes.slices import Slices2D

        return Slices2D
    return {"as_is": Preparation, "photo2d": Photo2D, "class_image": ClassImage}[kind]


def read_preparation(content: object, where: str) -> Preparation:
    """The preparation that was written as plain data. Raises DataError where it is damaged."""
    try:
        return _preparation_class(_Tag.model_validate(content).kind).model_validate(content)
    except ValidationError as error:
        raise DataError(
            f"{where}: the preparation of a task is damaged: {error.errors()[0]['msg']}", "restore the file"
        ) from error
