"""Plans are nnU-Net's own; what a later data set lacks is told in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from perdure.data.case import Case, Geometry
from perdure.data.preparation import read_preparation
from perdure.data.source import Source
from perdure.data.volumes.extra import need, nnunet_folders, quiet
from perdure.data.volumes.options import CHANNEL_NAME, VolumeOptions, kept_channels
from perdure.data.volumes.plan import IN_WORDS, misfit, plan_slices, plan_volumes
from perdure.data.volumes.preprocessing import Scheme, Volume3D, fit_patch
from perdure.errors import DataError, UsageError
from perdure.labels import IGNORE

from .conftest import Volumes, ellipsoid

PLAIN = VolumeOptions(normalisation="zscore")
CASES = 8


@pytest.fixture
def few_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intensities from fewer draws: those of nnU-Net take seconds and a gigabyte."""
    monkeypatch.setattr("perdure.data.volumes.plan.FOREGROUND_VOXELS", 10_000)


def read_all(folder: Path) -> Volumes:
    """Some cases of a raw folder, read by nnU-Net's own reader."""
    reader = need("nnunetv2.imageio.simpleitk_reader_writer").SimpleITKIO()
    cases = []
    for file in sorted((folder / "labelsTr").iterdir())[:CASES]:
        name = file.name.removesuffix(".nii.gz")
        image, found = reader.read_images((str(folder / "imagesTr" / f"{name}_0000.nii.gz"),))
        label = torch.from_numpy(reader.read_seg(str(file))[0][0].astype(np.int16))
        spacing = tuple(float(value) for value in found["spacing"])
        cases.append(Case(torch.from_numpy(image), label, name, geometry=Geometry(spacing, "mm"), group=name))
    return Volumes(cases)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], dict[str, Any]]:
    """What nnU-Net itself plans for the same files, where their channel has a name."""
    root = tmp_path_factory.mktemp("nnunet")
    extraction = need("nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor")
    planning = need("nnunetv2.experiment_planning.experiment_planners.default_experiment_planner")

    def plans(raw: Path, channel: str) -> dict[str, Any]:
        names = sorted(file.name.removesuffix(".nii.gz") for file in (raw / "labelsTr").iterdir())[:CASES]
        files = {
            name: {
                "images": [str(raw / "imagesTr" / f"{name}_0000.nii.gz")],
                "label": str(raw / "labelsTr" / f"{name}.nii.gz"),
            }
            for name in names
        }
        declared = json.loads((raw / "dataset.json").read_text())
        declared |= {"numTraining": CASES, "dataset": files, "channel_names": {"0": channel}}
        (root / raw.name).mkdir(exist_ok=True)
        (root / raw.name / "dataset.json").write_text(json.dumps(declared))
        with nnunet_folders(root), quiet():
            os.environ.update(nnUNet_preprocessed=str(root / "prepared"))  # put back with the others
            extraction.DatasetFingerprintExtractor(raw.name, 1).run()  # once: it finds its file afterwards
            found: dict[str, Any] = planning.ExperimentPlanner(raw.name).plan_experiment()
        return found

    return plans


HIPPOCAMPUS, PROSTATE = "hippocampus/nnUNet_raw/Dataset004_Hippocampus", "prostate/nnUNet_raw/Dataset105_ProstateMR"


@pytest.mark.real
@pytest.mark.parametrize(("place", "channel"), [(HIPPOCAMPUS, "MRI"), (HIPPOCAMPUS, "CT"), (PROSTATE, "MRI")])
def test_the_plan_and_the_arrays_are_nnunets(
    place: str, channel: str, theirs: Callable[[Path, str], dict[str, Any]], shared_data: Path
) -> None:
    raw = shared_data / place
    if not raw.is_dir():
        pytest.skip(f"{place} is absent")
    real = read_all(raw)
    plans = theirs(raw, channel)
    ours = plan_volumes(replace(real, modality=(channel,)), VolumeOptions())
    wanted = plans["configurations"]["3d_fullres"]
    assert ours.spacing == tuple(wanted["spacing"]) and ours.axes == tuple(plans["transpose_forward"])
    assert ours.patch == ours.window == tuple(wanted["patch_size"])
    assert ours.schemes == tuple(wanted["normalization_schemes"])
    assert ours.masked == tuple(wanted["use_mask_for_norm"])
    mine = ours.nnunet_plans()
    for key in ("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs"):
        assert mine["configurations"]["3d_fullres"][key] == wanted[key]
    if channel == "CT":
        assert ours.intensities[0] is not None
        measured = plans["foreground_intensity_properties_per_channel"]["0"]
        assert ours.intensities[0].model_dump() == {k: measured[k] for k in ours.intensities[0].model_dump()}

    manager = need("nnunetv2.utilities.plans_handling.plans_handler").PlansManager(plans)
    worker = need("nnunetv2.preprocessing.preprocessors.default_preprocessor").DefaultPreprocessor(verbose=False)
    declared = {**json.loads((raw / "dataset.json").read_text()), "channel_names": {"0": channel}}
    for case in real.cases:
        files = raw / "imagesTr" / f"{case.name}_0000.nii.gz", raw / "labelsTr" / f"{case.name}.nii.gz"
        configuration = manager.get_configuration("3d_fullres")
        data, seg, found = worker.run_case([str(files[0])], str(files[1]), manager, configuration, declared)
        ready = ours.ready(case)
        assert ready.image.dtype == data.dtype and np.array_equal(ready.image, data)
        assert np.array_equal(ready.label, seg[0])
        places = {label: at[:, 1:] for label, at in found["class_locations"].items() if len(at)}
        assert places.keys() == ready.places.keys()
        assert all(np.array_equal(places[label], ready.places[label]) for label in places)


