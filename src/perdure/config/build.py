"""From a checked recipe to objects: source, stream, method."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import BaseModel, ValidationError

from perdure.config.load import explain
from perdure.config.recipe import Recipe
from perdure.data.catalog import open_source
from perdure.data.dataset import Transform
from perdure.data.readers.unlabelled import open_unlabelled
from perdure.data.source import Kind, Source
from perdure.data.transforms import class_transform, eval_transform, train_transform
from perdure.errors import UsageError, nearest
from perdure.methods import METHODS
from perdure.methods.method import Method
from perdure.methods.options import Setup
from perdure.networks.build import NETWORKS, build_network
from perdure.networks.network import Network
from perdure.seeds import derive_seed, seeded
from perdure.streams.class_incremental import class_incremental
from perdure.streams.merged import merged
from perdure.streams.pool import Pool
from perdure.streams.task import Stream


@dataclass(frozen=True)
class Experiment:
    """The objects of one recipe."""

    recipe: Recipe
    source: Source
    stream: Stream
    method: Method


def build_experiment(recipe: Recipe) -> Experiment:
    """Open the data, make the stream and build the method; reads masks (cached) but trains nothing.

    Raises:
        UsageError: A name or an option is wrong.
        DataError: The data cannot be used.
    """
    check_method(recipe)
    source = open_source(recipe.data.name, recipe.data.root, recipe.data.settings)
    check_kinds(recipe, source)
    stream = build_stream(recipe, source)
    return Experiment(recipe, source, stream, build_method(recipe))


def check_kinds(recipe: Recipe, source: Source) -> None:
    """Raise UsageError unless method and network are made for what the data set's labels describe."""
    labels = {"segmentation": "labels every pixel", "classification": "has one class an image"}[source.kind]
    able = kinds_of(method_class(recipe.method.name))
    if source.kind not in able:
        fitting = ", ".join(name for name in METHODS if source.kind in kinds_of(method_class(name)))
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


def kinds_of(method: type[Method]) -> frozenset[Kind]:
    """What a method can learn; one that does not say so is for segmentation."""
    kinds: frozenset[Kind] = getattr(method, "kinds", frozenset({"segmentation"}))
    return kinds


def build_stream(recipe: Recipe, source: Source) -> Stream:
    """The recipe's stream over an open source; upper bounds get it merged into one task."""
    stream = build_tasks(recipe, source)
    return merged(stream) if method_class(recipe.method.name).sees_all_tasks else stream


def build_tasks(recipe: Recipe, source: Source) -> Stream:
    """The stream as its protocol makes it, whatever the method."""
    plan = recipe.stream
    train, test = _transforms(recipe, source.kind)
    return class_incremental(
        source,
        base=plan.base,
        step=plan.step,
        setting=plan.setting,
        order=plan.order,
        order_seed=recipe.seed,
        partition_file=plan.partition_file,
        train_transform=train,
        eval_transform=test,
        short_last=plan.short_last,
        pool=_pool(recipe, source),
    )


def _pool(recipe: Recipe, source: Source) -> Pool | None:
    """What the protocol grants without labels; a folder's images get as many channels as the data set's have."""
    pool, folder = recipe.stream.pool, recipe.stream.pool_folder
    if (pool == "folder") != (folder is not None):
        raise UsageError(
            f"stream.pool is {pool or 'not given'} and stream.pool_folder is {folder or 'not given'}",
            "images from a folder need both: stream.pool=folder stream.pool_folder=DIR",
        )
    if pool != "folder":
        return pool
    assert folder is not None
    channels = source.image("train", source.names("train")[0]).shape[0]
    if channels not in (1, 3):
        raise UsageError(
            f"images of '{source.name}' have {channels} channels, those of files have 1 or 3", "set stream.pool=val"
        )
    return open_unlabelled(folder.expanduser(), source.kind, source.space, channels)


def _transforms(recipe: Recipe, kind: Kind) -> tuple[Transform, Transform]:
    """How training and test images are shown."""
    augment, mean, std = recipe.augment, recipe.augment.mean, recipe.augment.std
    if kind == "classification":
        side = augment.crop
        return class_transform(side, mean, std, augment.flip), class_transform(side, mean, std)
    train = train_transform(augment.crop, augment.area, augment.flip, mean, std)
    return train, eval_transform(recipe.evaluate.size, mean, std)


def build_method(recipe: Recipe, pretrained: bool = True) -> Method:
    """The method with its network, initialised from the recipe's seed alone.

    Args:
        recipe: The recipe.
        pretrained: Load the weights that the recipe starts from; not needed where a sealed task is restored.
    """
    kind = method_class(recipe.method.name)
    setup = Setup(check_method(recipe), recipe.training, lambda: _network(recipe, pretrained))
    with seeded(derive_seed(recipe.seed, "network")):
        return cast("Method", cast(Any, kind)(setup))


def as_module(method: Method) -> torch.nn.Module:
    """A method as the module that it is; `method_class` has checked it."""
    return cast("torch.nn.Module", method)


def _network(recipe: Recipe, pretrained: bool) -> Network:
    settings = dict(recipe.network.settings)
    if not pretrained and "weights" in settings:
        settings["weights"] = "random"
    network = build_network(recipe.network.name, dims=2, in_channels=len(recipe.augment.mean), **settings)
    try:
        network.check_size((recipe.augment.crop,) * 2)
    except UsageError as error:
        raise UsageError(f"augment.crop={recipe.augment.crop}: {error.what}", error.hint) from error
    if recipe.training.batch_size < network.least_batch:
        raise UsageError(
            f"training.batch_size={recipe.training.batch_size}: the network '{recipe.network.name}' cannot train on "
            f"fewer than {network.least_batch} images at once",
            f"use {network.least_batch} or more, or another network",
        )
    return network


def check_method(recipe: Recipe) -> BaseModel:
    """The method's own options, checked. Raises UsageError with the nearest option name."""
    kind = method_class(recipe.method.name)
    try:
        return kind.Options.model_validate(recipe.method.settings)
    except ValidationError as error:
        raise UsageError(*explain(error, kind.Options, f"method '{recipe.method.name}'")) from error


def method_class(name: str) -> type[Method]:
    """Method by its name in the table or as ``package.module:Class``."""
    target = METHODS[name].target if name in METHODS else name
    module, colon, attribute = target.partition(":")
    if not colon:
        raise UsageError(f"there is no method '{name}'", f"{nearest(name, METHODS)}, or write package.module:Class")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's own module does when it is imported
        raise UsageError(
            f"the method '{name}' cannot be imported: {type(error).__name__}: {error}",
            "start `python -m perdure` in the folder that holds the module; --debug shows where it fails",
        ) from error
    missing = [m for m in ("Options", "sees_all_tasks", "begin", "phases", "predict", "kept") if not hasattr(kind, m)]
    if not missing and not (isinstance(kind.Options, type) and issubclass(kind.Options, BaseModel)):
        missing = ["Options made with pydantic"]
    if missing or not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        lacks = missing[0] if missing else "torch.nn.Module as its base"
        raise UsageError(f"'{name}' is not a method: it lacks {lacks}", "see docs/adding-a-method.md")
    return cast("type[Method]", kind)
