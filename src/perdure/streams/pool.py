"""Images that a protocol grants without their labels, beside those of the task (``stream.pool``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.source import Source
from perdure.labels import IGNORE, TABLE_SIZE
from perdure.streams import lists

Pool = Literal["val", "test"] | Source
"""A split of the stream's own data set, or images of another place, all of which are granted from the start."""


def pool_view(
    source: Source,
    pool: Pool,
    groups: Sequence[tuple[int, ...]],
    index: int,
    preparation: Preparation,
    check: Callable[[], None],
) -> Dataset:
    """What a task may use: of a split the images that show a class seen so far; every label hidden.

    Args:
        source: The stream's data set.
        pool: What is granted.
        groups: Classes of each task.
        index: The task.
        preparation: As of training images.
        check: Called before every read; raises when the task is sealed.
    """
    hidden = np.full(TABLE_SIZE, IGNORE, np.int16)
    if not isinstance(pool, str):
        return Dataset(pool, "train", tuple(pool.names("train")), hidden, preparation, True, check)
    names, rows = source.names(pool), lists.seen(lists.cached_presence(source, pool), groups)[index]
    return Dataset(source, pool, tuple(names[row] for row in rows), hidden, preparation, True, check)


def find_pool(source: Source, pool: Pool) -> None:
    """Raise DataError if the pool is not there: now, and not after the first task."""
    if isinstance(pool, str):
        lists.cached_presence(source, pool)
    else:
        pool.names("train")


def pool_words(pool: Pool) -> str:
    """What a protocol's name says of a pool."""
    if not isinstance(pool, str):
        return f", {len(pool.names('train'))} unlabelled images of their own in training"
    images = {"val": "validation images", "test": "test images (transductive)"}[pool]
    return f", unlabelled {images} in training"
