"""Shipped recipes of CGR: they parse, fit their network, and their header says how to run them and their twins."""

from __future__ import annotations

import inspect
import re
import shlex
from importlib import import_module

import pytest

from perdure.config.build import check_method
from perdure.config.load import load_recipe, shipped
from perdure.config.recipe import DataSetsSection
from perdure.data.catalog import DATASETS
from perdure.methods.cgr.options import CgrOptions
from perdure.networks.build import build_network, network_options
from perdure.networks.joint_diffusion.network import PLANS

RECIPES = sorted(name for name in shipped() if name.startswith("cgr/"))


def test_the_recipes_that_are_there() -> None:
    assert RECIPES == ["cgr/cfp", "cgr/pfc", "cgr/phantoms", "cgr/real"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_method_its_networks_and_its_data(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.about
    options = check_method(recipe)
    assert isinstance(options, CgrOptions)
    side = recipe.volumes.size
    network = build_network(recipe.network.name, 2, recipe.volumes.channels or 1, **recipe.network.settings)
    network.check_size((side, side))
    assert side % 2 ** (len(PLANS[options.generator.size].widths) - 1) == 0
    assert set(recipe.network.settings) <= set(network_options(recipe.network.name))
    for section in recipe.sets:
        module, _, function = DATASETS[section.name].target.partition(":")
        assert set(section.settings) <= set(inspect.signature(getattr(import_module(module), function)).parameters)
    assert isinstance(recipe.stream, DataSetsSection)
    assert recipe.stream.elsewhere == "absent"  # structures of different tasks do not share images
    assert {task.name for task in recipe.stream.tasks} == {"cardiac", "fundus", "prostate"}


@pytest.mark.parametrize("name", RECIPES)
def test_header_commands_run_this_recipe_and_its_twins(name: str) -> None:
    text = shipped()[name].read_text(encoding="utf-8")
    methods = []
    for line in re.findall(r"^# +perdure (.+)$", text, re.MULTILINE):
        verb, recipe, *overrides = shlex.split(line, comments=True)
        assert (verb, recipe) == ("run", name)
        loaded = load_recipe(recipe, overrides)
        check_method(loaded)
        methods.append(loaded.method.name)
    assert methods[0] == "cgr" and {"finetune", "joint"} <= set(methods)


def test_published_settings() -> None:
    for name, order in (("cgr/cfp", "cfp"), ("cgr/pfc", "pfc")):
        recipe = load_recipe(name)
        assert isinstance(recipe.stream, DataSetsSection)
        assert "".join(task.name[0] for task in recipe.stream.tasks) == order
        options = check_method(recipe)
        assert isinstance(options, CgrOptions)
        assert options.generator.steps == 400_000 and options.generator.batch_size == 8
        assert (options.generator.lr, options.generator.weight_decay) == (1e-4, 0.01)
        assert (options.pairs.count, options.pairs.steps, options.pairs.sampler) == (3000, 100, "ddim")
        assert not options.compat and options.pairs.source == "latest" and not options.pairs.gate
        training = recipe.training
        assert (training.optimizer, training.lr, training.later_lr, training.steps) == ("adam", 2e-4, 2e-4, 40_000)
        assert training.batch_size == 16 and training.weight_decay == 3e-5
