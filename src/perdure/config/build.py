"""From a checked recipe to objects: source, stream, method."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from perdure.config.load import explain
from perdure.config.recipe import Recipe
from perdure.data.catalog import HELD_OUT, open_source
from perdure.data.preparation import ClassImage, Photo2D, Preparation
from perdure.data.readers.unlabelled import open_unlabelled
from perdure.data.source import AbsentSplitError, Kind, Source
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
from perdure.streams.task import Stream, merged


@dataclass(frozen=True)
class Experiment:
    """The objects of one recipe."""

    recipe: Recipe
    source: Source
    stream: Stream
    method: Method[Options]


def build_experiment(recipe: Recipe, sealed: int = 0, pretrained: bool = True) -> Experiment:
    """Open the data, make the stream and build the method; reads masks (cached) but trains nothing.

    So many tasks as are ``sealed`` need no training images any more. ``pretrained``: see :func:`build_method`.

    Raises:
        UsageError: A name or an option is wrong.
        DataError: The data cannot be used.
    """
    check_method(recipe)
    held_out = {} if recipe.data.validation is None else {HELD_OUT: recipe.data.validation}
    source = open_source(recipe.data.name, recipe.data.root, {**recipe.data.settings, **held_out})
    check_kinds(recipe, source)
    stream = build_stream(recipe, source, sealed)
    if recipe.engine.validate_every:
        try:
            source.names("val")
        except AbsentSplitError as error:
            raise UsageError(
                f"engine.validate_every={recipe.engine.validate_every}: {error.what}", error.hint
            ) from error
    method = build_method(recipe, stream.tasks[0].preparation, pretrained)
    check_recurring(recipe.method.name, method, stream)
    return Experiment(recipe, source, stream, method)


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


def check_kinds(recipe: Recipe, source: Source) -> None:
    """Raise UsageError unless method and network are made for what the data set's labels describe."""
    labels = {"segmentation": "labels every pixel", "classification": "has one class an image"}[source.kind]
    able = method_class(recipe.method.name).kinds
    if source.kind not in able:
        fitting = ", ".join(name for name in METHODS if source.kind in method_class(name).kinds)
        raise UsageError(
            f"the method '{recipe.method.name}' is for {' and '.join(sorted(able))}, but the data set "
            f"'{recipe.data.name}' {labels}",
            f"methods for it: {fitting}",
        )
    network = NETWORKS.get(recipe.network.name)
    if network is not None and network.kind != source.kind:
        fitting = ", ".join(name for name, entry in NETWORKS.items() if entry.kind == source.kind)
        raise UsageError(
            f"the network '{recipe.network.name}' is for {network.kind}, but the data set '{recipe.data.name}' "
            f"{labels}",
            f"networks for it: {fitting}",
        )


def build_stream(recipe: Recipe, source: Source, sealed: int = 0) -> Stream:
    """The recipe's stream over an open source; upper bounds get it merged into one task."""
    stream = build_tasks(recipe, source, sealed)
    return merged(stream) if method_class(recipe.method.name).sees_all_tasks else stream


def build_tasks(recipe: Recipe, source: Source, sealed: int = 0) -> Stream:
    """The stream as its protocol makes it, whatever the method."""
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
            raise UsageError(f"augment.crop={recipe.augment.crop}: {error.what}", error.hint) from error
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
