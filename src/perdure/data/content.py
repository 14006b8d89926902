"""A cheap fingerprint of what images hold, so that a resumed run notices that they were replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, TypeVar

from perdure.data.dataset import Dataset
from perdure.data.source import read_arrays
from perdure.errors import DataError

SIZES: Final = 2000
"""Image files whose size is looked at: 20 ms on a local disk."""
CONTENTS: Final = 16
"""Samples that are read whole."""
T = TypeVar("T")


def content_fingerprint(parts: Sequence[Dataset]) -> str:
    """Hex digest of the content of some samples: equal images give equal digests, whatever their dates and places.

    Of each data set at most :data:`SIZES` files count with their size, and at most :data:`CONTENTS` samples with every
    value of image and label; both are spread evenly over the list. An image that was replaced by another one of the
    same size, and is none of those that are read, is not noticed. Names, order and labels are compared elsewhere
    (:func:`perdure.streams.description.describe`), all of them.

    Raises:
        DataError: A sample that is read is damaged or missing.
    """
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        files = (file for name in _spread(part.names, SIZES) for file in part.source.files(part.split, name))
        for file in dict.fromkeys(files):  # once where all samples lie in one; none where they are made
            try:
                digest.update(b"%d " % file.stat().st_size)
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror or error}", "restore the file") from error
        for name in _spread(part.names, CONTENTS):
            for values in read_arrays(part.source, part.split, name):
                digest.update(f"{values.shape} {values.dtype}".encode() + values.tobytes())
    return digest.hexdigest()


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of some items, evenly spread."""
    if len(items) <= most:
        return list(items)
    return [items[k * len(items) // most] for k in range(most)]