def test_axes_are_turned_and_options_replace_what_is_planned(phantoms: Callable[..., Volumes]) -> None:
    source = phantoms(size=(26, 22, 10), spacing=(1.0, 1.0, 4.0))
    options = VolumeOptions(spacing=(1.0, 2.0, 5.0), patch=(16, 12, 8))
    plan = plan_volumes(source, options)
    assert plan.axes == (2, 0, 1)  # the axis with the thickest slices comes first
    assert plan.spacing == (5.0, 1.0, 2.0) and plan.raw_spacing == (1.0, 2.0, 5.0)
    assert plan.patch == (8, 16, 12)
    assert plan.schemes == ("ZScoreNormalization",)  # of a channel without a name
    given = plan_volumes(source, options.model_copy(update={"plan": "given"}))
    assert given == plan


@pytest.mark.usefixtures("few_voxels")
def test_a_given_plan_reads_one_case_unless_ct_is_normalised(phantoms: Callable[..., Volumes]) -> None:
    options = VolumeOptions(plan="given", spacing=(2.0, 1.0, 1.0), patch=(8, 16, 16))
    source = phantoms()
    assert plan_volumes(source, options).intensities == (None,)
    assert source.reads == ["patient 0"]
    plan = plan_volumes(source, options.model_copy(update={"normalisation": "ct"}))
    assert set(source.reads) == {"patient 0", "patient 1", "patient 2"}
    assert plan.intensities[0] is not None and 150 < plan.intensities[0].mean < 300


