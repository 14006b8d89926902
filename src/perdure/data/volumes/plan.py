"""One network needs one spacing, patch and normalisation: nnU-Net's plan for the training cases of a data set."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from perdure.data.case import Case
from perdure.data.source import Source
from perdure.data.volumes.extra import need, nnunet_folders, quiet
from perdure.data.volumes.options import VolumeOptions, kept_channels
from perdure.data.volumes.preprocessing import Intensities, Scheme, Volume3D, refuse_size
from perdure.data.volumes.sampled import Sampled, checked, spacing_of
from perdure.data.volumes.slices import Slices2D
from perdure.errors import DataError
from perdure.files import write_json
from perdure.seeds import seeded

FOREGROUND_VOXELS: Final = 10**8
"""Labelled voxels that nnU-Net looks at for the intensities, over all cases."""
FAR: Final = 2.0
"""Spacings that differ by more than this factor are told: structures then look unlike those learned before."""
CHANNEL_NAMES: Final = {"ct": "CT", "zscore": "zscore", "none": "noNorm"}
"""Names of channels by which nnU-Net is told a normalisation."""
IN_WORDS: Final[dict[Scheme, str]] = {
    "CTNormalization": "by the usual values of labelled voxels (CT)",
    "ZScoreNormalization": "by mean and deviation of each volume",
    "RescaleTo01Normalization": "to 0 to 1 in each volume",
    "RGBTo01Normalization": "divided by 255",
    "NoNormalization": "none",
}
"""nnU-Net's normalisations, as they are told to people."""
Told = Callable[[int, int], None]
"""Called with the number of cases that are done, and of all."""


@dataclass(frozen=True)
class _Fingerprint:
    """What nnU-Net's planner is given of a data set: an entry per case; of intensities, an entry per channel."""

    spacings: list[list[float]]
    shapes: list[list[int]]
    kept: list[float]
    intensities: list[Intensities | None]


def plan_volumes(source: Source, options: VolumeOptions, told: Told | None = None) -> Volume3D:
    """The preparation for a 3D network, planned by nnU-Net for the training cases of a source.

    Fingerprint and plan are computed by nnU-Net's own code, from cases that are read through ``source.read``: the same
    cases in a raw folder of nnU-Net give the same plan. ``options.spacing`` and ``options.patch`` replace what is
    planned; with ``plan: given`` no case is read but the first, unless CT is normalised.

    Args:
        source: Volumes.
        options: The section ``volumes`` of the recipe.
        told: Of the cases that were read.

    Raises:
        DataError: There is no training case, one cannot be used, or none has a labelled voxel.
    """
    names = source.names("train")
    if not names:
        raise DataError(f"{source.name} has no training case", "run `perdure check` on the data set")
    channels = _volume(source, names[0], options).image.shape[0]
    named = list(source.modality) or [f"channel {number}" for number in range(channels)]
    if len(named) != channels:
        raise DataError(
            f"{source.name}: '{names[0]}' has {channels} channels, and {len(named)} are named",
            "give each case all channels that the data set names",
        )
    asked = [CHANNEL_NAMES.get(options.normalisation, name) for name in named]
    scheme = need("nnunetv2.preprocessing.normalization.map_channel_name_to_normalization").get_normalization_scheme
    schemes = [scheme(name).__name__ for name in asked]
    masked = [False] * channels
    found = _Fingerprint([], [], [], [None] * channels)
    if options.plan != "given" or "CTNormalization" in schemes:
        found = _fingerprint(source, names, options, [name == "CTNormalization" for name in schemes], told)
    if options.plan == "given":
        assert options.spacing is not None and options.patch is not None  # the options ask for both
        first = int(np.argmax(options.spacing))
        axes: tuple[int, ...] = (first, *(axis for axis in range(3) if axis != first))
        spacing = tuple(options.spacing[axis] for axis in axes)
        patch = tuple(options.patch[axis] for axis in axes)
    else:
        labels = {"background": 0, **{str(number): number for number in source.space.ids}}
        axes, spacing, patch, masked = _nnunet_plan(found, asked, labels, options)
    return Volume3D(
        channels=channels,
        patch=patch,
        window=patch,
        overlap=options.overlap,
        blend=options.blend,
        foreground=options.foreground,
        augment=options.augment,
        modality=kept_channels(source.modality),
        spacing=spacing,
        axes=axes,
        schemes=tuple(schemes),
        masked=tuple(masked),
        intensities=tuple(found.intensities),
    )


