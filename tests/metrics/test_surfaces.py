"""Distances between surfaces: equal to MONAI's of the whole images, and the rules for what is missing or unlabelled."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.data.case import Case, Geometry
from perdure.data.dataset import Dataset
from perdure.data.preparation import Photo2D, Preparation
from perdure.data.source import Source
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.errors import UsageError
from perdure.labels import IGNORE, TABLE_SIZE, label_space
from perdure.methods.prediction import Prediction
from perdure.metrics.cases import read_cases, write_cases
from perdure.metrics.confusion import paired
from perdure.metrics.evaluate import Counted, count
from perdure.metrics.surfaces import in_mm, surface_figures

pytest.importorskip("monai")
SPACING = (2.5, 0.7, 1.1)
COUNT = 6


def ball(shape: Sequence[int], centre: Sequence[float], radius: float) -> Tensor:
    grid = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) < radius**2  # type: ignore[return-value]


def volumes() -> tuple[Tensor, Tensor]:
    """Balls and where a model saw them.

    1 is moved, 2 touches the edge and has a far speck, 3 is missed, 4 made up, 5 in neither.
    """
    shape = (12, 30, 26)
    truth, guess = torch.zeros(2, *shape, dtype=torch.int64)
    truth[ball(shape, (5, 9, 9), 4.5)], guess[ball(shape, (6, 10, 9), 4)] = 1, 1
    truth[ball(shape, (9, 25, 20), 5)], guess[ball(shape, (9, 24, 21), 5)] = 2, 2
    guess[0, 0, 0] = 2
    truth[1, 20:23, 3:6] = 3
    guess[11, 3:5, 22:25] = 4
    return truth, guess


def monai_figures(truth: Tensor, guess: Tensor, spacing: Sequence[float], tolerance: float) -> np.ndarray:
    """MONAI's own three functions of the whole volume, ``(COUNT - 1, 3)``."""
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    one, other = (torch.nn.functional.one_hot(v, COUNT).movedim(-1, 0)[None].float() for v in (guess, truth))
    steps = list(spacing)
    hd95 = compute_hausdorff_distance(one, other, percentile=95, spacing=steps)[0]
    asd = compute_average_surface_distance(one, other, symmetric=True, spacing=steps)[0]
    nsd = compute_surface_dice(one, other, [tolerance] * (COUNT - 1), spacing=steps)[0]
    return torch.stack([hd95, asd, 100 * nsd], 1).numpy()


@pytest.mark.filterwarnings("ignore:the (ground truth|prediction) of class")
@pytest.mark.parametrize("tolerance", [0.7, 2.0])
@pytest.mark.parametrize("axes", [2, 3])
def test_a_box_around_a_structure_gives_what_the_whole_volume_gives(axes: int, tolerance: float) -> None:
    truth, guess = volumes()
    spacing = SPACING[-axes:]
    if axes == 2:
        truth, guess = truth[8], guess[8]
    found, wanted = (
        surface_figures(truth, guess, COUNT, spacing, tolerance),
        monai_figures(truth, guess, spacing, tolerance),
    )
    both = [c for c in range(1, COUNT) if (truth == c).any() and (guess == c).any()]
    assert both == [1, 2]
    for c in both:
        assert found[c] == pytest.approx(wanted[c - 1], rel=1e-5)
    assert axes == 2 or 0 < found[1, 2] < 100
    assert 0 < found[1, 1] < found[1, 0]


def test_what_only_one_of_them_holds_counts_the_diagonal_of_the_image() -> None:
    truth, guess = volumes()
    found = surface_figures(truth, guess, COUNT, SPACING, 2)
    diagonal = math.sqrt((12 * 2.5) ** 2 + (30 * 0.7) ** 2 + (26 * 1.1) ** 2)
    for c in (3, 4):
        assert found[c] == pytest.approx([diagonal, diagonal, 0])
    assert np.isnan(found[[0, 5]]).all()  # label 0 has no surface, class 5 is in neither
    assert surface_figures(truth, truth, COUNT, SPACING, 2)[1].tolist() == [0, 0, 100]


def test_a_distance_by_hand() -> None:
    """Two single voxels, three steps of 2.5 mm and four of 0.7 mm apart."""
    truth, guess = torch.zeros(2, 8, 8, 8, dtype=torch.int64)
    truth[1, 1, 1], guess[4, 5, 1] = 1, 1
    away = math.hypot(3 * 2.5, 4 * 0.7)
    for tolerance, near in ((away + 0.01, 100), (away - 0.01, 0)):
        assert surface_figures(truth, guess, 2, SPACING, tolerance)[1] == pytest.approx([away, away, near], rel=1e-6)


@pytest.mark.parametrize(
    ("geometry", "axes", "known"),
    [
        (Geometry((1.0, 2.0, 3.0), "mm"), 3, True),
        (Geometry((1.0, 2.0), "mm"), 2, True),
        (Geometry((1.0, 1.0), "px"), 2, False),
        (Geometry(), 2, False),
        (Geometry((1.0, 2.0, 3.0), "mm"), 2, False),
        (Geometry((1.0, 0.0), "mm"), 2, False),
        (Geometry((1.0, math.nan), "mm"), 2, False),
    ],
)
def test_where_distances_can_be_given(geometry: Geometry, axes: int, known: bool) -> None:
    assert in_mm(geometry, axes) == known


