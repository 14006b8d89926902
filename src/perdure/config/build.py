"""From a checked recipe to objects: source, stream, method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from perdure.config.load import explain
from perdure.config.recipe import DataSection, DataSetsSection, Recipe, StreamSection, TaskSection
from perdure.data.catalog import HELD_OUT, needs_folder, open_source
from perdure.data.gone import GoneSource
from perdure.data.preparation import ClassImage, Photo2D, Preparation, read_preparation
from perdure.data.readers.unlabelled import open_unlabelled
from perdure.data.source import AbsentSplitError, Kind, Source
from perdure.errors import DataError, PerdureError, UsageError, nearest
from perdure.files import home
from perdure.foreign import is_foreign, load
from perdure.labels import ClassInfo, LabelSpace
from perdure.methods import METHODS
from perdure.methods.method import Method
from perdure.methods.options import Options, Setup
from perdure.networks.build import NETWORKS, build_network
from perdure.networks.network import Network
from perdure.seeds import derive_seed, seeded
from perdure.streams.class_incremental import Pool, class_incremental, slug
from perdure.streams.description import DescribedStream
from perdure.streams.partial_labels import DataSet, partial_labels
from perdure.streams.task import Stream, merged


@dataclass(frozen=True)
class Experiment:
    """The objects of one recipe.

    Args:
        recipe: The recipe.
        sources: Its data sets, in the order of their tasks.
        stream: The tasks.
        method: The method, with its network.
        notes: What fits badly, but can be learned.
    """

    recipe: Recipe
    sources: tuple[Source, ...]
    stream: Stream
    method: Method[Options]
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """What a label describes; the same in all data sets."""
        return self.sources[0].kind

    @property
    def patients(self) -> bool:
        """Whether images of any data set come from patients."""
        return any(source.patients for source in self.sources)

    @property
    def dataset(self) -> str:
        """Name of the data set, or names of the tasks where each has its own."""
        if isinstance(self.recipe.stream, StreamSection):
            return self.recipe.sets[0].name
        return ", ".join(label(task) for task in self.recipe.stream.tasks)


def build_experiment(
    recipe: Recipe, sealed: int = 0, pretrained: bool = True, known: DescribedStream | None = None
) -> Experiment:
    """Open the data, make the stream and build the method; reads masks (cached) but trains nothing.

    So many tasks as are ``sealed`` need no training images any more. ``pretrained``: see :func:`build_method`.
    ``known``: what the run has learned so far; data sets of sealed tasks may then be missing.

    Raises:
        UsageError: A name or an option is wrong.
        DataError: The data cannot be used.
    """
    check_method(recipe)
    sources = open_sources(recipe, sealed, known)
    for section, source in zip(recipe.sets, sources, strict=True):
        check_kinds(recipe, section.name, source)
    stream, notes = build_stream(recipe, sources, sealed, known)
    if recipe.engine.validate_every:
        try:
            for source in sources[sealed if len(sources) > 1 else 0 :]:
                source.names("val")
        except AbsentSplitError as error:
            raise UsageError(
                f"engine.validate_every={recipe.engine.validate_every}: {error.what}", error.hint
            ) from error
    method = build_method(recipe, stream.tasks[0].preparation, pretrained)
    check_recurring(recipe.method.name, method, stream)
    return Experiment(recipe, sources, stream, method, tuple(notes))


def check_recurring(name: str, method: Method[Options], stream: Stream) -> None:
    """Raise UsageError where a task labels classes that an earlier one taught and the method cannot learn that."""
    for task in stream.tasks:
        again = next((c for c in task.old if c in task.annotated), None)
        if again is None or method.recurring == "learned" or (task.new and method.recurring == "beside_new"):
            continue
        labels = f"labels '{stream.space.name(again)}' again, which an earlier task taught"
        raise UsageError(
            f"{name} learns new classes only; task '{task.name}' {labels if task.new else 'teaches none'}",
            "use lwf, or finetune with its default method.channels=seen",
        )


def in_order(recipe: Recipe) -> Recipe:
    """The recipe with its data sets in the order in which they are learned, so that further ones come at the end."""
    plan = recipe.stream
    if isinstance(plan, StreamSection) or plan.order == "natural":
        return recipe
    tasks = list(plan.tasks)
    match plan.order:
        case "reversed":
            tasks.reverse()
        case "shuffled":
            generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "order of data sets"))
            tasks = [tasks[k] for k in torch.randperm(len(tasks), generator=generator).tolist()]
        case names:
            by_name = {label(task): task for task in tasks}
            if sorted(names) != sorted(by_name):
                raise UsageError(
                    f"stream.order={list(names)} does not name each task once", f"tasks: {', '.join(by_name)}"
                )
            tasks = [by_name[name] for name in names]
    ordered = plan.model_copy(update={"tasks": tuple(tasks), "order": "natural"})
    return recipe.model_copy(update={"stream": ordered})


def label(task: TaskSection) -> str:
    """Name of the task of a data set."""
    return slug(task.name or task.data.name)


def open_sources(recipe: Recipe, sealed: int = 0, known: DescribedStream | None = None) -> tuple[Source, ...]:
    """The data sets of a recipe; those of sealed tasks that are not at hand without their images."""
    plan = recipe.stream
    if isinstance(plan, StreamSection):
        return (_opened(recipe.sets[0], recipe.sets[0].root),)
    if not plan.tasks:
        raise UsageError("the recipe names no data set", "give its folder: --data DIR")
    sources: list[Source] = []
    for index, task in enumerate(plan.tasks):
        root = task.data.root if plan.root is None or task.data.root is None else plan.root / task.data.root
        absent = needs_folder(task.data.name) if root is None else not root.exists()
        if known is not None and index < sealed and absent:
            sources.append(_gone(known, index))
            continue
        try:
            sources.append(_opened(task.data, root))
        except PerdureError as error:
            raise type(error)(f"task {index + 1} ('{label(task)}'): {error.what}", error.hint) from error
    return tuple(sources)


def _opened(section: DataSection, root: Path | None) -> Source:
    held_out = {} if section.validation is None else {HELD_OUT: section.validation}
    return open_source(section.name, root, {**section.settings, **held_out})


def _gone(known: DescribedStream, index: int) -> Source:
    """What is known of a data set that was learned: the classes that it annotates, the new ones in learning order."""
    task, space = known.tasks[index], known.space
    ids = (*(c for c in task.annotated if c not in task.new), *task.new)
    classes = tuple(ClassInfo(k, space.name(c), space[c].kind, space[c].color) for k, c in enumerate(ids, 1))
    return GoneSource(task.name, known.kind, LabelSpace(classes, known.background), known.patients)


def check_kinds(recipe: Recipe, name: str, source: Source) -> None:
    """Raise UsageError unless method and network are made for what the data set's labels describe."""
    labels = {"segmentation": "labels every pixel", "classification": "has one class an image"}[source.kind]
    able = method_class(recipe.method.name).kinds
    if source.kind not in able:
        fitting = ", ".join(name for name in METHODS if source.kind in method_class(name).kinds)
        raise UsageError(
            f"the method '{recipe.method.name}' is for {' and '.join(sorted(able))}, but the data set "
            f"'{name}' {labels}",
            f"methods for it: {fitting}",
        )
    network = NETWORKS.get(recipe.network.name)
    if network is not None and network.kind != source.kind:
        fitting = ", ".join(name for name, entry in NETWORKS.items() if entry.kind == source.kind)
        raise UsageError(
            f"the network '{recipe.network.name}' is for {network.kind}, but the data set '{name}' {labels}",
            f"networks for it: {fitting}",
        )