def plan_slices(
    source: Source, options: VolumeOptions, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> Slices2D:
    """The preparation of slices, or of single medical images, for a 2D network. Reads the first training case.

    Args:
        source: Volumes or images.
        options: The section ``volumes`` of the recipe.
        mean: Of each channel of the network, of intensities from 0 to 1; 0.5 for each channel of the images if not
            given. Images with one channel are repeated where there are more.
        std: In the same way; 0.25 if not given.

    Raises:
        DataError: There is no training case, or it has another number of channels.
    """
    names = source.names("train")
    if not names:
        raise DataError(f"{source.name} has no training case", "run `perdure check` on the data set")
    channels = source.read("train", names[0]).image.shape[0]
    plan = Slices2D(
        channels=len(mean) or channels,
        patch=(options.size, options.size),
        overlap=options.overlap,
        blend=options.blend,
        foreground=options.foreground,
        augment=options.augment,
        modality=kept_channels(source.modality),
        axis=options.axis,
        intensity=options.intensity,
        size=options.size,
        mean=tuple(mean) or (0.5,) * channels,
        std=tuple(std) or (0.25,) * channels,
    )
    if channels not in plan.accepted_channels:
        raise DataError(
            f"{source.name}: '{names[0]}' has {channels} channels, and the network takes {plan.channels}",
            "set volumes.channels to the number of channels of the images with most of them",
        )
    return plan


def misfit(first: Sampled, source: Source, own: Sampled) -> list[str]:
    """What fits badly where a later data set is shown by the first one's plan, a plain sentence each.

    Args:
        first: The plan that the network was made with.
        source: The later data set.
        own: The plan that it would have had alone.

    Raises:
        DataError: The two have different numbers of channels, or one is of volumes and the other of slices.
    """
    if type(first) is not type(own):
        raise DataError(
            f"{source.name} would be shown as {own.kind}, and the network learned with {first.kind}",
            "keep volumes.view as it was in the first task",
        )
    if not set(own.accepted_channels) & set(first.accepted_channels):
        raise DataError(
            f"{source.name} has {own.channels} channels, and the network takes {first.channels}",
            "one network needs the same channels in every task: leave channels out, or start a new run",
        )
    told = []
    if isinstance(first, Volume3D) and isinstance(own, Volume3D):
        pairs = zip(first.raw_spacing, own.raw_spacing, strict=True)
        if any(max(a, b) > FAR * min(a, b) for a, b in pairs):
            ours, theirs = (" × ".join(f"{value:g}" for value in plan.raw_spacing) for plan in (first, own))
            told.append(
                f"{source.name} has voxels of {theirs} mm (depth × height × width) and is shown at {ours} mm, which "
                "differs by more than a factor of two: small structures may be lost, or slices made up"
            )
        if set(first.schemes) != set(own.schemes):
            ct = "CTNormalization"
            maybe = ct in first.schemes and ct not in own.schemes and not own.modality  # plain folders say nothing
            told.append(
                f"its volumes are normalised as those of the first task: {_schemes(first)}; alone they would be: "
                f"{_schemes(own)}. "
                + (
                    "Nothing to do if they are CT; if not, begin again with volumes.plan=per_task"
                    if maybe
                    else "If all are CT, begin again with volumes.normalisation=ct; if not, with volumes.plan=per_task"
                )
            )
    if first.modality and own.modality and [*map(str.casefold, first.modality)] != [*map(str.casefold, own.modality)]:
        told.append(
            f"{source.name} holds {_words(own.modality)}, and the first task held {_words(first.modality)}: the "
            "network sees both alike"
        )
    return told


def _schemes(plan: Volume3D) -> str:
    return _words([IN_WORDS[name] for name in plan.schemes])


def _words(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _volume(source: Source, name: str, options: VolumeOptions) -> Case:
    """A training case, checked: a volume of numbers whose label has its size, and that a chosen spacing leaves usable.

    Without the last, nnU-Net would plan for minutes with volumes of 10¹² voxels, or of none.
    """
    case = source.read("train", name)
    checked(case, (3,))
    if case.label.shape != case.image.shape[1:]:
        raise source.size_error("train", name, case.image.shape[1:], case.label.shape)
    if options.spacing is not None:
        refuse_size(case, spacing_of(case), options.spacing, options.patch)
    return case


def _fingerprint(
    source: Source, names: Sequence[str], options: VolumeOptions, ct: Sequence[bool], told: Told | None
) -> _Fingerprint:
    """nnU-Net's fingerprint (``DatasetFingerprintExtractor``), case by case in this process.

    nnU-Net starts processes for it that read files; the parts that look at a case are called here. Intensities are
    collected for CT alone: nothing else needs them, and 10⁸ draws take seconds and a gigabyte.
    """
    extraction = need("nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor")
    collect = extraction.DatasetFingerprintExtractor.collect_foreground_intensities
    crop = need("nnunetv2.preprocessing.cropping.cropping").crop_to_nonzero
    gathered = _Fingerprint([], [], [], [])
    values: list[list[npt.NDArray[Any]]] = [[] for _ in ct]
    labelled = False
    for number, name in enumerate(names):
        case = _volume(source, name, options)
        image = checked(case, (3,), (len(ct),))
        # float32 as nnU-Net's readers have it, and a copy: -1 is written into it
        data, label, _ = crop(image, case.label.numpy().astype(np.float32)[None])
        labelled = labelled or bool((label > 0).any())
        if any(ct):
            samples, _ = collect(label, data, num_samples=FOREGROUND_VOXELS // len(names))
            for channel, sample in enumerate(samples):
                values[channel].append(np.asarray(sample))
        gathered.spacings.append(list(spacing_of(case)))
        gathered.shapes.append(list(data.shape[1:]))
        gathered.kept.append(float(np.prod(data.shape[1:]) / np.prod(image.shape[1:])))
        if told is not None:
            told(number + 1, len(names))
    if not labelled:
        raise DataError(f"{source.name}: no voxel of the training cases is labelled", "check the masks")
    for channel, wanted in enumerate(ct):
        joined, values[channel] = np.concatenate(values[channel]) if wanted else None, []
        gathered.intensities.append(None if joined is None else _intensities(joined))
    return gathered


def _intensities(voxels: npt.NDArray[Any]) -> Intensities:
    """As ``DatasetFingerprintExtractor.run`` has them."""
    low, high = np.percentile(voxels, np.array((0.5, 50.0, 99.5)))[[0, 2]]
    if not np.isfinite([float(np.mean(voxels)), float(np.std(voxels)), low, high]).all():
        raise DataError(
            "labelled voxels hold values that are too large to compute with", "correct the images: CT has -1024 to 3071"
        )
    return Intensities(
        mean=float(np.mean(voxels)), std=float(np.std(voxels)), percentile_00_5=float(low), percentile_99_5=float(high)
    )


def _nnunet_plan(
    found: _Fingerprint, channels: Sequence[str], labels: dict[str, int], options: VolumeOptions
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...], list[bool]]:
    """Axes, spacing, patch and masked channels of nnU-Net's configuration ``3d_fullres``.

    Its planner's steps for this configuration are called one by one: ``plan_experiment`` also plans for 2D and for low
    resolution, which builds dozens of networks and is not needed.
    """
    planning = need("nnunetv2.experiment_planning.experiment_planners.default_experiment_planner")
    # seeded: the networks whose memory is estimated are built with random weights
    with tempfile.TemporaryDirectory() as folder, nnunet_folders(Path(folder)), quiet(), seeded(0):
        place = Path(folder) / "Dataset001_Planned"
        declared = {
            "channel_names": {str(number): name for number, name in enumerate(channels)},
            "labels": labels,
            "numTraining": len(found.shapes),
            "file_ending": ".nii.gz",
            "dataset": {"0": {"images": ["image.nii.gz"], "label": "label.nii.gz"}},  # so that no folder is searched
        }
        write_json(place / "dataset.json", declared)
        write_json(
            place / "dataset_fingerprint.json",
            {
                "spacings": found.spacings,
                "shapes_after_crop": found.shapes,
                "median_relative_size_after_cropping": float(np.median(found.kept)),
            },
        )
        wanted = None if options.spacing is None else [float(value) for value in options.spacing]
        planner = planning.ExperimentPlanner(place.name, overwrite_target_spacing=wanted)
        forward, _ = planner.determine_transpose()
        spacing = planner.determine_fullres_target_spacing()
        sizes = [
            planning.compute_new_shape(shape, near, spacing)
            for near, shape in zip(found.spacings, found.shapes, strict=True)
        ]
        median = np.median(sizes, 0)[forward]
        _, masked = planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        if options.patch is not None:
            patch = [options.patch[axis] for axis in forward]
        elif median.min() < 2:
            raise DataError(
                f"the volumes have one slice at the planned spacing of {' × '.join(f'{v:g}' for v in spacing)} mm",
                "set volumes.view=slices, or choose volumes.spacing",
            )
        else:
            voxels = float(np.prod(median) * len(sizes))
            try:
                with np.errstate(divide="ignore"):
                    planned = planner.get_plans_for_configuration(spacing[forward], median, "3d_fullres", voxels, {})
            except (ArithmeticError, ValueError) as error:  # its arithmetic does not expect scans this unlike
                shown = " × ".join(f"{v:g}" for v in spacing)
                raise DataError(
                    f"nnU-Net finds no patch for these volumes at the planned spacing of {shown} mm: {error}",
                    "correct the voxel sizes in the files, or choose volumes.spacing and volumes.patch",
                ) from error
            patch = planned["patch_size"]
    axes = tuple(int(axis) for axis in forward)
    return axes, tuple(float(v) for v in spacing[forward]), tuple(int(v) for v in patch), [bool(m) for m in masked]
