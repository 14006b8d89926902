"""Confusion counts: the one measurement that every figure is computed from.

Rows are ground truth, columns predictions, both over ``labels = (0, class ids...)``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError, PerdureError
from perdure.files import read_json, write_text
from perdure.labels import BACKGROUND, IGNORE, TABLE_SIZE

if TYPE_CHECKING:
    from torch import Tensor

Matrix = npt.NDArray[np.int64]
VERSION: Final = 1


def confusion(labels: Tensor, predictions: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Count pairs of ground truth and prediction.

    Args:
        labels: Ground truth ``(N, *S)`` in global ids, any integer type. Labels that are not in ``ids`` are
            dropped: ignore and classes that are not asked for (STAR, spec 1.7).
        predictions: Global ids, same shape.
        ids: Which label stands in which row and column.

    Returns:
        Int64 ``(K, K)`` on the device of ``labels``, K = len(ids). Counts of parts of the data add up.

    Raises:
        PerdureError: The shapes differ, or a prediction is not in ``ids``.
    """
    import torch

    if labels.shape != predictions.shape:
        raise PerdureError(f"ground truth is {tuple(labels.shape)} but the prediction is {tuple(predictions.shape)}",
                           "predict at the size of the labels")  # fmt: skip
    table = torch.full((TABLE_SIZE,), -1, dtype=torch.int64, device=labels.device)
    table[list(ids)] = torch.arange(len(ids), device=labels.device)
    truth, guess = _look_up(table, labels.flatten()), _look_up(table, predictions.flatten())
    if bool((guess < 0).any()):
        stray = int(predictions.flatten()[(guess < 0).nonzero()[0, 0]])
        raise PerdureError(
            f"the model predicted label {stray}, which is not among the labels that are measured",
            f"measured labels: {', '.join(map(str, ids))}",
        )
    kept = truth >= 0
    pairs = truth[kept] * len(ids) + guess[kept]
    return torch.bincount(pairs, minlength=len(ids) ** 2).reshape(len(ids), len(ids))


def _look_up(table: Tensor, values: Tensor) -> Tensor:
    """Index a table of labels; values outside it give -1."""
    index = values.long()
    found = table[index.clamp(0, TABLE_SIZE - 1)]
    return found.where(index == index.clamp(0, TABLE_SIZE - 1), -1)


class ConfusionMatrix:
    """Confusion counts of one test set.

    Args:
        labels: Global id of each row and column; label 0 comes first, each id once.
        matrix: Int64 ``(K, K)``; zeros if not given.

    Raises:
        PerdureError: The labels or the shape are not as described.
    """

    def __init__(self, labels: tuple[int, ...], matrix: Matrix | None = None) -> None:
        count = len(labels)
        if labels[:1] != (BACKGROUND,) or len(set(labels)) != count or not all(0 <= c < IGNORE for c in labels):
            raise PerdureError(
                f"labels {labels} cannot be counted", f"start with 0, then each class id once, 1 to {IGNORE - 1}"
            )
        if matrix is not None and matrix.shape != (count, count):
            raise PerdureError(f"counts of shape {matrix.shape} do not fit {count} labels")
        self.labels = labels
        self.matrix = np.zeros((count, count), np.int64) if matrix is None else matrix.astype(np.int64)

    @classmethod
    def empty(cls, class_ids: Iterable[int]) -> ConfusionMatrix:
        """Zero counts over label 0 and the given foreground classes."""
        return cls((BACKGROUND, *class_ids))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ConfusionMatrix)
            and self.labels == other.labels
            and np.array_equal(self.matrix, other.matrix)
        )

    __hash__ = None  # type: ignore[assignment]  # counts change while they add up

    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Add a batch; see :func:`confusion` for what is dropped and what is an error."""
        self.add(confusion(labels, predictions, self.labels))

    def add(self, matrix: Tensor) -> None:
        """Add counts of other data over the same labels, e.g. the sum over processes of :func:`confusion`."""
        if tuple(matrix.shape) != self.matrix.shape:
            raise PerdureError(f"counts of shape {tuple(matrix.shape)} do not fit {len(self.labels)} labels")
        self.matrix = self.matrix + matrix.detach().cpu().numpy().astype(np.int64)

    def tensor(self) -> Tensor:
        """Return the counts as a plain int64 tensor ``(K, K)``, a copy; sums over processes are valid counts."""
        import torch

        return torch.from_numpy(self.matrix.copy())

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """Counts of both; labels that only one of them knows are kept."""
        labels = self.labels + tuple(c for c in other.labels if c not in self.labels)
        matrix = np.zeros((len(labels), len(labels)), np.int64)
        for part in (self, other):
            at = [labels.index(c) for c in part.labels]
            matrix[np.ix_(at, at)] += part.matrix
        return ConfusionMatrix(labels, matrix)

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"labels": list(self.labels), "matrix": self.matrix.tolist()}

    @classmethod
    def from_json(cls, value: Any, where: str = "counts") -> ConfusionMatrix:
        """Inverse of :meth:`to_json`. Raises DataError where the value is not square non-negative counts."""
        try:
            labels = tuple(int(c) for c in value["labels"])
            matrix = np.array(value["matrix"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} holds no counts: {error!r}", "the file was changed or is damaged") from error
        if matrix.dtype.kind != "i" or (matrix < 0).any():
            raise DataError(f"{where} holds other things than counts", "the file was changed or is damaged")
        try:
            return cls(labels, matrix)
        except PerdureError as error:
            raise DataError(f"{where}: {error.what}", "the file was changed or is damaged") from error


def pooled(sets: Mapping[str, ConfusionMatrix]) -> ConfusionMatrix:
    """Add the counts of all test sets up. Raises DataError if there is none."""
    parts = list(sets.values())
    if not parts:
        raise DataError("there is no test set to compute figures from")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def write_counts(path: Path, sets: Mapping[str, ConfusionMatrix]) -> None:
    """Write ``counts.json`` atomically: counts by name of the test set, one matrix row a line."""
    blocks = []
    for name, counts in sets.items():
        rows = ",\n   ".join(json.dumps(row) for row in counts.matrix.tolist())
        head = f'  {json.dumps(name, ensure_ascii=False)}: {{"labels": {json.dumps(list(counts.labels))},'
        blocks.append(f'{head} "matrix": [\n   {rows}]}}')
    body = ",\n".join(blocks)
    write_text(
        path, f'{{"version": {VERSION}, "rows": "ground truth", "columns": "prediction", "sets": {{\n{body}\n}}}}\n'
    )


def read_counts(path: Path) -> dict[str, ConfusionMatrix]:
    """Read ``counts.json``. Raises DataError where it is missing, damaged or of another version."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("version") != VERSION or not isinstance(value.get("sets"), dict):
        raise DataError(
            f"{path} is not a counts file of version {VERSION}", "use the version of perdure that made the run"
        )
    return {
        name: ConfusionMatrix.from_json(entry, f"{path}, test set '{name}'") for name, entry in value["sets"].items()
    }