def build_stream(
    recipe: Recipe, sources: Sequence[Source], sealed: int = 0, known: DescribedStream | None = None
) -> tuple[Stream, list[str]]:
    """The recipe's stream over open data sets, and notes on it; upper bounds get it merged into one task."""
    notes: list[str] = []
    if isinstance(recipe.stream, StreamSection):
        stream = build_tasks(recipe, sources[0], sealed)
    else:
        stream, notes = _data_sets(recipe, recipe.stream, sources, known)
    return (merged(stream) if method_class(recipe.method.name).sees_all_tasks else stream), notes


def _data_sets(
    recipe: Recipe, plan: DataSetsSection, sources: Sequence[Source], known: DescribedStream | None
) -> tuple[Stream, list[str]]:
    """A task for every data set, shown to the network as the recipe says; and what fits badly."""
    shown, notes = _preparations(recipe, sources, known)
    sets: list[DataSet] = []
    for task, source, preparation in zip(plan.tasks, sources, shown, strict=True):
        if isinstance(source, GoneSource):  # its classes have the names of the model already
            sets.append(DataSet(source, label(task), absent=task.annotated, preparation=preparation))
        else:
            sets.append(DataSet(source, label(task), task.classes, task.rename, task.annotated, preparation))
    measured = recipe.evaluate.split
    stream = partial_labels(sets, preparation=shown[0], union=plan.union, elsewhere=plan.elsewhere, measured=measured)
    return stream, notes


def _preparations(
    recipe: Recipe, sources: Sequence[Source], known: DescribedStream | None
) -> tuple[list[Preparation], list[str]]:
    """How the cases of each data set are shown, and what fits badly.

    Tasks that a run knows are shown as it knows them. Others as the first one is, unless each has a plan of its own.
    """
    shown: list[Preparation] = []
    notes: list[str] = []
    for index, source in enumerate(sources):
        if known is not None and index < len(known.tasks) and len(known.tasks) == len(known.groups):
            shown.append(read_preparation(known.tasks[index].preparation, "stream.json"))
            continue
        own = _planned(recipe, source)
        if index and recipe.volumes.plan != "per_task":
            notes += _misfit(shown[0], source, own)
            own = shown[0]
        shown.append(own)
    return shown, notes


