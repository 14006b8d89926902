"""Figures of single cases: Dice, HD95, ASD and NSD of each class in each measured image.

A case is one measured image (one volume). In a case a class counts where the ground truth or the prediction holds it:
predicted but not there is a Dice of 0, and a class in neither of them says nothing and is left out. Distances between
surfaces are there where the spacing of the case is known in mm, see :mod:`perdure.metrics.surfaces`. Cases are known
by their position in the measured set only, never by a file's name.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError
from perdure.files import write_text
from perdure.labels import BACKGROUND
from perdure.metrics.confusion import ConfusionMatrix

SURFACES: Final = ("hd95", "asd", "nsd")
MEASURES: Final = ("dice", *SURFACES)
COLUMNS: Final = ("set", "case", "class_id", *MEASURES, "truth", "predicted", "both")
_WITHOUT_SURFACES: Final = tuple(name for name in COLUMNS if name not in SURFACES)
"""Columns of runs made before surfaces were measured."""
RESAMPLES: Final = 1000
SEED: Final = 2605
_DIGITS: Final = 6
"""After the point, of statistics: sums in another order, as on another processor, then give the same files."""
_FARTHEST: Final = 1e5
"""Millimetres; no image is 100 m long."""
Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_HINT: Final = "the file was changed or is damaged"


@dataclass(frozen=True)
class CaseCounts:
    """Pixels of each class in each case, and distances between the surfaces.

    Args:
        labels: Global id of each column, label 0 first.
        pixels: Int64 ``(cases, K, 3)``: pixels in the ground truth, in the prediction, and in both.
        surfaces: Float64 ``(cases, K, 3)``: HD95 and ASD in mm, NSD in percent; NaN where there are none.
    """

    labels: tuple[int, ...]
    pixels: Numbers
    surfaces: Floats | None = None


class Spread(NamedTuple):
    """A figure of one class over the cases that show it; ``sd`` (n - 1) is ``None`` for a single case."""

    n: int
    mean: float
    sd: float | None
    least: float
    quartiles: tuple[float, float, float]


class Statistics(NamedTuple):
    """A figure over cases, for each class and, as last entry, for the model; NaN where it does not exist.

    ``n``: cases, ``(K + 1,)``. ``mean``, ``sd`` (n - 1), ``low`` and ``high``, the limits of the 95 % confidence
    interval: ``(K + 1,)``.
    """

    n: Numbers
    mean: Floats
    sd: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class CaseTable:
    """What ``cases.csv`` says.

    Args:
        sets: Name of the test set of each case.
        labels: Global id of each column, in ascending order.
        values: Float64 ``(cases, K, 4)``: what :data:`MEASURES` names; NaN where a class is in neither ground truth
            nor prediction, or was not measured.
        shown: Bool ``(cases, K)``: whether the ground truth holds the class.
    """

    sets: tuple[str, ...]
    labels: tuple[int, ...]
    values: Floats
    shown: npt.NDArray[np.bool_]

    def of(self, measure: str, class_id: int, test: str | None = None) -> Floats:
        """The values of one class, of all cases that have one, or of those of one test set: ``(n,)``."""
        if class_id not in self.labels:
            return np.zeros(0)
        column = self.values[:, self.labels.index(class_id), MEASURES.index(measure)]
        chosen = np.isfinite(column) & np.array([test in (None, name) for name in self.sets], bool)
        found: Floats = column[chosen]
        return found

    def structures(self, test: str) -> frozenset[int]:
        """Classes, without background, that the ground truth of a test set holds anywhere."""
        there = self.shown[np.array([name == test for name in self.sets], bool)].any(0)
        return frozenset(label for label, is_there in zip(self.labels, there, strict=True) if is_there and label)

    def statistics(self, measure: str) -> Statistics:
        """Mean, deviation and confidence interval of each class, in the order of ``labels``, and of the model."""
        return self._statistics[MEASURES.index(measure)]

    @cached_property
    def _statistics(self) -> tuple[Statistics, ...]:
        return tuple(statistics_of(self.values[..., k], self._foreground) for k in range(len(MEASURES)))

    @property
    def _foreground(self) -> npt.NDArray[np.bool_]:
        return np.array([label != BACKGROUND for label in self.labels], bool)


def statistics_of(values: Floats, of_model: npt.NDArray[np.bool_]) -> Statistics:
    """Statistics of a figure over cases.

    The confidence interval is that of the percentile bootstrap (Efron and Tibshirani 1993): cases are drawn with
    replacement, all classes of a case together, :data:`RESAMPLES` times with a fixed seed.

    Args:
        values: ``(cases, K)``, NaN where a case says nothing of a class.
        of_model: ``(K,)`` bool: classes of which the model's figure is the mean. Its deviation is that of the means of
            single cases over their classes.
    """
    count, known = len(values), np.isfinite(values)
    filled = np.where(known, values, 0.0)
    n = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / n
        sd = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(0) / np.where(n > 1, n - 1, 0))
        own = known[:, of_model]
        per_case = filled[:, of_model].sum(1) / own.sum(1)
        per_case = per_case[np.isfinite(per_case)]
        drawn = np.random.default_rng(SEED).integers(0, max(1, count), (RESAMPLES, count))
        places = (drawn + np.arange(RESAMPLES)[:, None] * max(1, count)).ravel()
        weights = np.bincount(places, minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)
        again = (weights @ filled) / (weights @ known.astype(np.float64))  # (RESAMPLES, K), NaN where none was drawn
    again = np.append(again, _mean_of_known(again[:, of_model])[:, None], 1)
    low, high = _limits(again, np.append(n, len(per_case)))
    model_sd = per_case.std(ddof=1) if len(per_case) > 1 else np.nan
    parts = (np.append(mean, _mean_of_known(mean[None, of_model])), np.append(sd, model_sd), low, high)
    return Statistics(np.append(n, len(per_case)), *(part.round(_DIGITS) for part in parts))


def _mean_of_known(values: Floats) -> Floats:
    """Mean of each row ``(R, K)`` over what is no NaN; NaN where all is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, values, 0.0).sum(1) / known.sum(1)
    return mean


