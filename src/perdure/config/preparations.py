"""How the cases of each data set are shown to the network: from the recipe, or as a run knows it."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.config.recipe import DataSetsSection, Recipe
from perdure.data.preparation import ClassImage, Photo2D, Preparation, read_preparation
from perdure.data.source import Kind, Source
from perdure.errors import DataError
from perdure.networks.build import build_network
from perdure.networks.segmenter import Segmenter
from perdure.seeds import seeded
from perdure.streams.description import DescribedStream


def preparations(
    recipe: Recipe, sources: Sequence[Source], known: DescribedStream | None
) -> tuple[list[Preparation], list[str]]:
    """How the cases of each data set are shown, and what fits badly.

    Tasks that a run knows are shown as it knows them. Others as the first one is, unless each has a plan of its own.
    """
    plan = recipe.stream
    names = [task.name or task.data.name for task in plan.tasks] if isinstance(plan, DataSetsSection) else []
    shown: list[Preparation] = []
    notes: list[str] = []
    for index, source in enumerate(sources):
        if known is not None and index < len(known.tasks) and len(known.tasks) == len(known.groups):
            shown.append(read_preparation(known.tasks[index].preparation, "stream.json"))
            continue
        later = index > 0 and recipe.volumes.plan != "per_task"
        given = recipe.volumes.view != "slices" and recipe.volumes.plan == "given"
        own = _as_given(shown[0], source) if later and given else _planned(recipe, source)
        if later:
            notes += [f"{names[index]}: {note}" for note in _misfit(shown[0], source, own)]
            own = shown[0]
        shown.append(own)
    return shown, notes


def _planned(recipe: Recipe, source: Source) -> Preparation:
    """The preparation that a data set has alone."""
    if source.dims == 2 and recipe.volumes.view != "slices":
        return build_preparation(recipe, source.kind)

    from perdure.data.volumes.plan import plan_slices, plan_volumes  # these load nnU-Net

    if recipe.volumes.view == "slices":
        channels = recipe.volumes.channels or 0
        return plan_slices(source, recipe.volumes, (0.5,) * channels, (0.25,) * channels)
    plan = plan_volumes(source, recipe.volumes)
    if recipe.volumes.patch is not None:
        return plan  # a patch that somebody chose is not changed behind their back
    with seeded(0):
        network = build_network(recipe.network.name, dims=3, in_channels=plan.channels, **recipe.network.settings)
    return plan.fitted(network.multiple) if isinstance(network, Segmenter) else plan


def _as_given(first: Preparation, source: Source) -> Preparation:
    """What a later data set would have where spacing and patch are given: no case but the first has to be read."""
    from perdure.data.volumes.options import kept_channels
    from perdure.data.volumes.sampled import Sampled

    if not isinstance(first, Sampled) or source.dims != first.dims:
        return Preparation(dims=source.dims)
    channels = source.read("train", source.names("train")[0]).image.shape[0]
    return first.model_copy(update={"channels": channels, "modality": kept_channels(source.modality)})


def _misfit(first: Preparation, source: Source, own: Preparation) -> list[str]:
    """What fits badly where a data set is shown as the first one is. Raises DataError where it cannot be."""
    from perdure.data.volumes.plan import misfit
    from perdure.data.volumes.sampled import Sampled

    if isinstance(first, Sampled) and isinstance(own, Sampled):
        return misfit(first, source, own)
    if (first.dims, first.kind) != (own.dims, own.kind):
        raise DataError(
            f"{source.name} has {own.dims} spatial axes ({own.kind}), the first data set {first.dims} ({first.kind})",
            "one network needs images of one kind; volumes are cut into slices with volumes.view=slices",
        )
    return []


def build_preparation(recipe: Recipe, kind: Kind) -> Preparation:
    """How images are shown to the network: from the sections ``augment`` and ``evaluate``."""
    augment, evaluate = recipe.augment, recipe.evaluate
    channels, patch = len(augment.mean), (augment.crop, augment.crop)
    if kind == "classification":
        return ClassImage(channels=channels, patch=patch, flip=augment.flip, mean=augment.mean, std=augment.std)
    return Photo2D(
        channels=channels,
        patch=patch,
        area=augment.area,
        short_edges=augment.short_edges,
        jitter=augment.jitter,
        flip=augment.flip,
        mean=augment.mean,
        std=augment.std,
        size=evaluate.size,
        protocol=evaluate.protocol,
        window=evaluate.window,
        overlap=evaluate.overlap,
        blend=evaluate.blend,
    )
