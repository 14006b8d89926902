"""Shipped recipes of CCSI: they parse, hold the sweeps' values, and their header says how to run them."""

from __future__ import annotations

import inspect
import re
import shlex
from importlib import import_module
from typing import NamedTuple

import pytest

from perdure.config.build import check_method, method_class
from perdure.config.load import load_recipe, shipped
from perdure.data.catalog import DATASETS
from perdure.methods.ccsi.options import CcsiOptions
from perdure.methods.ccsi.terms import less_forget_weight
from perdure.networks.build import NETWORKS, build_network, network_options
from perdure.streams.class_incremental import split_classes

RECIPES = sorted(name for name in shipped() if name.startswith("ccsi/"))
IMAGES = [name for name in RECIPES if load_recipe(name).method.name == "ccsi"]


class Sweep(NamedTuple):
    """One data set of the published sweeps (specification of CCSI, 1.1, 3.1, 4.3 and 4.9)."""

    flag: str
    channels: int
    seed: int
    tasks: tuple[int, ...]
    images: tuple[int, ...]
    share: tuple[float, ...]
    momentum: tuple[float, ...]
    temperature: tuple[float, ...]
    tv2: tuple[float, ...]
    distillation: tuple[float, ...]


USUAL = (640, 960, 1200)
PUBLISHED = {
    "ccsi/blood": Sweep(
        "bloodmnist", 3, 0, (2, 2, 2, 2), USUAL, (0.66,) * 3, (0.9, 0.999, 0.9), (1, 1, 1), (0.01, 0.001, 0.01),
        (5.0, 7.071, 8.660),
    ),
    "ccsi/organ-a": Sweep(
        "organamnist", 1, 2, (3, 3, 3, 2), USUAL, (0.66, 0.66, 0.5), (0.9, 0.99, 0.9), (1, 5, 1), (0.1, 0.001, 0.1),
        (5.0, 7.071, 8.660),
    ),
    "ccsi/path": Sweep(
        "pathmnist", 3, 1, (3, 2, 2, 2), (640, 1000, 1400), (0.66,) * 3, (0.99, 0.9, 0.9), (1, 1, 1),
        (0.01, 0.01, 0.001), (6.124, 7.906, 9.354),
    ),
    "ccsi/tissue": Sweep(
        "tissuemnist", 1, 3, (2, 2, 2, 2), USUAL, (0.66,) * 3, (0.99, 0.99, 0.9), (1, 5, 5), (0.01, 0.001, 0.001),
        (5.0, 7.071, 8.660),
    ),
}  # fmt: skip


@pytest.mark.golden
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_values_of_the_published_sweeps(name: str) -> None:
    recipe, sweep = load_recipe(name), PUBLISHED[name]
    options = check_method(recipe)
    assert isinstance(options, CcsiOptions)
    assert (recipe.sets[0].settings["flag"], recipe.seed, len(recipe.augment.mean)) == (
        sweep.flag,
        sweep.seed,
        sweep.channels,
    )
    groups = split_classes(range(sum(sweep.tasks)), recipe.stream.base, recipe.stream.step, recipe.stream.short_last)
    assert tuple(map(len, groups)) == sweep.tasks
    old = 0
    for task, later in enumerate(sweep.tasks[1:], start=1):
        old += sweep.tasks[task - 1]
        at = options.at(task)
        found = (at.share, at.idc_momentum, at.idc_temperature, at.synthesis.tv2)
        i = task - 1
        assert found == (sweep.share[i], sweep.momentum[i], sweep.temperature[i], sweep.tv2[i])
        assert at.groups_before(task, old) * at.synthesis.group_size == sweep.images[i]
        weight = less_forget_weight(at.lambda_lf, old, recipe.stream.step)
        assert weight == pytest.approx(sweep.distillation[i], abs=5e-4)
        assert later <= recipe.stream.step
    training, synthesis = recipe.training, options.synthesis
    assert (training.epochs, training.batch_size, training.lr, training.momentum, training.weight_decay) == (
        100,
        40,
        0.1,
        0,
        0,
    )
    assert (training.schedule, training.stairs, training.later_lr) == ("stairs", (0.07, 0.06, 0.3), 0.1)
    assert (synthesis.steps, synthesis.group_size, synthesis.lr, synthesis.betas) == (5000, 40, 0.05, (0.5, 0.9))
    assert (synthesis.l2, synthesis.moments, synthesis.first_layer, synthesis.noise) == (0.1, 1, 10, 0.1)
    assert (options.margin, options.margin_top, options.lambda_margin, options.lambda_lf) == (0.3, 1, 1, 5)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses_and_everything_knows_its_keys(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.about
    check_method(recipe)
    assert set(recipe.network.settings) <= set(network_options(recipe.network.name))
    module, _, function = DATASETS[recipe.sets[0].name].target.partition(":")
    known = set(inspect.signature(getattr(import_module(module), function)).parameters) - {"root"}
    assert set(recipe.sets[0].settings) <= known
    assert NETWORKS[recipe.network.name].kind in method_class(recipe.method.name).kinds
    for method in ("finetune", "joint"):
        assert check_method(load_recipe(name, [f"method={method}"])) is not None


@pytest.mark.parametrize("name", IMAGES)
def test_the_network_takes_the_images(name: str) -> None:
    recipe = load_recipe(name)
    network = build_network(recipe.network.name, 2, len(recipe.augment.mean), **recipe.network.settings)
    network.check_size((recipe.augment.crop,) * 2)


@pytest.mark.parametrize("name", RECIPES)
def test_header_commands_run_this_recipe(name: str) -> None:
    lines = re.findall(r"^# +perdure (.+)$", shipped()[name].read_text(encoding="utf-8"), re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in lines]
    assert commands
    for verb, recipe_name, *overrides in commands:
        assert (verb, recipe_name) == ("run", name)
        recipe = load_recipe(recipe_name, overrides)
        assert (recipe.sets[0].root is not None) == bool(DATASETS[recipe.sets[0].name].layout)
        check_method(recipe)


def test_the_faithful_profile_starts_from_a_published_recipe() -> None:
    words = [
        "method.profile=faithful",
        "stream.pool=test",
        "network.norm_momentum=1.0",
        "network.group_statistics=true",
    ]
    recipe = load_recipe("ccsi/blood", words)
    options = check_method(recipe)
    assert isinstance(options, CcsiOptions)
    assert options.idc_source == "pool" and options.compat == ("transductive",) and recipe.stream.pool == "test"
    assert options.at(2).synthesis.tv2 == 0.001 and options.at(2).synthesis.statistics == "position"
