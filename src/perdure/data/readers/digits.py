"""Built-in scenes of real handwritten digits on textured background: a segmentation data set without a download.

Each scene shows a few digits of scikit-learn's collection (UCI optical recognition, 8×8, 1,797 samples), enlarged,
transformed, coloured and blended into a textured background with clutter. The collection is ordered by writer and the
splits are contiguous parts of it, so test scenes show other writers than training scenes. A scene depends only on
seed, split, number, size and digits per scene; :mod:`perdure.data.readers.digit_scenes` renders it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from perdure.data.readers.digit_scenes import VERSION, Scene, paint
from perdure.data.source import SPLITS, AbsentSplitError, Image, Kind, Mask, Source, Split
from perdure.errors import DataError, UsageError
from perdure.labels import LabelSpace, label_space
from perdure.seeds import derive_seed

CLASSES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WRITERS: Final[dict[Split, tuple[int, int]]] = {"train": (0, 1150), "val": (1150, 1437), "test": (1437, 1797)}
_CACHE_BYTES: Final = 128 << 20  # rendered scenes cached per process


@dataclass(frozen=True, eq=False)
class Digits(Source):
    """Digit scenes; implements :class:`~perdure.data.source.Source`. Class ids are digit + 1.

    Args:
        counts: Scenes per split.
        size: Height and width in pixels. The height of a digit is a third to a half of it.
        per_scene: Fewest and most digits per scene, all different.
        seed: Seed of the whole data set.
    """

    counts: dict[Split, int]
    size: int = 64
    per_scene: tuple[int, int] = (2, 4)
    seed: int = 0
    name: str = field(default="digits", init=False)
    kind: Kind = field(default="segmentation", init=False)
    space: LabelSpace = field(default_factory=lambda: label_space(CLASSES), init=False)
    patients: bool = field(default=False, init=False)
    other_label: int = field(default=0, init=False)
    _painted: dict[tuple[Split, str], Scene] = field(default_factory=dict, init=False, repr=False)

    def names(self, split: Split) -> Sequence[str]:
        """Scene numbers with five digits: ``00000``, ``00001``, ..."""
        if not self.counts[split]:
            raise AbsentSplitError(
                f"split '{split}' of digits is absent: 0 scenes were asked for", f"set {split} above 0"
            )
        return tuple(f"{k:05d}" for k in range(self.counts[split]))

    def image(self, split: Split, name: str) -> Image:
        """RGB scene ``(3, size, size)`` uint8."""
        return self._scene(split, name).image

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(size, size)`` int16: 0 background, digit + 1."""
        return self._scene(split, name).mask

    def fingerprint(self, split: Split) -> str:
        """Digest of the parameters and of the version of the rendering. No scene is rendered."""
        parts = (VERSION, split, self.counts[split], self.size, *self.per_scene, self.seed)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _scene(self, split: Split, name: str) -> Scene:
        scene = self._painted.get((split, name))
        if scene is None:
            if not (name.isdecimal() and int(name) < self.counts[split]):
                raise DataError(f"digits has no sample '{name}' in split '{split}'")
            seed = derive_seed("digits", self.seed, split, int(name))
            scene = paint(seed, self.size, self.per_scene, WRITERS[split])
            if len(self._painted) * 4 * self.size**2 >= _CACHE_BYTES:
                self._painted.clear()
            self._painted[split, name] = scene
        return scene

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached scenes out when the source is sent to a worker process."""
        return self.__dict__ | {"_painted": {}}


def open_digits(
    size: int = 64,
    train: int = 1200,
    val: int = 200,
    test: int = 300,
    per_scene: tuple[int, int] = (2, 4),
    seed: int = 0,
) -> Digits:
    """Open the digit scenes. Nothing is rendered or loaded before a scene is read.

    Args:
        size: Height and width in pixels.
        train: Training scenes.
        val: Validation scenes.
        test: Test scenes.
        per_scene: Fewest and most digits per scene. More than about four overlap.
        seed: Another seed gives other scenes with the same handwriting.

    Raises:
        UsageError: A number is out of range.
    """
    if not 32 <= size <= 1024:
        raise UsageError(f"digits: size is {size}", "32 to 1024 pixels")
    if not 1 <= per_scene[0] <= per_scene[1] <= len(CLASSES):
        raise UsageError(f"digits: per_scene is {list(per_scene)}", "two numbers from 1 to 10, fewest and most")
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    for split, count in counts.items():
        if not 0 <= count <= 99_999:
            raise UsageError(f"digits: {split} is {count}", "0 to 99999 scenes")
    return Digits(counts, size, per_scene, seed)
