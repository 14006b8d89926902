"""nnU-Net's own augmentation, as draws that come out equal for equal seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from perdure.data.volumes.extra import need, quiet
from perdure.data.volumes.options import Augment
from perdure.labels import BACKGROUND
from perdure.seeds import seeded

OUTSIDE: Final = -1
"""nnU-Net's label of voxels that lie outside of the body or of the volume; background once a sample is cut."""


@contextmanager
def all_seeded(seed: int) -> Iterator[None]:
    """Seed torch and numpy for a block, and restore both: batchgeneratorsv2 draws from the two global generators."""
    outside = np.random.get_state()
    np.random.seed([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    try:
        with seeded(seed):
            yield
    finally:
        np.random.set_state(outside)


def region_size(patch: tuple[int, ...], kind: Augment) -> tuple[int, ...]:
    """Size of what is read for one sample: larger than the patch where it may be turned and scaled."""
    return _nnunet(patch, (), 0.0)[1] if kind == "nnunet" else patch


def augmented(
    image: Tensor,
    label: Tensor,
    patch: tuple[int, ...],
    kind: Augment,
    masked: tuple[bool, ...],
    fill: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """A training sample of a region that was read.

    Args:
        image: ``(C, *region_size)`` float32; not needed afterwards, may be overwritten.
        label: ``(*region_size)`` int16, ``OUTSIDE`` where there is no body or no volume.
        patch: Size of the sample.
        kind: What is varied.
        masked: Channels that are 0 outside of the body and stay so.
        fill: Value of the image outside of the volume.
        seed: Of everything random.

    Returns:
        Image ``(C, *patch)`` float32 and label ``(*patch)`` int64, background where it was ``OUTSIDE``.
    """
    with all_seeded(seed):
        if kind == "nnunet":
            found = _nnunet(patch, masked, fill)[0](image=image, segmentation=label[None])
            image, label = found["image"], found["segmentation"][0]
        elif kind == "mirror":
            axes = [axis for axis in range(len(patch)) if torch.rand(()).item() < 0.5]
            image, label = image.flip([axis + 1 for axis in axes]), label.flip(axes)
    label = label.long()
    return image.float().contiguous(), label.masked_fill(label == OUTSIDE, BACKGROUND).contiguous()


@lru_cache(maxsize=8)
def _nnunet(patch: tuple[int, ...], masked: tuple[bool, ...], fill: float) -> tuple[Any, tuple[int, ...]]:
    """nnU-Net's default transforms for a patch, without deep supervision, and the size of the region they need."""
    trainer = need("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    # the rule for angles, axes and size is a method of the trainer that needs nothing of it but these two
    stand_in = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=list(patch)), print_to_log_file=lambda *_: None
    )
    with quiet():
        rotation, flat, size, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(stand_in)
        transforms = trainer.get_training_transforms(
            patch, rotation, None, mirror, flat, use_mask_for_norm=list(masked) or None
        )
    for transform in transforms.transforms:
        inner = getattr(transform, "transform", transform)
        if hasattr(inner, "benchmark"):
            # the blur times two ways of computing and takes the faster one: samples would depend on the machine's load
            inner.benchmark = False
        if hasattr(inner, "padding_value_image"):
            inner.padding_mode_image, inner.padding_value_image = "constant", fill
    return transforms, tuple(int(side) for side in size)
