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
MOST = 2.0**53
"""Pixels of a test set: more cannot be counted exactly, and far fewer will ever be."""
VERSION: Final = 2


def confusion(labels: Tensor, predictions: Tensor, ids: tuple[int, ...], annotated: Tensor | None = None) -> Tensor:
    """Count pairs of ground truth and prediction.

    A case that does not label a class says nothing about it: its background may be that class. Where the model
    predicts such a class on background, the pixel is dropped; where it predicts it on the label of another class,
    that is an error of the labelled class and goes to the last column, so that it is no error of the other.

    Args:
        labels: Ground truth ``(N, *S)`` in global ids, any integer type. Labels that are not in ``ids`` are
            dropped: ignore and classes that are not asked for (STAR, spec 1.7).
        predictions: Global ids, same shape.
        ids: Which label stands in which row and column.
        annotated: ``(N, TABLE_SIZE)`` bool: labels that each case can tell; ``None`` if all cases tell all.

    Returns:
        Int64 ``(K, K + 1)`` on the device of ``labels``, K = len(ids). Counts of parts of the data add up.

    Raises:
        PerdureError: The shapes differ, or a prediction is not in ``ids``.
    """
    return tally(*paired(labels, predictions, ids, annotated), len(ids))


def paired(
    labels: Tensor, predictions: Tensor, ids: tuple[int, ...], annotated: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ground truth and prediction as rows and columns of the counts; arguments and errors as in :func:`confusion`.

    Returns:
        Two int64 tensors ``(N, *S)``: the row of each pixel, -1 where it is dropped, and its column, ``len(ids)`` where
        a class was predicted that the case does not label.
    """
    import torch

    if labels.shape != predictions.shape:
        raise PerdureError(f"ground truth is {tuple(labels.shape)} but the prediction is {tuple(predictions.shape)}",
                           "predict at the size of the labels")  # fmt: skip
    count = len(ids)
    # one entry more than there are labels: numbers that are no label at all are looked up there
    table = torch.full((TABLE_SIZE + 1,), -1, dtype=torch.int64, device=labels.device)
    table[list(ids)] = torch.arange(count, device=labels.device)
    truth, guess = (table[_index(values)] for values in (labels, predictions))
    if bool((guess < 0).any()):
        stray = int(predictions[guess < 0][0])
        raise PerdureError(
            f"the model predicted label {stray}, which is not among the labels that are measured",
            f"measured labels: {', '.join(map(str, ids))}",
        )
    if annotated is not None:
        known = annotated[:, list(ids)]  # (N, K); a truth of -1 looks up the last one, which changes nothing
        guess = guess.where(known.gather(1, guess.flatten(1)).view_as(guess), count)
        dropped = (truth == 0) & (guess == count) | ~known.gather(1, truth.clamp_min(0).flatten(1)).view_as(truth)
        truth = truth.masked_fill(dropped, -1)
    return truth, guess


def tally(truth: Tensor, guess: Tensor, count: int) -> Tensor:
    """Count the pairs of :func:`paired` over ``count`` labels: int64 ``(K, K + 1)``."""
    import torch

    kept = truth >= 0
    pairs = truth[kept] * (count + 1) + guess[kept]
    return torch.bincount(pairs, minlength=count * (count + 1)).reshape(count, count + 1)


def _index(values: Tensor) -> Tensor:
    """Labels as indices of a table with one entry more than there are labels, for whatever is no label."""
    index = values.long()
    return index.where((index >= 0) & (index < TABLE_SIZE), TABLE_SIZE)


class ConfusionMatrix:
    """Confusion counts of one test set.

    Args:
        labels: Global id of each row and column; label 0 comes first, each id once.
        matrix: Int64 ``(K, K)``; zeros if not given.
        elsewhere: Int64 ``(K,)``: pixels of each class for which a class was predicted that their case does not
            label; zeros if not given. They count as missed, see :func:`confusion`.
        cases: Number of cases that were counted.
        annotated: Classes that the test set labels; ``None`` if all that it shows.

    Raises:
        PerdureError: The labels or the shape are not as described.
    """

    def __init__(
        self,
        labels: tuple[int, ...],
        matrix: Matrix | None = None,
        elsewhere: Matrix | None = None,
        cases: int = 0,
        annotated: frozenset[int] | None = None,
    ) -> None:
        count = len(labels)
        if labels[:1] != (BACKGROUND,) or len(set(labels)) != count or not all(0 <= c < IGNORE for c in labels):
            raise PerdureError(
                f"labels {labels} cannot be counted", f"start with 0, then each class id once, 1 to {IGNORE - 1}"
            )
        self.labels, self.cases, self.annotated = labels, cases, annotated
        self.matrix = np.zeros((count, count), np.int64) if matrix is None else matrix.astype(np.int64)
        self.elsewhere = np.zeros(count, np.int64) if elsewhere is None else elsewhere.astype(np.int64)
        if self.matrix.shape != (count, count) or self.elsewhere.shape != (count,):
            raise PerdureError(f"counts of shape {self.matrix.shape} do not fit {count} labels")

    @classmethod
    def empty(cls, class_ids: Iterable[int]) -> ConfusionMatrix:
        """Zero counts over label 0 and the given foreground classes."""
        return cls((BACKGROUND, *class_ids))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfusionMatrix) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # counts change while they add up

    @property
    def truth(self) -> Matrix:
        """Pixels of each class in the ground truth ``(K,)``."""
        pixels: Matrix = self.matrix.sum(1) + self.elsewhere
        return pixels

    def without_background(self) -> ConfusionMatrix:
        """The same counts as if pixels of label 0 were ignored ones. What was predicted as label 0 stays an error."""
        matrix, elsewhere = self.matrix.copy(), self.elsewhere.copy()
        matrix[0], elsewhere[0] = 0, 0
        return ConfusionMatrix(self.labels, matrix, elsewhere, self.cases, self.annotated)

    def update(self, labels: Tensor, predictions: Tensor, annotated: Tensor | None = None) -> None:
        """Add a batch; see :func:`confusion` for what is dropped and what is an error."""
        self.add(confusion(labels, predictions, self.labels, annotated))

    def add(self, counted: Tensor) -> None:
        """Add counts ``(K, K + 1)`` of other data, e.g. the sum over processes of :func:`confusion`."""
        if tuple(counted.shape) != (len(self.labels), len(self.labels) + 1):
            raise PerdureError(f"counts of shape {tuple(counted.shape)} do not fit {len(self.labels)} labels")
        added = counted.detach().cpu().numpy().astype(np.int64)
        self.matrix, self.elsewhere = self.matrix + added[:, :-1], self.elsewhere + added[:, -1]

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """Counts of both; labels that only one of them knows are kept."""
        labels = self.labels + tuple(c for c in other.labels if c not in self.labels)
        total = ConfusionMatrix(labels, cases=self.cases + other.cases)
        if self.annotated is not None and other.annotated is not None:
            total.annotated = self.annotated | other.annotated
        for part in (self, other):
            at = [labels.index(c) for c in part.labels]
            total.matrix[np.ix_(at, at)] += part.matrix
            total.elsewhere[at] += part.elsewhere
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "labels": list(self.labels),
            "cases": self.cases,
            "annotated": None if self.annotated is None else sorted(self.annotated),
            "elsewhere": self.elsewhere.tolist(),
            "matrix": self.matrix.tolist(),
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "counts") -> ConfusionMatrix:
        """Inverse of :meth:`to_json`. Raises DataError where the value is not square non-negative counts."""
        try:
            labels = tuple(int(c) for c in value["labels"])
            annotated = None if value["annotated"] is None else frozenset(int(c) for c in value["annotated"])
            matrix, elsewhere, cases = np.array(value["matrix"]), np.array(value["elsewhere"]), int(value["cases"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = "lacks numbers, has others in their place, or rows of different lengths"
            raise DataError(f"{where} holds no counts: it {what}", "the file was changed or is damaged") from error
        if any(part.dtype.kind != "i" or (part < 0).any() for part in (matrix, elsewhere)) or cases < 0:
            raise DataError(f"{where} holds other things than counts", "the file was changed or is damaged")
        if max(float(matrix.sum(dtype=float)), float(elsewhere.sum(dtype=float)), float(cases)) > MOST:
            raise DataError(f"{where} holds numbers too large for counts", "the file was changed or is damaged")
        try:
            return cls(labels, matrix, elsewhere, cases, annotated)
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
        plain = counts.to_json()
        rows = ",\n   ".join(json.dumps(row) for row in plain.pop("matrix"))
        head = json.dumps(plain)[:-1]
        blocks.append(f'  {json.dumps(name, ensure_ascii=False)}: {head},\n   "matrix": [\n   {rows}]}}')
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
