"""Which labels occur in which mask. The image lists of a stream are computed from this."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from perdure.data.source import Source, Split
from perdure.labels import TABLE_SIZE


def label_presence(
    source: Source, split: Split, names: Sequence[str] | None = None, threads: int | None = None
) -> npt.NDArray[np.bool_]:
    """Read all labels of a split and return which labels each image shows (one pixel suffices).

    Args:
        source: The data set.
        split: The split.
        names: Samples to read, in order; by default all of the split.
        threads: Number of reading threads (decoding releases the GIL); by default one per core.

    Returns:
        Bool ``(N, TABLE_SIZE)``: row n is sample n, column k is label k (background and ignore included).

    Raises:
        DataError: A mask cannot be read or holds an unknown label.
    """
    wanted = source.names(split) if names is None else names
    table = np.zeros((len(wanted), TABLE_SIZE), np.bool_)
    if source.kind == "classification":  # one number per image is in memory: threads would gain nothing
        table[np.arange(len(wanted)), [int(source.mask(split, name)) for name in wanted]] = True
        return table

    def fill(index: int) -> None:
        mask = source.mask(split, wanted[index])
        table[index] = np.bincount(mask.ravel(), minlength=TABLE_SIZE) > 0

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            for _ in pool.map(fill, range(len(wanted))):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return table
