"""From a checked recipe to objects: source, stream, method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from perdure.config.data_sets import data_sets, label, open_sources
from perdure.config.load import explain
from perdure.config.preparations import build_preparation
from perdure.config.recipe import Recipe, StreamSection
from perdure.data.gone import GoneSource
from perdure.data.preparation import Preparation
from perdure.data.readers.unlabelled import open_unlabelled
from perdure.data.source import AbsentSplitError, Kind, Source
from perdure.data.volumes.options import VolumeOptions
from perdure.errors import UsageError, nearest
from perdure.files import home
from perdure.foreign import is_foreign, load
from perdure.methods import METHODS
from perdure.methods.method import Method
from perdure.methods.options import Options, Setup
from perdure.networks.build import NETWORKS, build_network
from perdure.networks.network import Network
from perdure.seeds import derive_seed, seeded
from perdure.streams.class_incremental import Pool, class_incremental
from perdure.streams.description import DescribedStream
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
        check_axes(recipe, section.name, source)
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
    for task in stream.tasks:
        if method.most_classes is not None and len(task.annotated) > method.most_classes:
            raise UsageError(
                f"task '{task.name}' annotates {len(task.annotated)} classes; a generator of pairs codes at most "
                f"{method.most_classes} in one channel",
                "use fewer classes per task, or another method",
            )
    return Experiment(recipe, sources, stream, method, (*notes, *method.options.unused()))


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


def check_axes(recipe: Recipe, name: str, source: Source) -> None:
    """Raise UsageError where a recipe for volumes meets pictures, or one for pictures volumes.

    Before anything is read: most networks can be built for both, and a recipe for volumes would otherwise train on
    pictures with settings that nobody chose.
    """
    view = recipe.volumes.view
    if isinstance(source, GoneSource):
        return
    if source.dims == 2:
        plain = VolumeOptions(view=view).model_dump()
        chosen = [f"volumes.{key}" for key, value in recipe.volumes.model_dump().items() if value != plain[key]]
        if view == "volumes" or (view == "auto" and chosen):
            raise UsageError(
                f"the recipe is for volumes ({'volumes.view=volumes' if view == 'volumes' else chosen[0]}), and "
                f"'{name}' holds pictures",
                "use a recipe for pictures, or volumes.view=pictures with the section augment",
            )
        return
    if isinstance(recipe.stream, StreamSection):
        raise UsageError(
            f"'{name}' holds volumes, and stream.kind=class_incremental is for pictures",
            "volumes are learned by stream.kind=data_sets, as in the recipe data-sets/volumes",
        )
    if view == "pictures":
        raise UsageError(
            f"the recipe is for pictures (volumes.view=pictures), and '{name}' holds volumes",
            "use a recipe for volumes such as data-sets/volumes, or volumes.view=slices for single slices",
        )
    network = NETWORKS.get(recipe.network.name)
    if view != "slices" and network is not None and 3 not in network.dims:
        fitting = ", ".join(n for n, entry in NETWORKS.items() if 3 in entry.dims)
        raise UsageError(
            f"the network '{recipe.network.name}' does not work in 3D, and '{name}' holds volumes",
            f"networks that do: {fitting}; or volumes.view=slices for single slices",
        )


def build_stream(
    recipe: Recipe, sources: Sequence[Source], sealed: int = 0, known: DescribedStream | None = None
) -> tuple[Stream, list[str]]:
    """The recipe's stream over open data sets, and notes on it; upper bounds get it merged into one task."""
    notes: list[str] = []
    if isinstance(recipe.stream, StreamSection):
        stream = build_tasks(recipe, sources[0], sealed)
    else:
        stream, notes = data_sets(recipe, recipe.stream, sources, known, sealed)
    return (merged(stream) if method_class(recipe.method.name).sees_all_tasks else stream), notes


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
        weights = str(recipe.network.settings.get("weights", "random"))
        return method_class(recipe.method.name)(Setup(check_method(recipe), recipe.training, network, weights))


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
