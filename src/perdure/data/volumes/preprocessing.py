"""Volumes for 3D networks, prepared by nnU-Net: turned, cut to the body, normalised and resampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from perdure.data.case import Case, Grid
from perdure.data.source import distinct
from perdure.data.volumes.augmentation import OUTSIDE, augmented, region_size
from perdure.data.volumes.extra import free_memory, need, quiet
from perdure.data.volumes.options import Millimetres
from perdure.data.volumes.sampled import ANNOTATED, Array, Ready, Sampled, called, checked, spacing_of
from perdure.errors import DataError
from perdure.labels import BACKGROUND, IGNORE
from perdure.seeds import derive_seed

Scheme = Literal[
    "CTNormalization",
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
]
Axis = Annotated[int, Field(ge=0, le=2)]
BYTES_PER_VOXEL: Final = 24
"""Memory that preparing a volume takes per voxel, raw or prepared: nnU-Net resamples a channel in float64."""


class Intensities(BaseModel):
    """Of the labelled voxels of a channel, over all training cases: what nnU-Net's CT normalisation needs.

    nnU-Net's fingerprint has the smallest and the largest value too. Each is one voxel of one patient: not kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float


class Volume3D(Sampled):
    """Volumes by a plan of nnU-Net v2 (configuration ``3d_fullres``).

    Attributes:
        spacing: Of a prepared volume along its own axes, in mm.
        axes: For each prepared axis the raw axis that it is (nnU-Net's ``transpose_forward``): the axis with the
            largest spacing comes first.
        schemes: nnU-Net's normalisation of each channel.
        masked: For each channel whether only voxels of the body are normalised; the others are 0.
        intensities: Of each channel.
        patch: Voxels of a training sample along the prepared axes.
    """

    # as nnU-Net does it: samples that reach beyond a volume are 0 there in training too, and a network whose deepest
    # features are a single voxel cannot normalise them
    fills_window: ClassVar[bool] = True

    kind: Literal["volume3d"] = "volume3d"
    dims: Literal[2, 3] = 3
    overlap: float = Field(0.5, ge=0, le=0.95)
    spacing: tuple[Millimetres, ...]
    axes: tuple[Axis, ...] = (0, 1, 2)
    schemes: tuple[Scheme, ...]
    masked: tuple[bool, ...]
    intensities: tuple[Intensities | None, ...]

    @model_validator(mode="after")
    def _sound(self) -> Volume3D:
        if not len(self.schemes) == len(self.masked) == len(self.intensities) == self.channels:
            raise ValueError(f"{self.channels} channels need as many normalisations")
        if sorted(self.axes) != [0, 1, 2] or {len(self.patch), len(self.spacing), self.dims} != {3}:
            raise ValueError("a volume has three axes")
        if any(s == "CTNormalization" and i is None for s, i in zip(self.schemes, self.intensities, strict=True)):
            raise ValueError("CT normalisation needs the intensities of the labelled voxels")
        return self

    @property
    def raw_spacing(self) -> tuple[float, ...]:
        """Spacing along the raw axes: depth, height, width."""
        return tuple(self.spacing[self.axes.index(axis)] for axis in range(3))

    def fitted(self, multiple: Sequence[int]) -> Volume3D:
        """The same with patch and window as a network needs them, see :func:`fit_patch`."""
        patch = fit_patch(self.patch, multiple)
        return self.model_copy(update={"patch": patch, "window": patch})

    def show(self, case: Case) -> Case:
        """The prepared volume ``(C, *s)`` and the way back: the box that was cut, the axes that were turned.

        Raises:
            DataError: See :meth:`ready`.
        """
        image, _, found = self._run(case, None)
        cut = found["bbox_used_for_cropping"]
        box = tuple((int(cut[self.axes.index(axis)][0]), int(cut[self.axes.index(axis)][1])) for axis in range(3))
        size = tuple(case.image.shape[1:])
        whole = box == tuple((0, side) for side in size)
        return replace(case, image=torch.from_numpy(image), grid=Grid(size, () if whole else box, self.axes))

    def ready(self, case: Case) -> Ready:
        """Image and label as nnU-Net's own preprocessing gives them, and places of each label.

        Raises:
            DataError: The volume has other channels than the plan, values that are no numbers, or a size at the plan's
                spacing that cannot be used.
        """
        image, label, found = self._run(case, case.label.numpy().astype(np.int16))
        places = {int(key): at[:, 1:].astype(np.uint16) for key, at in found["class_locations"].items() if len(at)}
        if (label == IGNORE).any():
            known = tuple(sorted({*distinct(label).tolist()} - {IGNORE}))
            # the function that nnU-Net draws places with, for all labels together as for sets with an ignore label
            sampler = need("nnunetv2.preprocessing.preprocessors.default_preprocessor").DefaultPreprocessor
            if known:
                at = sampler._sample_foreground_locations(label, [known], verbose=False)[known]
                places[ANNOTATED] = at[:, 1:].astype(np.uint16)
        return Ready(image, label[0], places)

    def cut(self, ready: Ready, seed: int) -> tuple[Tensor, Tensor]:
        """A patch, of which ``foreground`` of all are centred on a labelled voxel; 0 beyond the volume."""
        draw = np.random.default_rng(derive_seed(seed, "place"))
        size, patch = region_size(self.patch, self.augment), self.patch
        spot = self.spot(ready.places, draw)
        corner = []
        for axis, (length, wanted, read) in enumerate(zip(ready.label.shape, patch, size, strict=True)):
            # nnU-Net's bounds: the larger region may reach beyond the volume, so that its borders are seen as often
            slack = max(read - wanted, read - length)
            first, last = -(slack // 2), length + slack // 2 + slack % 2 - read
            if spot is None:
                corner.append(int(draw.integers(first, last + 1)))
            else:
                corner.append(min(max(first, int(spot[axis]) - read // 2), last))
        image = region(ready.image, corner, size, 0.0)
        label = region(ready.label, corner, size, OUTSIDE)
        return augmented(torch.from_numpy(image), torch.from_numpy(label), patch, self.augment, self.masked, 0.0, seed)

    def _run(self, case: Case, label: npt.NDArray[np.int16] | None) -> tuple[Any, Any, dict[str, Any]]:
        """nnU-Net's own preprocessing of one case: image ``(C, *s)`` float32, label ``(1, *s)``, what it found."""
        image = checked(case, (3,), self.accepted_channels)
        spacing = spacing_of(case)
        refuse_size(case, spacing, self.raw_spacing)
        present = [] if label is None else sorted({*distinct(label).tolist()} - {BACKGROUND, IGNORE})
        # nnU-Net looks for places of declared labels alone; ignored voxels are found in `ready`
        declared = {"labels": {"background": BACKGROUND, **{str(value): value for value in present}}}
        plans = need("nnunetv2.utilities.plans_handling.plans_handler").PlansManager(self.nnunet_plans())
        worker = need("nnunetv2.preprocessing.preprocessors.default_preprocessor").DefaultPreprocessor(verbose=False)
        with quiet():
            data, seg, found = worker.run_case_npy(
                image,
                None if label is None else label[None],
                {"spacing": list(spacing)},
                plans,
                plans.get_configuration("3d_fullres"),
                declared,
            )
        if 0 in data.shape:  # the body alone may be thinner than half a voxel of the plan
            raise DataError(
                f"{called(case)} has no voxel left at the plan's spacing", "leave it out, or choose volumes.spacing"
            )
        return data, seg.astype(np.int16, copy=False), found

    def nnunet_plans(self) -> dict[str, Any]:
        """The plan in the form of nnU-Net's ``nnUNetPlans.json``, as far as its preprocessing reads it."""
        resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        return {
            "transpose_forward": list(self.axes),
            "transpose_backward": [self.axes.index(axis) for axis in range(3)],
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {
                str(channel): {} if values is None else values.model_dump()
                for channel, values in enumerate(self.intensities)
            },
            "configurations": {
                "3d_fullres": {
                    "spacing": list(self.spacing),
                    "patch_size": list(self.patch),
                    "normalization_schemes": list(self.schemes),
                    "use_mask_for_norm": list(self.masked),
                    "resampling_fn_data": "resample_data_or_seg_to_shape",
                    "resampling_fn_data_kwargs": resampling,
                    "resampling_fn_seg": "resample_data_or_seg_to_shape",
                    "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
                    "architecture": {},
                }
            },
        }


def refuse_size(
    case: Case, spacing: Sequence[float], wanted: Sequence[float], patch: Sequence[int] | None = None
) -> None:
    """Refuse a volume that cannot be resampled: nothing would be left of it, or it would not fit into memory.

    Args:
        case: The raw case.
        spacing: Its spacing in mm.
        wanted: The spacing that it is to have, in mm.
        patch: Of the recipe, where it names one.

    Raises:
        DataError: It is so, or the whole volume would fill less than an eighth of the patch along every axis.
    """
    sides = [round(n * s / to) for n, s, to in zip(case.image.shape[1:], spacing, wanted, strict=True)]
    needed = BYTES_PER_VOXEL * (math.prod(sides) + case.image.numel())
    why = ""
    if patch is not None and all(8 * side <= of for side, of in zip(sides, patch, strict=True)):
        why = f", and the patch has {' × '.join(map(str, patch))}"
    if all(sides) and needed > free_memory():
        why = f", and needs {needed / 1e9:.1f} GB of memory"
    if why or not all(sides):
        shown, plan = (" × ".join(f"{value:g}" for value in values) for values in (sides, wanted))
        raise DataError(
            f"{called(case)} would have {shown} voxels at the plan's spacing of {plan} mm{why}",
            "leave it out, or choose another volumes.spacing",
        )


def region(array: Array, corner: Sequence[int], size: Sequence[int], fill: float) -> npt.NDArray[Any]:
    """A box of an array ``(…, *s)``, of which only what lies inside is read; ``fill`` beyond its borders."""
    lead = len(array.shape) - len(size)
    lengths = array.shape[lead:]
    inside = [
        slice(min(max(0, a), length), min(max(0, a + n), length))
        for a, n, length in zip(corner, size, lengths, strict=True)
    ]
    read = np.asarray(array[(slice(None),) * lead + tuple(inside)])
    box = np.full((*array.shape[:lead], *size), fill, read.dtype)
    if read.size:
        place = tuple(slice(s.start - a, s.stop - a) for s, a in zip(inside, corner, strict=True))
        box[(slice(None),) * lead + place] = read
    return box


def fit_patch(patch: Sequence[int], multiple: Sequence[int]) -> tuple[int, ...]:
    """The patch nearest to the planned one that a network takes: each side a multiple of the network's.

    Half-way the larger one is taken; no side becomes 0.

    Args:
        patch: Voxels along each axis.
        multiple: Of the network along each axis (``network.multiple``).
    """
    return tuple(max(1, (2 * side + step) // (2 * step)) * step for side, step in zip(patch, multiple, strict=True))