def _limits(again: Floats, n: Numbers) -> tuple[Floats, Floats]:
    """2.5th and 97.5th percentile of each column of the resampled means; NaN for less than two cases."""
    low, high = np.full(len(n), np.nan), np.full(len(n), np.nan)
    for column in np.flatnonzero(n > 1):
        means = again[:, column]
        low[column], high[column] = np.percentile(means[np.isfinite(means)], (2.5, 97.5))
    return low, high


def write_cases(path: Path, sets: Mapping[str, CaseCounts]) -> None:
    """Write ``cases.csv`` atomically."""
    write_text(path, to_csv(sets))


def to_csv(sets: Mapping[str, CaseCounts], columns: Sequence[str] = COLUMNS) -> str:
    """Text of ``cases.csv``: a line per set, case and class that ground truth or prediction holds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for name, counts in sets.items():
        surfaces = np.full(counts.pixels.shape, np.nan) if counts.surfaces is None else counts.surfaces
        for case, column in np.argwhere(counts.pixels[..., :2].sum(2) > 0).tolist():
            truth, predicted, both = counts.pixels[case, column].tolist()
            dice = f"{200 * both / (truth + predicted):.4f}"
            distances = ["" if math.isnan(value) else f"{value:.4f}" for value in surfaces[case, column].tolist()]
            measured = [dice, *distances] if "hd95" in columns else [dice]
            writer.writerow([name, case, counts.labels[column], *measured, truth, predicted, both])
    return text.getvalue()


class _Line(NamedTuple):
    """A line of ``cases.csv``; Dice in percent from the pixels, so that it has no rounded digits."""

    test: str
    case: int
    class_id: int
    dice: float
    surfaces: tuple[float, float, float]
    pixels: tuple[int, int, int]


def _read_lines(path: Path) -> tuple[tuple[str, ...], list[_Line]]:
    """Columns and lines. Raises DataError where the file is missing, or a line holds no figures of a case."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            first, *lines = list(csv.reader(stream)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"could not read {path}: {error}") from error
    if tuple(first) not in (COLUMNS, _WITHOUT_SURFACES):
        raise DataError(f"{path} is not a table of cases", f"the first line must be {','.join(COLUMNS)}")
    found = []
    for number, line in enumerate(lines, start=2):
        try:
            test, case, class_id, _, *distances, truth, predicted, both = line
            if len(line) != len(first):
                raise ValueError(f"{len(line)} columns instead of {len(first)}")
            pixels = int(truth), int(predicted), int(both)
            if not 0 <= pixels[2] <= min(pixels[:2]) or not sum(pixels[:2]):
                raise ValueError("more pixels in both than in one of them, or in none")
            hd95, asd, nsd = (float(text) if text else math.nan for text in distances or ("",) * len(SURFACES))
            dice = 200 * pixels[2] / sum(pixels[:2])
            found.append(_Line(test, int(case), int(class_id), dice, _checked(hd95, asd, nsd, pixels), pixels))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}", _HINT) from error
    return tuple(first), found


