"""What a method made itself and trains on, as a data set: images in memory, or in files that are read one by one."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from perdure.data.case import Case
from perdure.data.dataset import Dataset, Draw
from perdure.data.preparation import Preparation
from perdure.data.source import AbsentSplitError, Image, Kind, Mask, Source, Split
from perdure.errors import DataError
from perdure.labels import TABLE_SIZE, LabelSpace
from perdure.seeds import seeded


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


class FileSamples(TorchDataset[Case]):
    """Samples in safetensors files, such as a Generate phase wrote; only what a batch needs is read.

    A file holds one sample, ``image (C, *S)`` with ``label`` ``(*S)`` or ``()``, and perhaps ``annotated (k,)``, the
    ids that its own labels can tell; or several in a shard, ``images (n, C, *S)`` with ``labels`` ``(n, *S)`` or
    ``(n,)``. Labels are global ids, images are float32 as networks see them unless a preparation says how to get there.
    Implements :class:`~perdure.data.dataset.Samples`.

    Args:
        paths: The files, in order; their headers are read here.
        preparation: What makes a training sample of a stored image; draws of equal seed give equal samples.
        annotated: Ids that the labels can tell, see :class:`~perdure.data.case.Case`.

    Raises:
        DataError: A file is missing, damaged, or holds neither a sample nor a shard.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preparation: Preparation | None = None,
        annotated: frozenset[int] | None = None,
    ) -> None:
        self.paths, self.preparation, self.annotated = tuple(paths), preparation or Preparation(), annotated
        counts: list[int] = []
        for path in self.paths:
            with _opened(path) as file:  # the header alone: its size does not depend on the images
                names = set(file.keys())
                shapes = {name: file.get_slice(name).get_shape() for name in names & {"images", "labels"}}
            if {"image", "label"} <= names:
                counts.append(1)
            elif len(shapes) == 2 and shapes["images"][0] == shapes["labels"][0]:
                counts.append(int(shapes["images"][0]))
            else:
                needed = "it needs tensors `image` and `label`, or as many `images` as `labels`"
                raise DataError(f"{path} holds no samples", needed)
        self.ends = tuple(accumulate(counts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, draw: Draw | int) -> Case:
        """Read and prepare one sample, whose name is that of its file, with its number in a shard."""
        place, seed, _ = Draw.within(draw, len(self))
        number = bisect_right(self.ends, place)
        path, row = self.paths[number], place - (self.ends[number - 1] if number else 0)
        with _opened(path) as file:
            annotated, entries = self.annotated, file.keys()
            if "annotated" in entries:
                own = frozenset(file.get_tensor("annotated").tolist())
                annotated = own if annotated is None else own & annotated
            if "image" in entries:
                image, label, name = file.get_tensor("image"), file.get_tensor("label"), path.stem
            else:
                image, label = (file.get_slice(key)[row] for key in ("images", "labels"))
                name = f"{path.stem}:{row}"
        # a copy: what was read is a view of the mapped file, all of which a tensor that is held would keep mapped
        case = Case(image.clone(), label.clone(), name, annotated, group=name)
        with seeded(seed):
            return self.preparation.train(case)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:  # the library has no types here
    """Open a file without reading its tensors. Raises DataError where it is missing or damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "an audit of the run says what else is missing") from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error