def test_planning_leaves_environment_output_and_generators_alone(
    phantoms: Callable[..., Volumes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_raw", "of the user")
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    torch.manual_seed(1)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    told: list[tuple[int, int]] = []
    plan = plan_volumes(phantoms(), PLAIN, lambda done, of: told.append((done, of)))
    assert len(plan.patch) == 3 and told == [(1, 3), (2, 3), (3, 3)]
    assert dict(os.environ)["nnUNet_raw"] == "of the user" and "nnUNet_preprocessed" not in os.environ
    assert capfd.readouterr().out == "" and torch.equal(torch.rand(3), drawn)


def test_body_masks_follow_what_is_cut_away(phantoms: Callable[..., Volumes]) -> None:
    assert plan_volumes(phantoms(), PLAIN).masked == (False,)
    assert plan_volumes(phantoms(border=5), PLAIN).masked == (True,)


@pytest.mark.usefixtures("few_voxels")
@pytest.mark.parametrize("make", [plan_volumes, plan_slices])
def test_plans_are_plain_data(make: Callable[..., Any], phantoms: Callable[..., Volumes]) -> None:
    plan = make(phantoms(modality=("CT", "PET"), channels=2), VolumeOptions(patch=(8, 16, 16)))
    written = json.loads(json.dumps(plan.model_dump(mode="json")))
    assert read_preparation(written, "stream.json") == plan
    for damage in ({"channels": 3}, {"patch": [4]}, {"kind": "other"}, {"code": "x"}):
        with pytest.raises(DataError, match=r"stream\.json: the preparation of a task is damaged"):
            read_preparation({**written, **damage}, "stream.json")


def test_patches_fit_networks(phantoms: Callable[..., Volumes]) -> None:
    assert fit_patch((40, 56, 40), (16, 16, 8)) == (48, 64, 40)
    assert fit_patch((3, 20, 17), (4, 16, 16)) == (4, 16, 16)
    plan = plan_volumes(phantoms(), VolumeOptions(patch=(9, 15, 17))).fitted((4, 4, 4))
    assert plan.patch == plan.window == (8, 16, 16)


class Bad(NamedTuple):
    """Cases that no plan can be made of, and the words that say so."""

    name: str
    case: Case
    words: str
    modality: tuple[str, ...] = ()


GOOD = ellipsoid(0)
BAD = [
    Bad("nan", replace(GOOD, image=GOOD.image.where(GOOD.image > 90, torch.nan)), "'patient 0' holds voxels that are"),
    Bad("inf", replace(GOOD, image=GOOD.image / 0), "'patient 0' holds voxels that are no numbers"),
    Bad("an image", ellipsoid(0, (20, 20), (1.0, 1.0)), "'patient 0' has 2 axes, and images of 3 axes are needed"),
    Bad("sizes", replace(GOOD, label=GOOD.label[1:]), "image and mask of 'patient 0' differ in size"),
    Bad("unlabelled", replace(GOOD, label=GOOD.label * 0), "no voxel of the training cases is labelled"),
    Bad("unit", replace(GOOD, geometry=Geometry((5000.0, 1.0, 1.0))), "'patient 0' has voxels of 5000 × 1 × 1 mm"),
    Bad("flat voxels", replace(GOOD, geometry=Geometry((1.0, 0.0, 1.0))), "'patient 0' has voxels of 1 × 0 × 1 mm"),
    Bad("two sizes", replace(GOOD, geometry=Geometry((1.0, 1.0))), "'patient 0' has voxels of 1 × 1 mm"),
    Bad("channels", GOOD, "'patient 0' has 1 channels, and 2 are named", ("T1", "T2")),
    Bad(
        "one slice",
        replace(GOOD, image=GOOD.image[:, 9:10], label=GOOD.label[9:10]),
        "the volumes have one slice at the planned spacing of 2 × 1 × 1 mm",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_what_cannot_be_planned_is_told(bad: Bad) -> None:
    with pytest.raises(DataError) as told:
        plan_volumes(Volumes([bad.case], bad.modality), PLAIN)
    assert bad.words in told.value.what and told.value.hint


def test_volumes_that_the_planner_cannot_bring_together_are_told() -> None:
    cases = [replace(ellipsoid(k), geometry=Geometry((1000.0, 1.0, 0.001))) for k in range(3)]
    with pytest.raises(DataError, match="nnU-Net finds no patch for these volumes at the planned spacing of") as told:
        plan_volumes(Volumes(cases), PLAIN)
    assert "volumes.patch" in told.value.hint


def test_an_empty_training_set_is_told() -> None:
    for make in (plan_volumes, plan_slices):
        with pytest.raises(DataError, match="volumes has no training case"):
            make(Volumes([]), PLAIN)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"plan": "given"}, "needs volumes.spacing and volumes.patch"),
        ({"intensity": (99, 1)}, "two percentiles"),
        ({"spacing": (1, 0, 1)}, "greater than 0"),
        ({"spacing": (1, -2, 1)}, "greater than 0"),
        ({"spacing": (1, float("nan"), 1)}, "finite number"),
        ({"spacing": (1, 1001, 1)}, "less than or equal to 1000"),
        ({"patch": (16, 16)}, "Field required"),
        ({"window": 3}, "Extra inputs"),
    ],
)
def test_options_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        VolumeOptions(**settings)


def test_a_missing_package_is_a_plain_line() -> None:
    with pytest.raises(UsageError) as told:
        need("nnunetv2.not_there")
    assert (told.value.what, told.value.hint) == (
        "reading volumes needs the extra 'volumes'",
        "pip install 'perdure[volumes]'",
    )


LAZY = """
import sys
import perdure.data.volumes.options, perdure.data.volumes.extra
print(sorted({"torch", "nnunetv2", "blosc2"} & set(sys.modules)))
import perdure.data.volumes.plan, perdure.data.volumes.working
print(sorted({"nnunetv2", "batchgeneratorsv2", "blosc2"} & set(sys.modules)))
"""


def test_packages_are_loaded_when_they_are_needed() -> None:
    ran = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["[]", "[]"]


def volume(modality: tuple[str, ...] = (), **fields: Any) -> Volume3D:
    settings = {"channels": 1, "patch": (8, 8, 8), "spacing": (3.0, 1.0, 1.0), "schemes": ("ZScoreNormalization",)}
    settings |= {"masked": (False,), "intensities": (None,), "modality": modality}
    return Volume3D(**{**settings, **fields})


