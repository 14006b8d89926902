"""Recipes of CLIP-CISS: the published settings (specification 1), and headers whose commands can be run."""

from __future__ import annotations

import inspect
import re
import shlex
from importlib import import_module

import pytest

from perdure.config.build import build_method, check_method
from perdure.config.load import load_recipe, shipped
from perdure.config.preparations import build_preparation
from perdure.data.catalog import DATASETS
from perdure.data.preparation import Photo2D
from perdure.methods import METHODS
from perdure.networks.build import network_options
from perdure.streams.class_incremental import split_classes
from perdure.streams.published import published_counts

RECIPES = sorted(name for name in shipped() if name.startswith("clip-ciss/"))
ADE = {  # steps and rates of the first and of later tasks, and the selection of images
    "100-50": (30000, 25000, 1e-5, 5e-6, "partition"),
    "50-50": (20000, 20000, 1e-5, 5e-6, "partition"),
    "100-10": (30000, 5000, 1e-5, 8e-6, "partition"),
    "100-5": (30000, 4000, 1e-5, 8e-6, "overlap"),
}
VOC = {"19-1": 2, "15-5": 2, "15-1": 6, "10-1": 11, "5-3": 6}
PUBLISHED = [f"clip-ciss/ade-{name}" for name in ADE] + [f"clip-ciss/voc-{name}" for name in VOC]
EDGES = (256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024)


def test_all_published_settings_are_shipped() -> None:
    assert sorted([*PUBLISHED, "clip-ciss/digits", "clip-ciss/clothing"]) == RECIPES


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    recipe = load_recipe(name)
    training, augment = recipe.training, recipe.augment
    assert (training.optimizer, training.batch_size, training.weight_decay, training.clip) == ("adamw", 16, 0.01, 35)
    assert (training.schedule, training.warmup_steps, training.neck_lr) == ("warmup_poly", 1500, 10)
    assert (augment.crop, augment.short_edges, augment.jitter, augment.flip) == (512, EDGES, True, 0.5)
    assert (augment.mean, augment.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    evaluate = recipe.evaluate
    assert (evaluate.protocol, evaluate.size, evaluate.window, evaluate.batch_size) == ("scaled", 512, 512, 1)
    assert round(evaluate.window * (1 - evaluate.overlap)) == 341
    assert recipe.network.settings == {"encoder": "vit_b16", "weights": "ViT-B-16.pt"}
    options = check_method(recipe).model_dump()
    weights = [options[f"lambda_{part}"] for part in ("presence", "focal", "dice")]
    assert [*weights, options["gpd"], options["qd"], options["gpd_chunk"]] == [5, 50, 1, 1, 0.15, 2]
    assert (options["pseudo"], options["background"], options["gpd_temperature"]) == ("reference", "none", 1)
    assert options["names"] in (recipe.sets[0].name, "ade20k")
    preparation = build_preparation(recipe, "segmentation")
    assert isinstance(preparation, Photo2D)
    assert (preparation.short_edges, preparation.jitter, preparation.protocol) == (EDGES, True, "scaled")


@pytest.mark.parametrize("name", ADE)
def test_length_and_rate_on_ade(name: str) -> None:
    recipe = load_recipe(f"clip-ciss/ade-{name}")
    training, stream = recipe.training, recipe.stream
    found = (training.steps, training.later_steps, training.lr, training.later_lr, stream.setting)
    assert found == ADE[name]
    tasks = split_classes(range(1, 151), stream.base, stream.step)
    counts = published_counts("ade20k", name, stream.setting).get("train")
    assert counts is None or len(counts) == len(tasks)


@pytest.mark.parametrize("name", VOC)
def test_tasks_on_voc(name: str) -> None:
    stream = load_recipe(f"clip-ciss/voc-{name}").stream
    assert len(split_classes(range(1, 21), stream.base, stream.step)) == VOC[name]
    assert (f"{stream.base}-{stream.step}", stream.setting) == (name, "overlap")


@pytest.mark.parametrize("name", RECIPES)
def test_header_commands_run_this_recipe_and_its_twins(name: str) -> None:
    text = shipped()[name].read_text(encoding="utf-8")
    header = text[: text.index("\nname:")]
    assert all(line.startswith("#") for line in header.splitlines())
    found = [shlex.split(line, comments=True) for line in re.findall(r"^# +perdure (.+)$", header, re.MULTILINE)]
    methods = []
    for verb, recipe_name, *overrides in found:
        assert (verb, recipe_name) == ("run", name)
        twin = load_recipe(recipe_name, overrides)
        check_method(twin)
        methods.append((twin.method.name, twin.method.settings.get("gpd")))
    assert methods[0][0] == "clip_ciss"
    assert ("clip_ciss", 0) in methods and ("finetune", None) in methods
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", RECIPES)
def test_network_and_data_know_their_keys(name: str) -> None:
    recipe = load_recipe(name)
    assert set(recipe.network.settings) <= set(network_options(recipe.network.name))
    module, _, function = DATASETS[recipe.sets[0].name].target.partition(":")
    known = set(inspect.signature(getattr(import_module(module), function)).parameters) - {"root"}
    assert set(recipe.sets[0].settings) <= known


@pytest.mark.parametrize("method", [m for m in METHODS if m != "ccsi"])
def test_the_methods_of_segmentation_can_be_built_on_the_digits_recipe(method: str) -> None:
    recipe = load_recipe("clip-ciss/digits", [f"method={method}"])
    built = build_method(recipe, build_preparation(recipe, "segmentation"))
    assert sum(p.numel() for p in built.parameters()) > 10_000