class Scans(Source):
    """Volumes whose first channel says what the model is to predict; the last one has no spacing in mm."""

    name, kind, patients, other_label = "scans", "segmentation", True, 0
    space = label_space(["liver", "kidney", "spleen", "cyst", "stone"])
    annotated: frozenset[int] | None = None

    def names(self, split: str) -> list[str]:
        return ["Jane Doe", "John Doe", "photograph"]

    def image(self, split: str, name: str) -> np.ndarray:
        return volumes()[1].numpy()[None].astype(np.float32)

    def mask(self, split: str, name: str) -> np.ndarray:
        mask = volumes()[0].numpy().astype(np.int16)
        if name == "John Doe":
            mask[:, :8] = IGNORE
        return mask

    def fingerprint(self, split: str) -> str:
        return "scans"

    def read(self, split: str, name: str) -> Case:
        image, mask = torch.from_numpy(self.image(split, name)), torch.from_numpy(self.mask(split, name))
        geometry = Geometry(SPACING, "mm") if name != "photograph" else Geometry((1.0,) * 3, "px")
        return Case(image, mask, name, self.annotated, geometry)


def measured(annotated: frozenset[int] | None = None, tolerance: float | None = 2.0) -> Counted:
    source = Scans()
    source.annotated = annotated
    table = np.arange(TABLE_SIZE, dtype=np.int16)
    dataset = Dataset(source, "test", tuple(source.names("test")), table, Preparation(dims=3, channels=1))
    machine = Machine(EngineOptions(device="cpu", trackers=()))

    def says(images: Tensor) -> Prediction:
        return Prediction.dense(
            torch.stack([(images[:, 0] == c).float() for c in range(COUNT)], 1), tuple(range(COUNT))
        )

    return count(says, dataset, tuple(range(1, COUNT)), machine, 2, 0, tolerance)


def test_every_case_in_mm_is_measured_and_recorded_without_its_name(tmp_path: Path) -> None:
    cases = measured().cases
    assert cases is not None and cases.surfaces is not None
    truth, guess = volumes()
    wanted = surface_figures(truth, guess, COUNT, SPACING, 2)
    assert np.array_equal(cases.surfaces[0], wanted, equal_nan=True)
    assert np.isnan(cases.surfaces[2]).all()  # no spacing in mm: Dice only
    # ignored pixels are in no structure, of the ground truth or of the prediction
    seen = truth.clone()
    seen[:, :8] = IGNORE
    pairs = paired(seen[None], guess[None], tuple(range(COUNT)))
    assert (pairs[0] < 0).sum() == 12 * 8 * 26
    cut_truth, cut_guess = (torch.where(seen == IGNORE, 0, v) for v in (truth, guess))
    assert np.array_equal(cases.surfaces[1], surface_figures(cut_truth, cut_guess, COUNT, SPACING, 2), equal_nan=True)
    write_cases(tmp_path / "cases.csv", {"test": cases})
    found = read_cases(tmp_path / "cases.csv")
    assert found.of("hd95", 1) == pytest.approx(cases.surfaces[:2, 1, 0], abs=1e-4)
    assert len(found.of("dice", 1)) == 3
    assert "Doe" not in (tmp_path / "cases.csv").read_text()


def test_a_class_that_a_case_does_not_label_has_no_surface_there() -> None:
    cases = measured(frozenset({1, 2, 3})).cases
    assert cases is not None and cases.surfaces is not None
    assert np.isnan(cases.surfaces[:, 4:]).all()  # class 4 is predicted where nobody looked for it
    assert np.isfinite(cases.surfaces[:2, 1:3]).all()
    whole = measured().cases
    assert whole is not None and whole.surfaces is not None
    assert np.array_equal(cases.surfaces[0, 1:4], whole.surfaces[0, 1:4])


def test_a_large_volume_is_counted_some_slices_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(frozenset({1, 2, 3}))
    monkeypatch.setattr("perdure.metrics.evaluate.PIXELS_AT_ONCE", 2 * 30 * 26 + 5)
    slices = measured(frozenset({1, 2, 3}))
    assert slices.matrix == whole.matrix
    assert slices.cases is not None and whole.cases is not None
    assert np.array_equal(slices.cases.pixels, whole.cases.pixels)
    assert slices.cases.surfaces is not None and whole.cases.surfaces is not None
    assert np.array_equal(slices.cases.surfaces, whole.cases.surfaces, equal_nan=True)


def test_validation_measures_no_surfaces() -> None:
    cases = measured(tolerance=None).cases
    assert cases is not None and cases.surfaces is not None and np.isnan(cases.surfaces).all()


def test_the_spacing_of_an_image_that_was_scaled_is_not_known() -> None:
    case = Case(
        torch.zeros(3, 20, 30), torch.zeros(20, 30, dtype=torch.int16), "a", geometry=Geometry((1.0, 1.0), "mm")
    )
    assert Photo2D(patch=(8, 8)).test(case).geometry == case.geometry
    assert Photo2D(patch=(8, 8), size=10, protocol="centre_crop").test(case).geometry == Geometry()


def test_a_missing_package_is_a_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(UsageError, match="reading volumes needs the extra 'volumes'"):
        surface_figures(*volumes(), COUNT, SPACING, 2)