def test_what_fits_badly_is_told() -> None:
    source: Source = Volumes([])
    first = volume(("MR",))
    assert misfit(first, source, volume(("mr",), spacing=(6.0, 1.0, 0.5))) == []
    (far,) = misfit(first, source, volume(("MR",), spacing=(6.1, 1.0, 1.0)))
    assert "voxels of 6.1 × 1 × 1 mm" in far and "shown at 3 × 1 × 1 mm" in far
    # the same voxels, whose axes are turned in one plan: nothing is far away
    assert misfit(first, source, volume(("MR",), spacing=(3.0, 1.0, 1.0), axes=(1, 0, 2)))
    (other,) = misfit(first, source, volume(("US",)))
    assert "holds US, and the first task held MR" in other
    for scheme, words in (("No", "would be: none. "), ("RGBTo01", "would be: divided by 255. ")):
        (note,) = misfit(first, source, volume(schemes=(f"{scheme}Normalization",)))
        assert words in note and "those of the first task: by mean and deviation of each volume; " in note
        assert note.endswith(
            "If all are CT, begin again with volumes.normalisation=ct; if not, with volumes.plan=per_task"
        )
        assert "Normalization" not in note  # the names of nnU-Net's classes
    usual = {"mean": 0.0, "std": 1.0, "percentile_00_5": -1.0, "percentile_99_5": 1.0}
    ct = volume(("CT",), schemes=("CTNormalization",), intensities=(usual,))
    (note,) = misfit(ct, source, volume())  # of plain folders, which do not say what they hold
    assert note.endswith("Nothing to do if they are CT; if not, begin again with volumes.plan=per_task")
    with pytest.raises(DataError, match="has 2 channels, and the network takes 1"):
        two = {"channels": 2, "schemes": first.schemes * 2, "masked": (False,) * 2, "intensities": (None,) * 2}
        misfit(first, source, volume(**two))
    with pytest.raises(DataError, match="would be shown as slices2d"):
        misfit(first, source, plan_slices(Volumes([GOOD]), VolumeOptions(view="slices")))


KEPT = [
    ("CT", "CT"),
    ("T1 w", "T1 w"),
    ("МРТ", "МРТ"),
    ("Jane Doe (1950)", "Jane Doe _1950_"),
    ("a/b\\c<d>", "a_b_c_d_"),
    ("\x1b[31m", "_31m"),
    ("x" * 100, "x" * 24),
    ("", "_"),
]


@pytest.mark.parametrize(("name", "kept"), KEPT)
def test_names_of_channels_are_kept_short_and_plain(name: str, kept: str) -> None:
    assert kept_channels([name]) == (kept,)
    assert CHANNEL_NAME.fullmatch(kept)


def test_every_scheme_of_a_plan_has_words() -> None:
    assert set(get_args(Scheme)) <= set(IN_WORDS)


def test_ignored_voxels_have_places(phantoms: Callable[..., Volumes]) -> None:
    source = phantoms(ignored=True)
    plan = plan_volumes(source, VolumeOptions(patch=(8, 16, 16)))
    ready = plan.ready(source.cases[0])
    assert (np.asarray(ready.label) == IGNORE).any() and set(ready.places) == {-1, 1, 2}
    at = tuple(ready.places[-1].T.astype(int))
    assert not (np.asarray(ready.label)[at] == IGNORE).any()


@pytest.mark.parametrize("plan", ["first", "given"])
@pytest.mark.parametrize(
    ("spacing", "what"),
    [
        ((1e-9, 1e-9, 1e-9), "'patient 0' would have 3.6e+10 × 2.6e+10 × 2.2e+10 voxels at the plan's spacing"),
        ((1e-9, 1.0, 1.0), "GB of memory"),
        ((1000.0, 1000.0, 1000.0), "'patient 0' would have 0 × 0 × 0 voxels"),
        ((36.0, 26.0, 22.0), "would have 1 × 1 × 1 voxels at the plan's spacing of 36 × 26 × 22 mm, and the patch has"),
    ],
)
def test_a_spacing_that_no_volume_can_have_is_told_before_anything_is_planned(
    phantoms: Callable[..., Any], plan: str, spacing: tuple[float, float, float], what: str
) -> None:
    source = phantoms()
    options = VolumeOptions(plan=plan, spacing=spacing, patch=(16, 16, 16))
    with pytest.raises(DataError) as told:
        plan_volumes(source, options)
    assert what in told.value.what and "volumes.spacing" in told.value.hint
    assert source.reads == ["patient 0"]
