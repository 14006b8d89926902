"""Dice of single cases: how much a class's figure differs from one measured image to the next.

A case is one measured image (one volume). In a case a class counts where the ground truth or the prediction holds it:
predicted but not there is a Dice of 0, and a class in neither of them says nothing and is left out. Cases are known by
their position in the measured set only, never by a file's name.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError
from perdure.files import write_text
from perdure.metrics.confusion import ConfusionMatrix

COLUMNS: Final = ("set", "case", "class_id", "dice", "truth", "predicted", "both")
Numbers = npt.NDArray[np.int64]
_HINT: Final = "the file was changed or is damaged"


@dataclass(frozen=True)
class CaseCounts:
    """Pixels of each class in each case.

    Args:
        labels: Global id of each column, label 0 first.
        pixels: Int64 ``(cases, K, 3)``: pixels in the ground truth, in the prediction, and in both.
    """

    labels: tuple[int, ...]
    pixels: Numbers


@dataclass(frozen=True)
class Spread:
    """Dice of one class over the cases that show it, in percent; ``sd`` (n - 1) is ``None`` for a single case."""

    n: int
    mean: float
    sd: float | None
    least: float
    quartiles: tuple[float, float, float]


def write_cases(path: Path, sets: Mapping[str, CaseCounts]) -> None:
    """Write ``cases.csv`` atomically."""
    write_text(path, to_csv(sets))


def to_csv(sets: Mapping[str, CaseCounts]) -> str:
    """Text of ``cases.csv``: a line per set, case and class that ground truth or prediction holds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, counts in sets.items():
        for case, column in np.argwhere(counts.pixels[..., :2].sum(2) > 0).tolist():
            truth, predicted, both = counts.pixels[case, column].tolist()
            dice = 200 * both / (truth + predicted)
            writer.writerow([name, case, counts.labels[column], f"{dice:.4f}", truth, predicted, both])
    return text.getvalue()


def problem_of(path: Path, counts: Mapping[str, ConfusionMatrix]) -> str | None:
    """What a ``cases.csv`` holds besides the pixels of the counts, in words; ``None`` if nothing. For the audit.

    Raises:
        DataError: It cannot be read.
    """
    read_dice(path)  # raises for a line that is none
    text = path.read_text(encoding="utf-8")
    places = {name: {label: k for k, label in enumerate(one.labels)} for name, one in counts.items()}
    found = {name: np.zeros((one.cases, len(one.labels), 3), np.int64) for name, one in counts.items()}
    for name, case, class_id, _, *pixels in list(csv.reader(io.StringIO(text)))[1:]:
        if name not in counts or not 0 <= int(case) < counts[name].cases or int(class_id) not in places[name]:
            return f"holds case {case[:20]} of set '{name[:20]}' and class {class_id[:20]}, which was not counted"
        found[name][int(case), places[name][int(class_id)]] = [int(value) for value in pixels]
    if to_csv({name: CaseCounts(one.labels, found[name]) for name, one in counts.items()}) != text:
        return "is not as it was written"
    for name, one in counts.items():
        sums = np.stack([one.truth, one.matrix.sum(0), one.matrix.diagonal()], 1)
        if (found[name].sum(0) != sums).any():
            return "its pixels do not add up to those of counts.json"
    return None


def read_dice(path: Path) -> dict[int, list[float]]:
    """Dice in percent of each class in each case of ``cases.csv``, all sets together.

    It is computed from the pixels, so that it has no rounded digits.

    Raises:
        DataError: The file is missing, or a line holds no counts of a case.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            first, *lines = list(csv.reader(stream)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"could not read {path}: {error}") from error
    if tuple(first) != COLUMNS:
        raise DataError(f"{path} is not a table of cases", f"the first line must be {','.join(COLUMNS)}")
    found: dict[int, list[float]] = {}
    for number, line in enumerate(lines, start=2):
        try:
            _, _, class_id, _, truth, predicted, both = line
            pixels = int(truth), int(predicted), int(both)
            if not 0 <= pixels[2] <= min(pixels[:2]) or not sum(pixels[:2]):
                raise ValueError("more pixels in both than in one of them, or in none")
            found.setdefault(int(class_id), []).append(200 * pixels[2] / sum(pixels[:2]))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}", _HINT) from error
    return found


def spread(dice: Sequence[float]) -> Spread:
    """Mean, standard deviation and quartiles of at least one value."""
    values = np.asarray(dice, np.float64)
    low, middle, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return Spread(len(values), float(values.mean()), sd, float(values.min()), (low, middle, high))
