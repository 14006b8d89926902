"""Unlabelled images in a folder, which a protocol may grant besides the images of the tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np

from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, read_image, to_grey
from perdure.data.source import AbsentSplitError, Image, Kind, Mask, Source, Split
from perdure.errors import DataError
from perdure.labels import IGNORE, LabelSpace

_HINT: Final = f"put images ({', '.join(IMAGE_SUFFIXES)}) into it; folders inside are searched too"


@dataclass(frozen=True, eq=False)
class Unlabelled(Source):
    """Image files without labels; implements :class:`~perdure.data.source.Source` for the split ``train``.

    Args:
        root: Folder of the images, searched recursively.
        kind: Kind of the stream's data set. All labels here are ``IGNORE``.
        space: Classes of the stream's data set.
        channels: 3 for RGB images, 1 for grey ones.
    """

    root: Path
    kind: Kind
    space: LabelSpace
    channels: Literal[1, 3] = 3
    patients: bool = field(default=True, init=False)  # unknown origin: treated as patient data
    name: str = field(default="unlabelled", init=False)
    other_label: int = field(default=IGNORE, init=False)

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Files by their path inside the folder."""
        if not self.root.is_dir():
            raise DataError(f"{self.root} is no folder", "stream.pool_folder must be a folder of images")
        found = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        shown = [path for path in found if path.is_file() and not path.name.startswith(".")]
        files = {path.relative_to(self.root).as_posix(): path for path in shown}
        if not files:
            raise DataError(f"{self.root} holds no image", _HINT)
        return files

    def names(self, split: Split) -> Sequence[str]:
        """Paths inside the folder, sorted."""
        if split != "train":
            raise AbsentSplitError(f"unlabelled images have no split '{split}'")
        return tuple(self._files)

    def image(self, split: Split, name: str) -> Image:
        """Image ``(channels, H, W)`` uint8."""
        if split != "train" or name not in self._files:
            raise DataError(f"{self.name} has no sample '{name}' in split '{split}'")
        pixels = read_image(self._files[name])
        return pixels if self.channels == 3 else to_grey(pixels)

    def file_of(self, split: Split, name: str) -> Path | None:
        """The image file."""
        return self._files.get(name) if split == "train" else None

    def mask(self, split: Split, name: str) -> Mask:
        """``IGNORE`` everywhere: shape ``()`` in classification, else ``(H, W)``."""
        shape = () if self.kind == "classification" else self.image(split, name).shape[1:]
        return np.full(shape, IGNORE, np.int16)

    def fingerprint(self, split: Split) -> str:
        """Digest of the names."""
        return hashlib.blake2b(
            "\0".join(self.names(split)).encode(errors="surrogateescape"), digest_size=16
        ).hexdigest()


def open_unlabelled(root: Path, kind: Kind, space: LabelSpace, channels: Literal[1, 3] = 3) -> Source:
    """Open a folder of unlabelled images for a stream of the given kind and classes; see :class:`Unlabelled`.

    Raises:
        DataError: The folder does not exist or contains no image.
    """
    source = Unlabelled(root, kind, space, channels)
    source.names("train")  # lists the folder now, so that a wrong one is told before a run starts
    return source
