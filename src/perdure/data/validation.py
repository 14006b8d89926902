"""A validation set taken out of the training images of a data set that has none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from perdure.data.source import AbsentSplitError, Image, Kind, Labels, Mask, Source, Split
from perdure.errors import UsageError
from perdure.labels import LabelSpace

if TYPE_CHECKING:
    from perdure.data.case import Case


@dataclass(frozen=True, eq=False)
class HeldOut(Source):
    """A source whose every ``every``-th training image is a validation image instead.

    The rule: the names of the training images are sorted, and those at positions 0, ``every``, 2 · ``every``, ... are
    for validation. Where the data set knows which images belong together (:meth:`Source.group`), the groups are sorted
    and taken whole instead, so that no patient is on both sides. It draws nothing. Where the data set knows nothing of
    groups, frames of one video can be on both sides.

    Args:
        inner: The data set.
        every: 2 or more.
    """

    inner: Source
    every: int
    name: str = field(init=False)
    kind: Kind = field(init=False)
    space: LabelSpace = field(init=False)
    patients: bool = field(init=False)
    other_label: int = field(init=False)
    dims: Literal[2, 3] = field(init=False)
    modality: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        for key in ("name", "kind", "space", "patients", "other_label", "dims", "modality"):
            object.__setattr__(self, key, getattr(self.inner, key))  # the class is frozen

    @cached_property
    def _held(self) -> frozenset[str]:
        groups: dict[str, list[str]] = {}
        for name in self.inner.names("train"):
            groups.setdefault(self.inner.group("train", name), []).append(name)
        return frozenset(name for group in sorted(groups)[:: self.every] for name in groups[group])

    def names(self, split: Split) -> Sequence[str]:
        """Names of a split, in the order of the data set."""
        if split == "test":
            return self.inner.names(split)
        return tuple(name for name in self.inner.names("train") if (name in self._held) == (split == "val"))

    def image(self, split: Split, name: str) -> Image:
        """See :class:`~perdure.data.source.Source`."""
        return self.inner.image(_stored(split), name)

    def mask(self, split: Split, name: str) -> Mask:
        """See :class:`~perdure.data.source.Source`."""
        return self.inner.mask(_stored(split), name)

    def fingerprint(self, split: Split) -> str:
        """Digest of the data set's own and of the rule."""
        text = f"{self.inner.fingerprint(_stored(split))} {split} {self.every}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def files(self, split: Split, name: str) -> Sequence[Path]:
        """See :class:`~perdure.data.source.Source`."""
        return self.inner.files(_stored(split), name)

    def reading(self) -> bytes:
        """See :class:`~perdure.data.source.Source`."""
        return self.inner.reading()

    def distinct_labels(self, split: Split, name: str) -> Labels:
        """See :class:`~perdure.data.source.Source`."""
        return self.inner.distinct_labels(_stored(split), name)

    def group(self, split: Split, name: str) -> str:
        """See :class:`~perdure.data.source.Source`."""
        return self.inner.group(_stored(split), name)

    def read(self, split: Split, name: str) -> Case:
        """See :class:`~perdure.data.source.Source`."""
        return self.inner.read(_stored(split), name)


def _stored(split: Split) -> Split:
    """Where the data set itself has the images of a split."""
    return "train" if split == "val" else split


def hold_out(source: Source, every: int) -> Source:
    """The source with a validation set of every ``every``-th training image. Raises UsageError where it has one."""
    if every < 2:
        raise UsageError(f"data.validation is {every}", "give 2 or more: every n-th training image is for validation")
    try:
        count = len(source.names("val"))
    except AbsentSplitError:
        return HeldOut(source, every)
    raise UsageError(
        f"data.validation={every}, but '{source.name}' has {count} validation images of its own", "leave it out"
    )
