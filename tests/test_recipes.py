"""Shipped recipes: they parse, hold the published settings, and their header says how to run them."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from importlib import import_module
from typing import NamedTuple

import pytest
import torch

from perdure.cli.demo import DEMO_VOLUMES
from perdure.config.build import check_method, method_class
from perdure.config.load import load_recipe, shipped
from perdure.config.recipe import Recipe
from perdure.data.catalog import DATASETS
from perdure.networks.build import build_network, network_options
from perdure.networks.weights import PACKAGES
from perdure.streams.class_incremental import split_classes
from perdure.streams.published import published_counts

# ccsi, cgr and clip-ciss have files of their own; recipes of several data sets are tested where their streams are
OTHERS = ("ccsi/", "cgr/", "clip-ciss/", "data-sets/")
RECIPES = sorted(n for n in shipped() if not n.startswith(OTHERS) and n != "demo-volumes")
CLASSES = {"voc": 20, "ade20k": 150, "cityscapes": 19, "camvid": 11, "digits": 10}


class Published(NamedTuple):
    """One row of the tables of splits, optimisation and results (specification of STAR, 1.2, 1.6, 6.1)."""

    steps: int
    setting: str
    miou: str | None = None
    epochs: int = 60
    lr: float = 1e-3
    schedule: str = "poly"
    pos_weight: float = 4
    bookkeeping: str = "auto"


_ADE = functools.partial(Published, setting="overlap", epochs=100, lr=2.5e-3, schedule="warmup_poly", pos_weight=30)
_CITY = functools.partial(Published, setting="overlap", lr=5e-3, bookkeeping="carried")
PUBLISHED = {
    "star/voc-19-1-overlap": Published(2, "overlap", "76.61"),
    "star/voc-15-5-overlap": Published(2, "overlap", "74.86"),
    "star/voc-15-1-overlap": Published(6, "overlap", "72.90"),
    "star/voc-10-1-overlap": Published(11, "overlap", "64.86"),
    "star/voc-5-3-overlap": Published(6, "overlap", "64.54"),
    "star/voc-19-1-disjoint": Published(2, "disjoint", "76.38"),
    "star/voc-15-5-disjoint": Published(2, "disjoint", "73.48"),
    "star/voc-15-1-disjoint": Published(6, "disjoint", "70.77"),
    "star/ade-100-50-overlap": _ADE(2, miou="36.39"),
    "star/ade-100-10-overlap": _ADE(6, miou="34.91"),
    "star/ade-100-5-overlap": _ADE(11),
    "star/ade-50-50-overlap": _ADE(3, miou="34.44"),
    "star/cityscapes-13-6-overlap": _CITY(2),
    "star/cityscapes-13-1-overlap": _CITY(7),
}


def header(name: str) -> str:
    """Comment above the first key."""
    lines = shipped()[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[: next(i for i, text in enumerate(lines) if not text.startswith("#"))])


def commands(name: str) -> list[list[str]]:
    """Words after `perdure` of each command in the header."""
    found = re.findall(r"^# +perdure (.+)$", header(name), re.MULTILINE)
    return [shlex.split(text, comments=True) for text in found]


def steps(recipe: Recipe) -> int:
    """Tasks of a recipe's stream."""
    total = CLASSES[recipe.sets[0].name]
    return len(split_classes(range(1, total + 1), recipe.stream.base, recipe.stream.step))


def test_every_published_setting_is_shipped() -> None:
    assert set(PUBLISHED) | {"demo", "star/camvid-6-1"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses_and_says_its_own_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    assert steps(recipe) >= 2


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("method", ["star", "finetune", "joint"])
def test_twins_differ_in_the_method_only(name: str, method: str) -> None:
    own, twin = load_recipe(name), load_recipe(name, [f"method={method}", "data.root=somewhere"])
    check_method(twin)
    assert twin.method.name == method
    assert twin.method.settings == {}
    same = {"method", "data"}
    assert own.model_dump(exclude=same) == twin.model_dump(exclude=same)


@pytest.mark.parametrize("name", RECIPES)
def test_method_network_and_data_know_their_keys(name: str) -> None:
    recipe = load_recipe(name)
    check_method(recipe)
    assert set(recipe.network.settings) <= set(network_options(recipe.network.name))
    module, _, function = DATASETS[recipe.sets[0].name].target.partition(":")
    known = set(inspect.signature(getattr(import_module(module), function)).parameters) - {"root"}
    assert set(recipe.sets[0].settings) <= known


def test_networks_can_be_built_and_take_the_crops() -> None:
    built: dict[str, tuple[int, ...]] = {}
    for name in RECIPES:
        recipe = load_recipe(name)
        settings = recipe.network.settings | {"weights": "random"}
        key = f"{recipe.network.name} {sorted(settings.items())}"
        if key not in built:
            built[key] = build_network(recipe.network.name, 2, 3, **settings).multiple
        crop = recipe.augment.crop
        assert all(crop % side == 0 for side in built[key]), name
    assert len(built) == 3  # the paper's, the demo's, and CamVid's


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "demo"])
def test_header_commands_run_this_recipe_and_its_twins(name: str) -> None:
    methods = []
    for verb, recipe_name, *overrides in commands(name):
        assert (verb, recipe_name) == ("run", name)
        assert any(o.startswith("data.root=") for o in overrides)
        methods.append(load_recipe(recipe_name, overrides).method.name)
    assert methods == ["star", "finetune", "joint"]