def _checked(hd95: float, asd: float, nsd: float, pixels: tuple[int, int, int]) -> tuple[float, float, float]:
    """The distances of a line. Raises ValueError where no two structures of so many pixels can have them.

    They cannot be computed again without the images.
    """
    truth, predicted, both = pixels
    if math.isnan(hd95) and math.isnan(asd) and math.isnan(nsd):
        return hd95, asd, nsd
    if not (0 <= hd95 <= _FARTHEST and 0 <= asd <= _FARTHEST and 0 <= nsd <= 100):  # also where one is NaN
        raise ValueError("distances between surfaces that cannot be")
    if not min(truth, predicted) and (nsd != 0 or hd95 != asd):
        raise ValueError("a distance between surfaces of which one does not exist")
    if truth == predicted == both and (hd95, asd, nsd) != (0, 0, 100):
        raise ValueError("a distance between surfaces that are the same")
    return hd95, asd, nsd


def read_cases(path: Path) -> CaseTable:
    """Read ``cases.csv``.

    Raises:
        DataError: The file is missing, or a line holds no figures of a case.
    """
    lines = _read_lines(path)[1]
    cases = list(dict.fromkeys((line.test, line.case) for line in lines))
    labels = tuple(sorted({line.class_id for line in lines}))
    row, column = ({key: k for k, key in enumerate(keys)} for keys in (cases, labels))
    values = np.full((len(cases), len(labels), len(MEASURES)), np.nan)
    shown = np.zeros(values.shape[:2], bool)
    for line in lines:
        place = row[line.test, line.case], column[line.class_id]
        values[place], shown[place] = (line.dice, *line.surfaces), line.pixels[0] > 0
    return CaseTable(tuple(test for test, _ in cases), labels, values, shown)


def problem_of(path: Path, counts: Mapping[str, ConfusionMatrix]) -> str | None:
    """What a ``cases.csv`` holds besides the pixels of the counts, in words; ``None`` if nothing. For the audit.

    Raises:
        DataError: It cannot be read, or holds distances that cannot be.
    """
    columns, lines = _read_lines(path)
    places = {name: {label: k for k, label in enumerate(one.labels)} for name, one in counts.items()}
    found = {
        name: CaseCounts(
            one.labels,
            np.zeros((one.cases, len(one.labels), 3), np.int64),
            np.full((one.cases, len(one.labels), 3), np.nan),
        )
        for name, one in counts.items()
    }
    for line in lines:
        test, case, class_id = line[:3]
        if test not in counts or not 0 <= case < counts[test].cases or class_id not in places[test]:
            where = f"case {str(case)[:20]} of set '{test[:20]}' and class {str(class_id)[:20]}"
            return f"holds {where}, which was not counted"
        found[test].pixels[case, places[test][class_id]] = line.pixels
        surfaces = found[test].surfaces
        assert surfaces is not None
        surfaces[case, places[test][class_id]] = line.surfaces
    if to_csv(found, columns) != path.read_text(encoding="utf-8"):
        return "is not as it was written"
    for name, one in counts.items():
        sums = np.stack([one.truth, one.matrix.sum(0), one.matrix.diagonal()], 1)
        if (found[name].pixels.sum(0) != sums).any():
            return "its pixels do not add up to those of counts.json"
        if problem := _problem_of_surfaces(found[name]):
            return problem
    return None


def _problem_of_surfaces(counts: CaseCounts) -> str | None:
    """What is wrong with the distances of a set: they are of all classes of a case, or of none, never of label 0."""
    assert counts.surfaces is not None
    shown, known = counts.pixels[..., :2].sum(2) > 0, np.isfinite(counts.surfaces[..., 0])
    if known[:, 0].any():
        return "holds distances between surfaces of label 0, which are not measured"
    partly = known.any(1) & (known[:, 1:] != shown[:, 1:]).any(1)
    if partly.any():
        return f"holds distances between surfaces of some of the classes of case {int(np.argmax(partly))} only"
    # where one of two structures is missing the distance is the diagonal of the image: one number per case
    alone = known & (counts.pixels[..., :2].min(2) == 0)
    for case in np.flatnonzero(alone.any(1)).tolist():
        if len(set(counts.surfaces[case, alone[case], 0].tolist())) > 1:
            return f"holds two different diagonals of case {case}"
    return None


def spread(values: Sequence[float] | Floats) -> Spread:
    """Mean, standard deviation and quartiles of at least one value."""
    values = np.asarray(values, np.float64)
    low, middle, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return Spread(len(values), float(values.mean()), sd, float(values.min()), (low, middle, high))
