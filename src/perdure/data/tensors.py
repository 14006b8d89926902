"""Images that are already in memory as a data set: what a method made itself and trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.source import AbsentSplitError, Image, Kind, Mask, Source, Split
from perdure.labels import TABLE_SIZE, LabelSpace


@dataclass(eq=False)
class TensorSource(Source):
    """One training split in memory; implements :class:`~perdure.data.source.Source`. Samples are named by number.

    Args:
        images: ``(N, C, *S)`` float32, as networks see them.
        labels: Global ids ``(N,)`` of the images, or label maps ``(N, *S)``.
        space: The classes.
    """

    images: Tensor
    labels: Tensor
    space: LabelSpace
    name: str = field(default="made", init=False)
    patients: bool = field(default=False, init=False)
    other_label: int = field(default=0, init=False)
    kind: Kind = field(init=False)

    def __post_init__(self) -> None:
        self.kind = "classification" if self.labels.ndim == 1 else "segmentation"

    def names(self, split: Split) -> Sequence[str]:
        """``"0"``, ``"1"``, ..."""
        if split != "train":
            raise AbsentSplitError(f"images made by a method have no split '{split}'")
        return [str(i) for i in range(len(self.images))]

    def image(self, split: Split, name: str) -> Image:  # noqa: ARG002
        """Image ``(C, *S)`` float32."""
        return self.images[int(name)].numpy()

    def mask(self, split: Split, name: str) -> Mask:  # noqa: ARG002
        """Label ``()`` or ``(*S)``."""
        return np.asarray(self.labels[int(name)].numpy(), np.int16)

    def fingerprint(self, split: Split) -> str:
        """Digest of the labels."""
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16)
        digest.update(f"{split} {tuple(self.images.shape)}".encode())
        return digest.hexdigest()


def tensor_view(images: Tensor, labels: Tensor, space: LabelSpace) -> Dataset:
    """Dataset of images that need no further preparation; see :class:`TensorSource`."""
    source = TensorSource(images.cpu(), labels.cpu(), space)
    table = np.arange(TABLE_SIZE, dtype=np.int16)
    return Dataset(source, "train", tuple(source.names("train")), table, Preparation(), True)
