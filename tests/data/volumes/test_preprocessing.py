"""Volumes are prepared as by nnU-Net, and scores find the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.data.case import Case, Geometry
from perdure.data.volumes.extra import need
from perdure.data.volumes.options import VolumeOptions
from perdure.data.volumes.plan import plan_volumes
from perdure.data.volumes.preprocessing import Volume3D, region
from perdure.errors import DataError
from perdure.inference.case import predict_cases
from perdure.methods.prediction import Prediction

from .conftest import Volumes, ellipsoid

SHAPES: dict[str, dict[str, Any]] = {
    "anisotropic": {"size": (9, 30, 26), "spacing": (4.0, 0.8, 0.9)},
    "cut and two channels": {"size": (18, 26, 22), "border": 4, "channels": 2},
    "turned": {"size": (26, 12, 30), "spacing": (0.7, 3.5, 0.7), "border": 2},
    "mild": {"size": (20, 21, 22), "spacing": (1.3, 1.0, 1.1)},
}


def written(case: Case, folder: Path) -> tuple[list[str], str]:
    """A case as NIfTI files whose array, read by nnU-Net, is the case's again."""
    nibabel = need("nibabel")
    affine = np.diag([*case.geometry.spacing[::-1], 1.0])
    files = []
    for channel, image in enumerate(case.image.numpy()):
        files.append(str(folder / f"{case.group.replace(' ', '')}_{channel:04d}.nii.gz"))
        nibabel.save(nibabel.Nifti1Image(image.transpose(2, 1, 0), affine), files[-1])
    label = str(folder / f"{case.group.replace(' ', '')}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(case.label.numpy().transpose(2, 1, 0), affine), label)
    return files, label


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_arrays_are_nnunets_where_it_resamples(
    shape: dict[str, Any], phantoms: Callable[..., Volumes], tmp_path: Path
) -> None:
    source = phantoms(2, **shape)
    near = replace(source.cases[1], geometry=Geometry(tuple(1.4 * s for s in source.cases[1].geometry.spacing), "mm"))
    plan = plan_volumes(replace(source, cases=[source.cases[0], near]), VolumeOptions(patch=(8, 16, 16)))
    manager = need("nnunetv2.utilities.plans_handling.plans_handler").PlansManager(
        {**plan.nnunet_plans(), "image_reader_writer": "NibabelIOWithReorient"}
    )
    worker = need("nnunetv2.preprocessing.preprocessors.default_preprocessor").DefaultPreprocessor(verbose=False)
    declared = {"labels": {"background": 0, "front": 1, "back": 2}}
    for case in (source.cases[0], near):
        files, label = written(case, tmp_path)
        # the spacing of the file is float32
        zooms = [float(np.float32(s)) for s in case.geometry.spacing]
        data, seg, found = worker.run_case(files, label, manager, manager.get_configuration("3d_fullres"), declared)
        ready = plan.ready(replace(case, geometry=Geometry(tuple(zooms), "mm")))
        assert data.shape[1:] != case.image.shape[1:]
        assert np.array_equal(ready.image, data) and np.array_equal(ready.label, seg[0])
        assert np.array_equal(ready.places[2], found["class_locations"][2][:, 1:])
        shown = plan.show(replace(case, geometry=Geometry(tuple(zooms), "mm")))
        assert np.array_equal(shown.image.numpy(), data)


def by_value(images: Tensor) -> Prediction:
    """Scores of background, front and back from the intensity, which a z-score has turned into about -1, 0.5, 2."""
    value = images[:, 0]
    low, high = value.amin(), value.amax()
    level = (value - low) / (high - low)
    return Prediction.dense(torch.stack([-(level - at).abs() for at in (0.15, 0.5, 0.85)], 1), [0, 1, 2])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("target", [None, (1.6, 1.3, 1.2)])
def test_labels_come_back_to_the_raw_grid(
    shape: dict[str, Any], target: tuple[float, float, float] | None, phantoms: Callable[..., Volumes]
) -> None:
    """Dice of the labels that the intensities tell, through preparation and back, on the grid of the file."""
    source = phantoms(1, **shape)
    case = source.cases[0]
    clean = replace(case, image=(1 + case.label.float()).where(case.image[0] != 0, 0.0)[None].expand_as(case.image))
    plan = plan_volumes(replace(source, cases=[clean]), VolumeOptions(spacing=target, patch=(16, 16, 16)))
    ready = plan.model_copy(update={"window": None}).test(clean)
    assert (ready.grid is not None and ready.image.shape[1:] != case.image.shape[1:]) or target is None
    found = predict_cases(by_value, ready.image[None], plan.model_copy(update={"window": None}), ready.grid).labels[0]
    assert found.shape == case.label.shape == ready.label.shape
    for structure in (1, 2):
        ours, true = found == structure, case.label == structure
        assert 2 * (ours & true).sum() / (ours.sum() + true.sum()) > (0.99 if target is None else 0.8)
    if shape.get("border"):
        edge = shape["border"]
        assert ready.grid.box[0] == (edge, shape["size"][0] - edge)
        assert not found[:edge].any()


def plan_of(case: Case, **settings: Any) -> Volume3D:
    return plan_volumes(Volumes([case]), VolumeOptions(**{"patch": (8, 8, 8), **settings}))


def test_samples_are_drawn_from_a_raw_case_too() -> None:
    case = ellipsoid(1)
    plan = plan_of(case, augment="none", foreground=1.0)
    torch.manual_seed(5)
    sample = plan.train(case)
    assert sample.image.shape == (1, 8, 8, 8) and sample.label.shape == (8, 8, 8)
    assert sample.label.dtype == torch.int64 and sample.label[4, 4, 4] > 0


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (ellipsoid(0, channels=2), "'patient 0' has 2 channels, and 1 are needed"),
        (ellipsoid(0, (20, 20), (1.0, 1.0)), "'patient 0' has 2 axes, and images of 3 axes are needed"),
        (
            ellipsoid(0, (200, 1, 1), (1.0, 0.01, 1.0)),
            "'patient 0' would have 100 × 0 × 1 voxels at the plan's spacing",
        ),
        (ellipsoid(0, (20, 20, 20), (1e6, 1.0, 1.0)), "'patient 0' has voxels of 1e+06 × 1 × 1 mm"),
        (replace(ellipsoid(0), image=ellipsoid(0).image * torch.nan), "no numbers (NaN or infinite)"),
    ],
    ids=["channels", "axes", "too thin", "spacing", "nan"],
)
def test_cases_that_cannot_be_prepared_are_told(case: Case, words: str) -> None:
    plan = plan_of(ellipsoid(3))
    for prepare in (plan.show, plan.ready):
        with pytest.raises(DataError) as told:
            prepare(case)
        assert words in told.value.what and told.value.hint


def test_a_volume_larger_than_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ellipsoid(0)
    plan = plan_of(case)
    monkeypatch.setattr("perdure.data.volumes.preprocessing.free_memory", lambda: 400_000)
    with pytest.raises(DataError) as told:
        plan.show(replace(case, name=""))
    assert told.value.what == (
        "the image would have 18 × 26 × 22 voxels at the plan's spacing of 2 × 1 × 1 mm, and needs 0.0 GB of memory"
    )


def test_a_volume_of_zeros_and_one_of_a_single_value_are_prepared() -> None:
    case = ellipsoid(0)
    plan = plan_of(case)
    for value in (0.0, 7.0):
        shown = plan.show(replace(case, image=torch.full_like(case.image, value)))
        assert torch.isfinite(shown.image).all() and shown.image.shape == plan.show(case).image.shape


def test_regions_reach_beyond_the_array() -> None:
    array = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    box = region(array, (-1, 4), (3, 4), -9.0)
    assert box[0].tolist() == [[-9] * 4, [4, 5, -9, -9], [10, 11, -9, -9]]
    assert (region(array, (7, 7), (2, 2), 0.0) == 0).all()