def _planned(recipe: Recipe, source: Source) -> Preparation:
    """The preparation that a data set has alone."""
    if source.dims == 2 and recipe.volumes.view == "volumes":
        return build_preparation(recipe, source.kind)

    from perdure.data.volumes.plan import plan_slices, plan_volumes  # these load nnU-Net

    if recipe.volumes.view == "slices":
        return plan_slices(source, recipe.volumes)
    return plan_volumes(source, recipe.volumes)


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


def build_tasks(recipe: Recipe, source: Source, sealed: int = 0) -> Stream:
    """The class-incremental stream as its protocol makes it, whatever the method."""
    assert isinstance(recipe.stream, StreamSection)
    plan = recipe.stream
    pool: Pool | None
    if (plan.pool == "folder") != (plan.pool_folder is not None):
        raise UsageError(
            f"stream.pool is {plan.pool or 'not given'} and stream.pool_folder is {plan.pool_folder or 'not given'}",
            "images from a folder need both: stream.pool=folder stream.pool_folder=DIR",
        )
    if plan.pool != "folder":
        pool = plan.pool
    else:
        assert plan.pool_folder is not None
        channels = source.image("train", source.names("train")[0]).shape[0]
        if channels not in (1, 3):
            raise UsageError(
                f"images of '{source.name}' have {channels} channels, those of files have 1 or 3", "set stream.pool=val"
            )
        pool = open_unlabelled(home(plan.pool_folder), source.kind, source.space, channels)
    return class_incremental(
        source,
        base=plan.base,
        step=plan.step,
        setting=plan.setting,
        order=plan.order,
        order_seed=recipe.seed,
        partition_file=None if plan.partition_file is None else home(plan.partition_file),
        preparation=build_preparation(recipe, source.kind),
        short_last=plan.short_last,
        pool=pool,
        measured=recipe.evaluate.split,
        sealed=sealed,
    )


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
        flip=augment.flip,
        mean=augment.mean,
        std=augment.std,
        size=evaluate.size,
        protocol=evaluate.protocol,
        window=evaluate.window,
        overlap=evaluate.overlap,
        blend=evaluate.blend,
    )


def build_method(recipe: Recipe, preparation: Preparation, pretrained: bool = True) -> Method[Options]:
    """The method with its network, initialised from the recipe's seed alone.

    Args:
        recipe: The recipe.
        preparation: Of the first task: its dimensions and channels are those of the network.
        pretrained: Load the weights that the recipe starts from; not needed where a sealed task is restored.
    """

    def network() -> Network:
        settings = dict(recipe.network.settings)
        if not pretrained and "weights" in settings:
            settings["weights"] = "random"
        dims, channels = preparation.dims, preparation.channels
        network = build_network(recipe.network.name, dims=dims, in_channels=channels, **settings)
        try:
            if preparation.patch:
                network.check_size(preparation.patch)
        except UsageError as error:
            volumes = preparation.needs_working_files
            size = "×".join(map(str, preparation.patch))
            asked = f"volumes.patch {size}" if volumes else f"augment.crop={recipe.augment.crop}"
            hint = f"{error.hint}; with volumes.patch" if volumes else error.hint
            raise UsageError(f"{asked}: {error.what}", hint) from error
        if recipe.training.batch_size < network.least_batch:
            raise UsageError(
                f"training.batch_size={recipe.training.batch_size}: the network '{recipe.network.name}' cannot train "
                f"on fewer than {network.least_batch} images at once",
                f"use {network.least_batch} or more, or another network",
            )
        return network

    # a seed of its own: whatever was drawn before, such as a shuffled class order, changes no weight
    with seeded(derive_seed(recipe.seed, "network")):
        return method_class(recipe.method.name)(Setup(check_method(recipe), recipe.training, network))


def check_method(recipe: Recipe) -> Options:
    """The method's own options, checked. Raises UsageError with the nearest option name."""
    kind = method_class(recipe.method.name)
    try:
        return kind.Options.model_validate(recipe.method.settings)
    except ValidationError as error:
        raise UsageError(*explain(error, kind.Options, f"method '{recipe.method.name}'")) from error


def method_class(name: str) -> type[Method[Options]]:
    """Method by its name in the table or as ``package.module:Class``."""
    target = METHODS[name].target if name in METHODS else name
    if not is_foreign(target):
        raise UsageError(f"there is no method '{name}'", f"{nearest(name, METHODS)}, or write package.module:Class")
    kind = load(target, "method")
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UsageError(
            f"'{name}' is not a method: it does not derive from perdure.methods.method.Method",
            "see docs/adding-a-method.md",
        )
    return kind