def test_header_of_the_demo_names_it() -> None:
    assert header("demo").startswith("# perdure run demo ")
    assert header("demo-volumes").startswith("# perdure run demo-volumes ")


@pytest.mark.parametrize("method", DEMO_VOLUMES)
def test_demo_of_volumes(method: str) -> None:
    recipe = load_recipe("demo-volumes", [f"method={method}"])
    check_method(recipe)
    assert [section.settings["set"] for section in recipe.sets] == ["organs", "vessels", "lesions"]
    network = build_network(recipe.network.name, 3, 1, **recipe.network.settings)
    patch = recipe.volumes.patch
    assert patch is not None and all(side % step == 0 for side, step in zip(patch, network.multiple, strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hyper_parameters(name: str) -> None:
    recipe, published = load_recipe(name), PUBLISHED[name]
    training, augment = recipe.training, recipe.augment
    assert steps(recipe) == published.steps
    assert recipe.stream.setting == published.setting
    assert (training.epochs, training.later_epochs) == (published.epochs, None)
    assert (training.lr, training.later_lr) == pytest.approx((published.lr, published.lr / 10))
    assert (training.schedule, training.warmup) == (published.schedule, 0.2)
    assert (training.batch_size, training.pos_weight) == (24, published.pos_weight)
    assert (training.optimizer, training.weight_decay, training.clip) == ("sgd", 1e-4, None)
    assert (training.neck_lr, training.classifier_lr, training.new_classifier_lr) == (10, 10, 100)
    assert training.freeze_norm
    assert training.freeze_dropout
    assert (augment.crop, augment.area, augment.flip) == (512, (0.5, 2.0), 0.5)
    assert (augment.mean, augment.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (recipe.evaluate.size, recipe.evaluate.batch_size, recipe.seed) == (512, 1, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_method_settings(name: str) -> None:
    options = check_method(load_recipe(name)).model_dump()
    weights = (options["lambda_mbce"], options["lambda_ocfm"], options["lambda_sad"], options["threshold"])
    assert weights == (1, 5, 0.05, 0.5)
    assert options["bookkeeping"] == PUBLISHED[name].bookkeeping
    assert options["compat"] == ()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network(name: str) -> None:
    network = load_recipe(name).network
    options = network_options(network.name) | network.settings
    assert (options["backbone"], options["output_stride"], options["width"]) == ("resnet101", 16, 256)
    assert (options["weights"], options["dropout"]) == ("imagenet", 0.1)
    assert set(network.settings) == {"backbone", "output_stride", "weights"}


def test_network_of_the_published_recipes_is_the_papers() -> None:
    network = load_recipe("star/voc-15-1-overlap").network
    body = build_network(network.name, 2, 3, **network.settings | {"weights": "random"}).body
    norms = [m for m in body.get_submodule("backbone").modules() if isinstance(m, torch.nn.BatchNorm2d)]
    dilated = [m for m in body.get_submodule("neck").modules() if isinstance(m, torch.nn.Conv2d)]
    assert {norm.momentum for norm in norms} == {0.01}
    assert {conv.dilation[0] for conv in dilated if conv.kernel_size == (3, 3)} == {1, 6, 12, 18}


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_says_what_to_compare_with(name: str) -> None:
    miou = PUBLISHED[name].miou
    assert re.findall(r"\d\d\.\d\d", header(name)) == ([miou] if miou else [])
    if miou is None:
        assert "Published: no" in header(name)


@pytest.mark.parametrize("name", [n for n in PUBLISHED if "cityscapes" not in n])
def test_published_image_counts_have_as_many_steps(name: str) -> None:
    recipe = load_recipe(name)
    split = f"{recipe.stream.base}-{recipe.stream.step}"
    counts = published_counts(recipe.sets[0].name, split, recipe.stream.setting)
    assert counts["train"]
    assert {len(sizes) for sizes in counts.values()} == {PUBLISHED[name].steps}


@pytest.mark.parametrize("name", [n for n in RECIPES if (published := PUBLISHED.get(n)) and published.miou])
def test_defects_named_in_the_header_are_options(name: str) -> None:
    override = re.search(r"'(method\.compat=\[.*\])'", header(name))
    assert override is not None
    compat = check_method(load_recipe(name, [override[1]])).model_dump()["compat"]
    schema = method_class("star").Options.model_json_schema()
    assert set(compat) == set(schema["properties"]["compat"]["items"]["enum"])


@pytest.mark.parametrize("name", ["star/camvid-6-1", "star/clothing-4-2"])
def test_photographs_are_learned_from_installed_features(name: str) -> None:
    recipe = load_recipe(name)
    first, later = map(int, name.rpartition("/")[2].split("-")[1:])
    assert (recipe.stream.base, recipe.stream.step, recipe.stream.setting) == (first, later, "overlap")
    assert recipe.network.settings["weights"] == "installed"
    assert recipe.network.settings["backbone"] in PACKAGES
    assert set(recipe.augment.mean) | set(recipe.augment.std) == {0.5}  # what these weights were trained with


def test_camvid_teaches_its_classes_in_natural_order() -> None:
    recipe = load_recipe("star/camvid-6-1")
    assert (recipe.stream.order, steps(recipe)) == ("natural", 6)
