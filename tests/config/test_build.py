"""From a recipe to objects: what is checked, and what depends on the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perdure.config.build import as_module, build_experiment, build_method, check_method, method_class
from perdure.config.load import parse_recipe
from perdure.config.recipe import Recipe
from perdure.errors import UsageError
from perdure.methods import METHODS

SMALL = {
    "name": "small",
    "data": {"name": "digits", "size": 32, "train": 24, "val": 4, "test": 8},
    "stream": {"base": 6, "step": 2},
    "network": {
        "backbone": "tiny_resnet",
        "tiny_channels": [4, 4, 4, 4],
        "output_stride": 4,
        "width": 8,
        "dilations": [1],
    },
    "augment": {"crop": 32},
    "evaluate": {"size": None},
    "method": "finetune",
}


def recipe(**changes: object) -> Recipe:
    """The small recipe with some sections replaced."""
    return parse_recipe({**SMALL, **changes}, "small")


def test_experiment() -> None:
    experiment = build_experiment(recipe())
    assert [len(task.new) for task in experiment.stream.tasks] == [6, 2, 2]
    assert experiment.source.name == "digits"
    assert isinstance(experiment.method, method_class("finetune"))


def test_upper_bound_sees_one_task_with_the_groups_of_all() -> None:
    stream = build_experiment(recipe(method="joint")).stream
    assert [len(task.new) for task in stream.tasks] == [10]
    assert [len(group) for group in stream.groups] == [6, 2, 2]


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = as_module(build_method(recipe())).state_dict()
    torch.manual_seed(1)
    again = as_module(build_method(recipe())).state_dict()
    other = as_module(build_method(recipe(seed=2))).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_building_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    build_method(recipe())
    assert torch.equal(torch.rand(2), expected)


def test_weights_are_not_needed_to_restore_a_run() -> None:
    missing = recipe(network={**SMALL["network"], "weights": "gone.safetensors"})  # type: ignore[dict-item]
    build_method(missing, pretrained=False)
    with pytest.raises(Exception, match=r"gone\.safetensors does not exist"):
        build_method(missing)


@pytest.mark.parametrize("crop", [30, 33, 62])
def test_crop_has_to_fit_the_stride(crop: int) -> None:
    with pytest.raises(UsageError, match=f"augment.crop={crop}: .* multiples of 4"):
        build_method(recipe(augment={"crop": crop}))


def test_channels_follow_the_normalisation() -> None:
    grey = recipe(augment={"crop": 32, "mean": [0.5], "std": [0.25]})
    assert build_method(grey).network.in_channels == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", METHODS)
def test_shipped_methods_are_methods(name: str) -> None:
    assert method_class(name).Options.model_validate({}) is not None
    assert check_method(recipe(method=name)) == method_class(name).Options()


@pytest.mark.parametrize("text", ["class Mine(:", "1 / 0", "import nothing_of_this_name"])
def test_method_of_a_broken_module(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"broken{abs(hash(text))}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be imported: [A-Za-z]+Error: "):
        method_class(f"broken{abs(hash(text))}:Mine")


def test_method_by_its_place() -> None:
    assert method_class("perdure.methods.finetune:Finetune") is method_class("finetune")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("finetunee", "no method 'finetunee'"),
        ("perdure.methods.finetune:Nothing", "cannot be imported"),
        ("no.such.module:X", "cannot be imported"),
        (":X", "cannot be imported"),
        ("perdure.methods.finetune:", "cannot be imported"),
        ("perdure.methods.finetune:FinetuneOptions", "is not a method"),
        ("torch.nn:Module", "is not a method: it lacks Options"),
        ("math:pi", "is not a method"),
    ],
)
def test_no_method(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        method_class(name)
