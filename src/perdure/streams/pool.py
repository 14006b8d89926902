"""Unlabelled images that a protocol grants besides those of the task (``stream.pool``)."""

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
"""A split of the stream's data set, or another source, all images of which are granted from the first task on."""


def pool_view(
    source: Source,
    pool: Pool,
    groups: Sequence[tuple[int, ...]],
    index: int,
    preparation: Preparation,
    check: Callable[[], None],
) -> Dataset:
    """Granted images of a task: of a split those that show a class seen so far. All labels are ``IGNORE``.

    Args:
        source: The stream's data set.
        pool: The granted images.
        groups: Classes of each task.
        index: Number of the task.
        preparation: That of training images.
        check: Called before every read; raises if the task is sealed.
    """
    hidden = np.full(TABLE_SIZE, IGNORE, np.int16)
    if not isinstance(pool, str):
        return Dataset(pool, "train", tuple(pool.names("train")), hidden, preparation, True, check)
    names, rows = source.names(pool), lists.seen(lists.cached_presence(source, pool), groups)[index]
    return Dataset(source, pool, tuple(names[row] for row in rows), hidden, preparation, True, check)


def find_pool(source: Source, pool: Pool) -> None:
    """Raise DataError if the pool is missing, before any work starts."""
    if isinstance(pool, str):
        lists.cached_presence(source, pool)
    else:
        pool.names("train")


def pool_words(pool: Pool) -> str:
    """Text about the pool in the protocol."""
    if not isinstance(pool, str):
        return f", {len(pool.names('train'))} unlabelled images of their own in training"
    images = {"val": "validation images", "test": "test images (transductive)"}[pool]
    return f", unlabelled {images} in training"
